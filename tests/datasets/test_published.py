"""The real session lists, where they lie beside the project, and the three data sets with their real names."""

import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.config import load_config
from flows.experiment import preflight
from tasks.datasets import published
from tasks.datasets.benchmark import DatasetError, build_benchmark
from tasks.datasets.cifar import write_cifar
from tasks.datasets.lists import PUBLISHED, read_lists
from tests.conftest import ROOT

LISTS = ROOT.parent / "shared" / "data" / "fscil_splits"
FOLDERS = {"cub200": "cub200", "cifar100": "cifar100", "miniimagenet": "mini_imagenet"}
N_BASE = {"cub200": 100, "cifar100": 60, "miniimagenet": 60}
WAY = {"cub200": 10, "cifar100": 5, "miniimagenet": 5}
NAMES = sorted(FOLDERS)
TESTED = {  # cumulative, as published
    "cub200": [2864, 3143, 3430, 3728, 4028, 4326, 4614, 4911, 5206, 5494, 5794],
    "cifar100": [6000, 6500, 7000, 7500, 8000, 8500, 9000, 9500, 10_000],
    "miniimagenet": [6000, 6500, 7000, 7500, 8000, 8500, 9000, 9500, 10_000],
}
real_lists = pytest.mark.skipif(
    not LISTS.is_dir(), reason=f"the published lists are not in {LISTS.parent.name}/"
)


def lists_of(name: str) -> Path:
    return LISTS / FOLDERS[name]


def classes_of(name: str) -> list[list[str]]:
    """Rows of classes.txt: label, folder, and for miniImageNet the name."""
    return [line.split() for line in (lists_of(name) / "classes.txt").read_text().splitlines()]


def folder_of(line: str) -> str:
    return line.split("/")[-2]


# ------------------------------------------------------------------------------ the lists themselves


@real_lists
@pytest.mark.parametrize("name", NAMES)
def test_counts_of_every_session(name):
    train, test = read_lists(name, lists_of(name))
    base = 3000 if name == "cub200" else 30_000
    assert [len(session) for session in train] == [base, *(len(train) - 1) * [5 * WAY[name]]]
    assert list(itertools.accumulate(len(session) for session in test)) == TESTED[name]


@real_lists
@pytest.mark.parametrize("name", NAMES)
def test_no_picture_stands_twice(name):
    train, test = (list(itertools.chain(*side)) for side in read_lists(name, lists_of(name)))
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    if name != "cifar100":  # whose train and test pictures are counted apart
        assert not set(train) & set(test)


@real_lists
@pytest.mark.parametrize("name", ["cub200", "miniimagenet"])
def test_classes_come_in_their_order_with_five_shots(name):
    order = [row[1] for row in classes_of(name)]
    assert order == sorted(order)
    bounds = [0, *range(N_BASE[name], len(order) + 1, WAY[name])]
    for side in read_lists(name, lists_of(name)):
        for session, (start, end) in zip(side, itertools.pairwise(bounds), strict=True):
            assert sorted({folder_of(line) for line in session}) == order[start:end]
    for session in read_lists(name, lists_of(name))[0][1:]:
        folders = [folder_of(line) for line in session]
        assert {folders.count(folder) for folder in folders} == {5}


@real_lists
def test_another_list_is_refused(tmp_path):
    shutil.copytree(lists_of("cub200"), tmp_path / "lists")
    (tmp_path / "lists" / "session_4.txt").write_text("CUB_200_2011/images/001.A/a.jpg\n")
    with pytest.raises(DatasetError, match=r"session_4\.txt is not the published list"):
        read_lists("cub200", tmp_path / "lists")


def test_the_settings_are_those_of_the_lists():
    for name in NAMES:
        chosen, known = load_config([f"dataset={name}"]).dataset, PUBLISHED[name]
        assert (chosen.n_base, chosen.n_way, chosen.k_shot) == (N_BASE[name], WAY[name], 5)
        assert (known.n_base, known.n_way, known.n_sessions) == (N_BASE[name], WAY[name], chosen.n_sessions)
        assert len(known.digests) == 2 * (known.n_sessions + 1)


# ------------------------------------------------------------------------------ names


def letters(text: str) -> str:
    return "".join(c for c in text.casefold().replace("'s", "").replace("'", "") if c.isalpha())


