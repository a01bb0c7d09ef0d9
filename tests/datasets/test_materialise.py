"""`make data` against archives of the real formats, in small, served by a server of the test's own."""

import dataclasses
import hashlib
import shutil

import numpy as np
import pytest
from PIL import Image

from tasks.datasets.__main__ import main
from tasks.datasets.benchmark import DatasetError, DatasetSettings, build_benchmark
from tasks.datasets.lists import PUBLISHED
from tasks.datasets.sources import SOURCES
from tasks.store import digest_of, read_json
from tests.datasets import small_worlds
from tests.datasets.file_server import Shelf, serving
from tests.datasets.small_worlds import WORDS, tar


@dataclasses.dataclass
class Site:
    """A data set in small, its archive and lists served."""

    world: small_worlds.World
    shelf: Shelf
    root: object

    def make(self, *more):
        return main([self.world.name, "--root", str(self.root), *more])

    def settings(self, **changes):
        values = {"name": self.world.name, "root": self.root, "splits": self.root / "splits", "n_base": 2}
        values |= {"n_way": 1, "k_shot": 5, "n_sessions": 1, "base_shots": None, "test_per_class": None}
        values |= {"holdout": 0.2, "class_order": None, "class_names": None, "size": 8, "split_seed": 0}
        return DatasetSettings.model_validate(values | changes)


def site(world, shelf, monkeypatch, tmp_path, **source):
    monkeypatch.setitem(PUBLISHED, world.name, world.protocol)
    archive = tar(world.files)
    shelf.files["/archive.tgz"] = archive
    shelf.files |= {f"/lists/{file}": text.encode() for file, text in world.lists.items()}
    source = {
        "archive": f"{shelf.address}/archive.tgz",
        "md5": hashlib.md5(archive).hexdigest(),
        "lists": f"{shelf.address}/lists",
    } | source
    monkeypatch.setitem(SOURCES, world.name, dataclasses.replace(SOURCES[world.name], **source))
    return Site(world, shelf, tmp_path / "data" / world.name)


@pytest.fixture
def shelf():
    with serving(Shelf()) as served:
        yield served


@pytest.fixture
def cub(shelf, monkeypatch, tmp_path):
    return site(small_worlds.cub(), shelf, monkeypatch, tmp_path)


@pytest.fixture
def cifar(shelf, monkeypatch, tmp_path):
    return site(small_worlds.cifar(), shelf, monkeypatch, tmp_path)


@pytest.fixture
def mini(shelf, monkeypatch, tmp_path):
    return site(small_worlds.mini(), shelf, monkeypatch, tmp_path, archive=None, md5=None)


def check_sessions(site):
    base, later = build_benchmark(site.settings()).sessions
    assert (len(base.train), len(base.val), len(base.test)) == (8, 2, 4)
    assert (len(later.train), len(later.val), len(later.test)) == (5, 0, 6)
    assert (base.val_rule, later.val_rule) == ("holdout", "leave_one_out")


# ------------------------------------------------------------------------------ from the web to sessions


def test_cub_is_fetched_whole_and_a_second_call_does_nothing(cub, capsys):
    assert cub.make() == 0
    said = capsys.readouterr().out
    assert "21 pictures are in" in said
    assert "non-commercial" in said
    assert "`dvc add data`" in said
    assert sorted(path.name for path in cub.root.iterdir()) == ["CUB_200_2011", "source.json", "splits"]
    assert [path.name for path in cub.root.parent.iterdir()] == ["cub200"]
    assert not (cub.root / "CUB_200_2011" / "README").exists()
    before, asked = digest_of(cub.root), len(cub.shelf.asked)
    assert cub.make() == 0
    assert "21 pictures); nothing to do" in capsys.readouterr().out
    assert (digest_of(cub.root), len(cub.shelf.asked)) == (before, asked)
    check_sessions(cub)


def test_class_folders_become_words(cub):
    cub.make()
    names = {"001.Small_eyed_Ant": "small-eyed ant"}
    assert build_benchmark(cub.settings(class_names=names)).class_names == (
        "small-eyed ant",
        "002.Small eyed Bee",
        "003.Small eyed Cat",
    )


def test_what_a_folder_holds_depends_on_nothing_but_the_archive(cub, tmp_path):
    cub.make()
    first = digest_of(cub.root)
    cub.root = tmp_path / "elsewhere" / "cub"
    cub.make()
    assert digest_of(cub.root) == first


def test_cifar_pictures_are_those_of_the_records(cifar):
    assert cifar.make() == 0
    check_sessions(cifar)
    records = np.frombuffer(cifar.world.files["cifar-100-binary/test.bin"], np.uint8).reshape(-1, 3074)
    for index, record in enumerate(records):
        with Image.open(cifar.root / "test" / WORDS[record[1]] / f"{index:05d}.png") as seen:
            assert np.array_equal(np.asarray(seen).transpose(2, 0, 1).ravel(), record[2:])


def test_cifar_in_another_order_is_refused(cifar, capsys):
    cifar.make()
    one, other = (sorted((cifar.root / "train" / word).iterdir())[0] for word in ("bee", "cat"))
    names = one.name, other.name
    one.rename(one.with_name(names[1]))
    other.rename(other.with_name(names[0]))
    with pytest.raises(
        DatasetError, match="not in the order that the lists of cifar100 were made for: session 1"
    ):
        build_benchmark(cifar.settings())
    assert cifar.make() == 1
    assert "was complete and is damaged now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("member", "content", "says"),
    [
        ("fine_label_names.txt", b"cat\nbee\n", "alphabetical"),
        ("fine_label_names.txt", b"../x\nbee\n", "alphabetical"),
        ("fine_label_names.txt", b"ant\nbee\n", "fine label 2, but there are 2"),
        ("train.bin", b"12345", "not records of 3074"),
    ],
)
def test_a_cifar_archive_of_another_content_is_refused(
    shelf, monkeypatch, tmp_path, capsys, member, content, says
):
    world = small_worlds.cifar()
    world.files[f"cifar-100-binary/{member}"] = content
    here = site(world, shelf, monkeypatch, tmp_path)
    assert here.make() == 1
    assert says in capsys.readouterr().err
    assert not here.root.exists()


# ------------------------------------------------------------------------------ what breaks


def test_an_interrupted_download_goes_on(cub, capsys):
    cub.shelf.break_at["/archive.tgz"] = 2_000
    assert cub.make() == 1
    assert "2,000 bytes are kept" in capsys.readouterr().err
    assert not cub.root.exists()
    assert cub.make() == 0
    assert cub.shelf.asked[-1] == ("/archive.tgz", "bytes=2000-")
    assert sum(path == "/lists/session_1.txt" for path, _ in cub.shelf.asked) == 1
    check_sessions(cub)


def test_another_archive_is_refused(cub, capsys):
    cub.shelf.files["/archive.tgz"] = tar({"CUB_200_2011/images/001.A/a.jpg": b"x"})
    assert cub.make() == 1
    assert "not the file that was asked for: its md5 is" in capsys.readouterr().err
    assert not cub.root.exists()


def test_an_archive_that_leads_out_is_refused(shelf, monkeypatch, tmp_path, capsys):
    world = small_worlds.cub()
    world.files["CUB_200_2011/images/../../../../evil.jpg"] = b"x"
    here = site(world, shelf, monkeypatch, tmp_path)
    assert here.make() == 1
    assert "a path that leads out" in capsys.readouterr().err
    assert not here.root.exists()
    assert not list(tmp_path.rglob("evil.jpg"))


def test_other_lists_are_refused(cub, capsys):
    cub.shelf.files["/lists/session_2.txt"] += b"\n"
    assert cub.make() == 1
    assert "session_2.txt.part is not the file" in capsys.readouterr().err
    assert not cub.root.exists()


def test_an_archive_that_lacks_a_picture_is_refused(shelf, monkeypatch, tmp_path, capsys):
    world = small_worlds.cub()
    del world.files["CUB_200_2011/images/002.Small_eyed_Bee/bee_train_3.jpg"]
    here = site(world, shelf, monkeypatch, tmp_path)
    assert here.make() == 1
    assert "1 of 21 pictures of cub200 are missing" in capsys.readouterr().err
    assert not here.root.exists()


def test_files_in_the_way_are_left_alone(cub, capsys):
    cub.root.mkdir(parents=True)
    (cub.root / "thesis.txt").write_text("years of work")
    assert cub.make() == 1
    assert "holds 'thesis.txt'" in capsys.readouterr().err
    assert [path.name for path in cub.root.iterdir()] == ["thesis.txt"]


def test_digits_are_not_fetched(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["digits", "--root", str(tmp_path / "digits"), "--from", "a.tgz"])
    assert "digits are not fetched" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what is on disk


def test_pictures_on_disk_are_kept_and_get_the_lists(cub, capsys):
    cub.world.write_files(cub.root, strip="CUB_200_2011/")
    assert cub.make() == 0
    assert "21 pictures in" in capsys.readouterr().out
    assert [path for path, _ in cub.shelf.asked if "archive" in path] == []
    assert read_json(cub.root / "source.json")["archive"] is None
    check_sessions(cub)


def test_a_part_of_the_pictures_on_disk_is_refused_and_kept(cub, capsys):
    cub.world.write_files(cub.root)
    victim = cub.root / "CUB_200_2011/images/003.Small_eyed_Cat/cat_train_4.jpg"
    victim.unlink()
    assert cub.make() == 1
    said = capsys.readouterr().err
    assert "holds some of the pictures, but not all" in said
    assert victim.name in said
    assert [path.name for path in cub.root.iterdir()] == ["CUB_200_2011"]