@real_lists
def test_birds_are_named_after_their_folders():
    names = load_config(["dataset=cub200"]).dataset.class_names
    assert list(names) == [row[1] for row in classes_of("cub200")]
    assert names["001.Black_footed_Albatross"] == "Black-footed Albatross"
    mended = {"141.Artic_Tern": "Arctic Tern", "022.Chuck_will_Widow": "Chuck-will's-widow"}
    for folder, name in names.items():
        words = folder.split(".")[1].replace("Forsters", "Forster")
        assert name == mended.get(folder, name)
        assert letters(name) == letters(words.replace("Artic", "Arctic")), (folder, name)


@real_lists
def test_miniimagenet_names_belong_to_their_wordnet_ids():
    names = load_config(["dataset=miniimagenet"]).dataset.class_names
    assert list(names.items()) == [
        (wnid, name.replace("_", " ")) for _, wnid, name in classes_of("miniimagenet")
    ]
    train, _ = read_lists("miniimagenet", lists_of("miniimagenet"))
    assert {folder_of(line) for line in itertools.chain(*train)} == set(names)
    assert (names["n02110341"], names["n07697537"]) == ("dalmatian", "hotdog")


@real_lists
def test_fine_labels_are_in_alphabetical_order_and_become_words():
    assert load_config(["dataset=cifar100"]).dataset.class_names is None
    order = [row[1] for row in classes_of("cifar100")]
    assert order == sorted(order)
    assert len(order) == 100


# ------------------------------------------------------------------------------ sessions of small pictures


def write_picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")  # what a file holds decides, not what it is called
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def sparse(name: str, root: Path, monkeypatch) -> object:
    """Settings of a reduced cut, and on disk the pictures that it draws and no others."""
    lists = lists_of(name)
    config = load_config(
        [f"dataset={name}", f"dataset.root={root}", f"dataset.splits={lists}", "dataset.base_shots=3",
         "dataset.test_per_class=1"]
    )  # fmt: skip
    seeds = itertools.count()
    for session in (side[0][:1] for side in read_lists(name, lists)):
        write_picture(root / session[0], next(seeds))  # by these the layout is known
    with monkeypatch.context() as patched:
        patched.setattr(published, "_refuse_missing", lambda *_: None)
        _, draws = published.draw_published(config.dataset)
    for picture in itertools.chain(*(role for draw in draws for role in draw)):
        if not (root / picture.path).exists():
            write_picture(root / picture.path, next(seeds))
    return config.dataset


@real_lists
@pytest.mark.parametrize("name", ["cub200", "miniimagenet"])
def test_sessions_with_the_real_names(name, tmp_path, monkeypatch):
    settings = sparse(name, tmp_path / name, monkeypatch)
    benchmark = build_benchmark(settings, cache=tmp_path / "cache")
    n_base, way = N_BASE[name], WAY[name]
    base, *later = benchmark.sessions
    assert (len(base.train), len(base.val), len(base.test)) == (2 * n_base, n_base, n_base)
    assert [(len(s.train), len(s.val), s.val_rule) for s in later] == len(later) * [
        (5 * way, 0, "leave_one_out")
    ]
    assert [len(s.test) for s in later] == [n_base + way * (n + 1) for n in range(len(later))]
    train, _ = read_lists(name, settings.splits)
    order = [row[1] for row in classes_of(name)]
    for session, lines in zip(later, train[1:], strict=True):
        assert {(image.path, order[image.label]) for image in session.train} == {
            (line, folder_of(line)) for line in lines
        }
    assert benchmark.class_names == tuple(settings.class_names[folder] for folder in order)
    assert build_benchmark(settings, cache=tmp_path / "cache") == benchmark
    victim = tmp_path / name / later[3].train[0].path
    victim.unlink()
    with pytest.raises(
        DatasetError, match=rf"1 of \d+ pictures of {name} are missing .*{victim.name}.*make data"
    ):
        build_benchmark(settings, cache=tmp_path / "cache")