def test_archive_and_lists_on_disk_need_no_network(cub, tmp_path):
    archive = tmp_path / "mine.tgz"
    archive.write_bytes(cub.shelf.files["/archive.tgz"])
    lists = cub.world.write_lists(tmp_path / "lists")
    assert cub.make("--from", str(archive), "--lists", lists.as_uri()) == 0
    assert cub.shelf.asked == []
    assert archive.is_file()
    assert read_json(cub.root / "source.json")["md5"] == hashlib.md5(archive.read_bytes()).hexdigest()


def test_miniimagenet_without_pictures_says_what_to_place_where(mini, capsys):
    assert mini.make() == 1
    said = capsys.readouterr().err
    for words in (
        "ImageNet's terms",
        f"place in {mini.root}",
        "train/<wnid>/<file>",
        "images/<file>",
        ".JPEG",
        "--from",
    ):
        assert words in said
    assert not mini.root.exists()


def test_miniimagenet_from_an_archive_records_its_digest(mini, capsys):
    mini.shelf.files["/mini.tar"] = tar({f"some/folder/{n}": c for n, c in mini.world.files.items()})
    sha256 = hashlib.sha256(mini.shelf.files["/mini.tar"]).hexdigest()
    where = f"{mini.shelf.address}/mini.tar?token=planted"
    mini.shelf.files["/mini.tar?token=planted"] = mini.shelf.files["/mini.tar"]
    assert mini.make("--from", where) == 0
    said = capsys.readouterr().out
    assert sha256 in said
    assert "planted" not in said
    assert read_json(mini.root / "source.json")["sha256"] == sha256
    check_sessions(mini)
    shutil.rmtree(mini.root)
    assert mini.make("--from", where, "--sha256", "0" * 64) == 1
    assert "its sha256 is" in capsys.readouterr().err


def in_images(name):
    return f"images/{name.split('/')[-1]}"


LAYOUTS = {
    "archive": lambda name: name,
    "train and test": lambda name: name.removeprefix("MINI-ImageNet/"),
    "below images": lambda name: name.replace("MINI-ImageNet", "images"),
    "one folder a class": lambda name: "/".join(name.split("/")[2:]),
    "a class below images": lambda name: "images/" + "/".join(name.split("/")[2:]),
    "flat with csv": in_images,
    "flat": lambda name: name.split("/")[-1],
}


def imagenet(name):
    """ImageNet's own names: the numbers grow with the rank, but are not the rank."""
    wnid, file = name.split("/")[2:]
    return f"train/{wnid}/{wnid}_{int(file[-8:-4]) * 7}.JPEG"


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_miniimagenet_layouts_give_one_benchmark(mini, layout, tmp_path):
    for name, content in mini.world.files.items():
        path = mini.root / LAYOUTS[layout](name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert mini.make() == 0
    check_sessions(mini)
    ours = build_benchmark(mini.settings()).sessions
    mini.root = mini.world.write_files(tmp_path / "reference")
    theirs = build_benchmark(mini.settings(splits=mini.world.write_lists(tmp_path / "lists"))).sessions
    for one, other in zip(ours, theirs, strict=True):
        for role in ("train", "val", "test"):
            seen = [(i.id, i.digest, i.label) for i in getattr(one, role)]
            assert seen == [(i.id, i.digest, i.label) for i in getattr(other, role)]


def test_miniimagenet_is_found_in_imagenet_by_rank(mini):
    """Every rank of a class is there, so that the ranks of the lists mean the same."""
    by_rank = {(name.split("/")[2], int(name[-8:-4])): content for name, content in mini.world.files.items()}
    for wnid in {wnid for wnid, _ in by_rank}:
        for rank in range(1, 1 + max(r for w, r in by_rank if w == wnid)):
            path = mini.root / imagenet(f"x/x/{wnid}/{wnid}{rank:08d}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(by_rank.get((wnid, rank), small_worlds.picture(5000 + rank)))
    assert mini.make() == 0
    check_sessions(mini)
    for image in build_benchmark(mini.settings()).sessions[1].test:
        wnid, file = image.id.split("-")[1:]
        assert (mini.root / image.path).read_bytes() == by_rank[wnid, int(file[-8:-4])]


def test_imagenet_folders_that_are_too_small_are_refused(mini):
    for name, content in mini.world.files.items():
        path = mini.root / imagenet(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(DatasetError, match="lacks the train picture MINI-ImageNet/train/n00000202"):
        build_benchmark(mini.settings(splits=mini.world.write_lists(mini.root / "splits")))