@real_lists
def test_twins_stay_where_the_lists_put_them_but_validate_nothing(tmp_path, monkeypatch):
    settings = sparse("miniimagenet", tmp_path / "mini", monkeypatch)
    base = build_benchmark(settings).sessions[0]
    shutil.copy(tmp_path / "mini" / base.test[0].path, tmp_path / "mini" / base.train[0].path)
    shutil.copy(tmp_path / "mini" / base.test[1].path, tmp_path / "mini" / base.val[1].path)
    benchmark = build_benchmark(settings)
    assert "2 training pictures stand among the test pictures too" in benchmark.split_rule
    after = benchmark.sessions[0]
    assert {image.id for image in after.val} == {image.id for image in base.val} - {base.val[1].id}
    assert {image.id for image in after.train} == {image.id for image in base.train} | {base.val[1].id}


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_is_said_before_any_compute(name, tmp_path):
    overrides = [f"dataset.root={tmp_path / 'none'}", f"runtime.state={tmp_path / 'state'}"]
    overrides += [f"runtime.runs={tmp_path / 'runs'}", "tracking=off"]
    with pytest.raises(DatasetError, match=f"no data at .*none: run `make data DATASET={name}`"):
        preflight(load_config([f"dataset={name}", *overrides]))
    (tmp_path / "none").mkdir()
    with pytest.raises(
        DatasetError, match=f"no session list .*run `make data DATASET={name}`.*dataset.splits="
    ):
        preflight(load_config([f"dataset={name}", *overrides, f"dataset.splits={tmp_path}"]))


@real_lists
def test_an_empty_folder_names_the_command(tmp_path):
    settings = load_config(
        ["dataset=cub200", f"dataset.root={tmp_path}", f"dataset.splits={lists_of('cub200')}"]
    )
    with pytest.raises(DatasetError, match=r"in none of the layouts .*make data DATASET=cub200"):
        build_benchmark(settings.dataset)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("dataset.n_base=80", "n_base=80 does not fit the published lists of cub200, which have 100"),
        ("dataset.k_shot=1", "k_shot=1 does not fit"),
        ("dataset.class_order=[a]", "class_order=.* does not fit"),
        ("dataset.n_sessions=11", "n_sessions=11, but the published lists of cub200 end after 10"),
        ("dataset.splits=null", "cut by its published lists: name their folder with dataset.splits="),
    ],
)
def test_another_cut_is_refused(tmp_path, change, says):
    with pytest.raises(DatasetError, match=says):
        build_benchmark(load_config(["dataset=cub200", f"dataset.root={tmp_path}", change]).dataset)


# ------------------------------------------------------------------------------ CIFAR-100 at full size


def fine_labels() -> tuple[np.ndarray, np.ndarray]:
    """Labels of all records as far as the lists tell them; base classes share the rest evenly."""
    sides = []
    for lines, each in zip(read_lists("cifar100", lists_of("cifar100")), (500, 100), strict=True):
        labels = np.full(100 * each, -1)
        labels[[int(line) for line in lines[0]]] = np.repeat(np.arange(60), each)
        for n, session in enumerate(lines[1:]):
            per_class = len(session) // 5
            new = np.repeat(np.arange(60 + 5 * n, 65 + 5 * n), per_class)
            labels[[int(line) for line in session]] = new
        rest = np.flatnonzero(labels < 0)
        labels[rest] = 60 + np.arange(len(rest)) % 40
        sides.append(labels.astype(np.uint8))
    return sides[0], sides[1]


@real_lists
@pytest.mark.slow
def test_all_of_cifar100(tmp_path):
    packed = tmp_path / "unpacked" / "cifar-100-binary"
    packed.mkdir(parents=True)
    (packed / "fine_label_names.txt").write_text("\n".join(row[1] for row in classes_of("cifar100")) + "\n")
    random = np.random.default_rng(0)
    for split, labels in zip(("train", "test"), fine_labels(), strict=True):
        records = random.integers(0, 256, (len(labels), 3074), dtype=np.uint8)
        records[:, 1] = labels
        records.tofile(packed / f"{split}.bin")
    root = tmp_path / "cifar100"
    write_cifar(packed.parent, root)
    settings = load_config(
        ["dataset=cifar100", f"dataset.root={root}", f"dataset.splits={lists_of('cifar100')}"]
    )
    benchmark = build_benchmark(settings.dataset, cache=tmp_path / "cache")
    base, *later = benchmark.sessions
    assert (len(base.train), len(base.val)) == (27_000, 3_000)
    assert [(len(s.train), len(s.val)) for s in later] == 8 * [(25, 0)]
    assert [len(s.test) for s in benchmark.sessions] == TESTED["cifar100"]
    assert benchmark.class_names[47] == "maple tree"
    assert benchmark.class_names == tuple(row[1].replace("_", " ") for row in classes_of("cifar100"))
    assert build_benchmark(settings.dataset, cache=tmp_path / "cache") == benchmark
