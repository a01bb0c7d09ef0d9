import itertools
import os
import shutil

import pytest
import torch
from PIL import Image

from tasks.datasets import pictures
from tasks.datasets.benchmark import DatasetError, DatasetSettings, build_benchmark
from tasks.images import UnreadableImageError, save_png
from tasks.store import digest_of

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")


def settings(root, **changes):
    values = {
        "name": "toy",
        "root": root,
        "n_base": 2,
        "n_way": 2,
        "k_shot": 2,
        "n_sessions": 2,
        "base_shots": 5,
        "test_per_class": 3,
        "holdout": 0.2,
        "class_order": None,
        "class_names": None,
        "size": 8,
        "split_seed": 0,
    } | changes
    return DatasetSettings.model_validate(values)


def fill(folder, count, seed):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        save_png(torch.rand(3, 8, 8, generator=generator), folder / f"{i}.png")


@pytest.fixture
def split_root(tmp_path):
    for label, name in enumerate(NAMES):
        fill(tmp_path / "pets" / "train" / name, 7, seed=label)
        fill(tmp_path / "pets" / "test" / name, 4, seed=100 + label)
    return tmp_path / "pets"


@pytest.fixture
def flat_root(tmp_path):
    for label, name in enumerate(NAMES):
        fill(tmp_path / "flat" / name, 10, seed=label)
    return tmp_path / "flat"


# ------------------------------------------------------------------------------ what is cut


def test_counts_of_every_session(split_root):
    sessions = build_benchmark(settings(split_root)).sessions
    assert [(len(s.train), len(s.val), len(s.test)) for s in sessions] == [(8, 2, 6), (4, 0, 12), (4, 0, 18)]
    assert [s.new_classes for s in sessions] == [(0, 1), (2, 3), (4, 5)]
    assert [s.seen_classes for s in sessions] == [(0, 1), (0, 1, 2, 3), tuple(range(6))]
    assert [s.val_rule for s in sessions] == ["holdout", "leave_one_out", "leave_one_out"]


def test_tests_are_cumulative_and_cover_the_seen_classes(split_root):
    sessions = build_benchmark(settings(split_root)).sessions
    for before, after in itertools.pairwise(sessions):
        assert set(before.test) < set(after.test)
    for session in sessions:
        assert {image.label for image in session.test} == set(session.seen_classes)
        assert {image.label for image in session.train} == set(session.new_classes)


@pytest.mark.parametrize("layout", ["split_root", "flat_root"])
def test_no_picture_has_two_roles(layout, request):
    sessions = build_benchmark(settings(request.getfixturevalue(layout), test_per_class=2)).sessions
    learned = [image.id for s in sessions for image in (*s.train, *s.val)]
    tested = {image.id for image in sessions[-1].test}
    assert len(learned) == len(set(learned))
    assert not tested & set(learned)


def test_references_hold_relative_paths_and_digests(split_root):
    for image in build_benchmark(settings(split_root)).sessions[0].train:
        assert digest_of(split_root / image.path) == image.digest
        assert "/" not in image.id


def test_the_split_depends_on_its_seed_and_not_on_the_place(split_root, tmp_path):
    shutil.copytree(split_root, tmp_path / "elsewhere")
    here, there = (build_benchmark(settings(r)) for r in (split_root, tmp_path / "elsewhere"))
    assert here == there
    assert here != build_benchmark(settings(split_root, split_seed=1))


def test_fewer_shots_are_a_subset_of_more(split_root):
    one, two = (build_benchmark(settings(split_root, k_shot=k)).sessions[1].train for k in (1, 2))
    assert set(one) < set(two)


def test_a_flat_folder_sets_a_fifth_aside(flat_root):
    chosen = settings(flat_root, test_per_class=None, base_shots=None)
    base = build_benchmark(chosen).sessions[0]
    assert (len(base.train), len(base.val), len(base.test)) == (12, 4, 4)


def test_plain_classification_has_one_session(flat_root):
    assert len(build_benchmark(settings(flat_root, n_sessions=0, n_base=6, test_per_class=2)).sessions) == 1


def test_at_least_one_is_held_out_and_one_is_left_to_train(split_root):
    base = build_benchmark(settings(split_root, base_shots=2, holdout=0.01)).sessions[0]
    assert (len(base.train), len(base.val)) == (2, 2)
    base = build_benchmark(settings(split_root, base_shots=2, holdout=0.99)).sessions[0]
    assert (len(base.train), len(base.val)) == (2, 2)


def test_val_of_its_own_validates_the_base_session_and_all_of_train_trains(split_root):
    for label, name in enumerate(NAMES):
        fill(split_root / "val" / name, 3, seed=200 + label)
    base, later, _ = build_benchmark(settings(split_root, base_shots=None)).sessions
    assert (len(base.train), len(base.val)) == (14, 6)
    assert {image.path.split("/")[0] for image in base.val} == {"val"}
    assert (len(later.train), later.val, later.val_rule) == (4, (), "leave_one_out")
    shutil.rmtree(split_root / "val" / "bee")
    refused("'bee' has 0 validation pictures .* remove val/", split_root)


@pytest.mark.parametrize("suffix", ["webp", "JPEG", "bmp", "tiff"])
def test_pictures_of_other_kinds_are_read(flat_root, suffix):
    for path in sorted((flat_root / "ant").iterdir()):
        Image.open(path).save(path.with_suffix(f".{suffix}"))
        path.unlink()
    base = build_benchmark(settings(flat_root, test_per_class=2)).sessions[0]
    assert {image.path.split(".")[-1] for image in base.train if image.label == 0} == {suffix}


def test_class_order_and_names(split_root):
    benchmark = build_benchmark(
        settings(split_root, class_order=NAMES[::-1], class_names={"fox": "red fox", "elk": "moose"})
    )
    assert benchmark.class_names == ("red fox", "moose", "dog", "cat", "bee", "ant")
    assert {image.path.split("/")[1] for image in benchmark.sessions[0].train} == {"fox", "elk"}


def test_underscores_are_blanks_in_prompts(flat_root):
    (flat_root / "ant").rename(flat_root / "army_ant")
    assert build_benchmark(settings(flat_root, test_per_class=2)).class_names[0] == "army ant"


def test_hidden_files_are_passed_over_and_others_told(split_root, caplog):
    before = build_benchmark(settings(split_root))
    (split_root / "train" / "ant" / ".DS_Store").write_text("x")
    assert build_benchmark(settings(split_root)) == before
    assert caplog.messages == []
    (split_root / "train" / "ant" / "0.heic").write_text("x")
    (split_root / "test" / "bee" / "notes.txt").write_text("x")
    (split_root / "train" / "empty").mkdir()
    assert build_benchmark(settings(split_root)) == before
    unread, empty = caplog.messages
    assert unread.startswith(
        f"2 files are not read, one is {split_root}/train/ant/0.heic: pictures end in .png "
    )
    assert empty.startswith(f"{split_root}/train/empty holds no picture, so it is no class")


def test_the_content_of_a_picture_counts_and_not_its_name(split_root):
    before = build_benchmark(settings(split_root))
    for path in sorted((split_root / "train" / "ant").glob("*.png")):
        Image.open(path).save(path, format="JPEG")
    after = build_benchmark(settings(split_root))
    assert [i.path for i in after.sessions[0].train] == [i.path for i in before.sessions[0].train]


# ------------------------------------------------------------------------------ what is remembered


def test_pictures_are_looked_at_once_and_again_when_they_change(split_root, tmp_path, monkeypatch):
    first = build_benchmark(settings(split_root), tmp_path / "cache")
    looked = []
    load = pictures.load_pixels
    monkeypatch.setattr(
        pictures, "load_pixels", lambda path, size: looked.append(path.name) or load(path, size)
    )
    assert build_benchmark(settings(split_root), tmp_path / "cache") == first
    assert looked == []
    monkeypatch.setattr(pictures, "RULES", pictures.RULES + 1)
    assert build_benchmark(settings(split_root), tmp_path / "cache") == first
    assert set(looked) == {path.name for path in split_root.rglob("*.png")}, "all of them, by the new rules"
    looked.clear()
    victim = split_root / first.sessions[1].train[0].path
    save_png(torch.zeros(3, 8, 8), victim)
    changed = build_benchmark(settings(split_root), tmp_path / "cache").sessions[1].train[0]
    assert looked == [victim.name]
    assert changed.digest == digest_of(victim) != first.sessions[1].train[0].digest


def test_a_ruined_memory_is_made_anew_and_an_unreadable_picture_not_remembered(split_root, tmp_path):
    first = build_benchmark(settings(split_root), tmp_path / "cache")
    (memory,) = (tmp_path / "cache").iterdir()
    memory.write_text('{"train/ant/0.png": 3}')
    assert build_benchmark(settings(split_root), tmp_path / "cache") == first
    (split_root / first.sessions[0].train[0].path).write_bytes(b"ruined")
    for _ in range(2):
        with pytest.raises(UnreadableImageError):
            build_benchmark(settings(split_root), tmp_path / "cache")


# ------------------------------------------------------------------------------ what is refused


def refused(message, root, **changes):
    with pytest.raises(DatasetError, match=message):
        build_benchmark(settings(root, **changes))


def test_missing_folder(tmp_path):
    says = r"no data at .*nowhere: run `make data DATASET=digits`.*dataset\.root="
    refused(says, tmp_path / "nowhere", name="digits_dev")
    refused(r"no data at .*nowhere: name the folder of your pictures", tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    refused("holds no class folder with pictures", tmp_path)


def test_half_a_split(split_root):
    shutil.rmtree(split_root / "test")
    refused(r"has train/ but no test/", split_root)


def test_train_and_val_alone(split_root):
    (split_root / "test").rename(split_root / "val")
    refused(r"has train/ but no test/: add it, rename val/ if it is meant for testing", split_root)


def test_splits_for_a_folder_of_ones_own(split_root):
    refused("splits is for cifar100, cub200, miniimagenet, not for toy", split_root, splits=split_root)


def test_too_few_classes(split_root):
    refused(r"has 6 classes, but n_base=2 \+ n_way=2 x n_sessions=3 needs 8", split_root, n_sessions=3)


def test_one_base_class(split_root):
    refused("n_base=1: the base session needs at least 2", split_root, n_base=1)


def test_too_few_training_pictures(split_root):
    refused("'ant' has 7 training pictures .* but 8 are needed", split_root, base_shots=8)
    refused("'cat' has 7 training pictures .* but 9 are needed", split_root, k_shot=9)


def test_a_base_class_of_one_picture(split_root):
    for path in sorted((split_root / "train" / "bee").iterdir())[1:]:
        path.unlink()
    refused("'bee' has 1 training pictures .* but 2 are needed", split_root, base_shots=None)


def test_too_few_test_pictures(split_root):
    refused("'ant' has 4 test pictures .* but 5 are needed", split_root, test_per_class=5)


def test_class_without_test_folder(split_root):
    shutil.rmtree(split_root / "test" / "bee")
    refused("'bee' has 0 test pictures", split_root, test_per_class=None)


def test_unreadable_picture_is_named(split_root):
    victim = split_root / build_benchmark(settings(split_root)).sessions[2].train[0].path
    victim.write_bytes(b"ruined")
    with pytest.raises(UnreadableImageError, match=f"{victim.parent.name}/{victim.name}"):
        build_benchmark(settings(split_root))


def test_two_classes_of_one_name(split_root):
    refused(
        "'ant' and 'bee' have one name, 'insect'", split_root, class_names={"ant": "Insect", "bee": "insect"}
    )


@pytest.mark.parametrize(
    "twin",
    [
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
        "cafe\N{COMBINING ACUTE ACCENT}",
        "CAF\N{LATIN CAPITAL LETTER E WITH ACUTE}",
    ],
)
@pytest.mark.parametrize("blanks", [" ", "  "])
def test_two_names_that_the_eye_does_not_tell_apart(split_root, twin, blanks):
    one = f"the{blanks}caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    refused("'ant' and 'bee' have one name", split_root, class_names={"ant": one, "bee": f"the {twin}"})


@pytest.mark.parametrize(
    "name", ["a/b", "a\\b", "", "..", ".", ".x.tmp", "a\nb", "a\0b", "x" * 256, "\udce9"]
)
def test_unusable_name(split_root, name):
    with pytest.raises(DatasetError, match="'ant' has the name"):
        build_benchmark(settings(split_root).model_copy(update={"class_names": {"ant": name}}))


def test_a_picture_whose_name_is_no_text_is_named(split_root):
    source = split_root / "train" / "ant" / "0.png"
    try:
        source.rename(os.fsdecode(os.fsencode(source.parent) + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    refused(r"train/ant/caf\\udce9\.png' is not UTF-8; rename it", split_root)


@pytest.mark.parametrize(
    "changes", [{"base_shots": 0}, {"base_shots": -3}, {"test_per_class": 0}, {"test_per_class": -1}]
)
def test_numbers_of_pictures_that_mean_nothing(split_root, changes):
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        settings(split_root, **changes)


def test_one_shot_of_a_base_class_is_too_few_to_hold_one_out(split_root):
    refused(
        "base_shots=1: a base class trains on one picture and holds one out; raise it to 2",
        split_root,
        base_shots=1,
    )
    for name in NAMES:
        fill(split_root / "val" / name, 2, seed=200 + NAMES.index(name))
    base = build_benchmark(settings(split_root, base_shots=1)).sessions[0]
    assert (len(base.train), len(base.val)) == (2, 4)


def test_huge_pictures_are_looked_at_in_eight_bits(split_root, monkeypatch):
    """As floats the largest that is allowed takes 768 MB, and as many are looked at as there are threads."""
    monkeypatch.setattr(torch.Tensor, "float", None)
    assert build_benchmark(settings(split_root)).n_base == 2


def test_class_order_names_no_folder(split_root):
    refused("names 'yak', but", split_root, class_order=("ant", "yak"))


def test_class_order_repeats(split_root):
    refused("names 'ant' twice", split_root, class_order=("ant", "bee", "ant", "cat", "dog", "elk"))


def test_a_test_picture_among_the_training_pictures(split_root):
    base = build_benchmark(settings(split_root)).sessions[0]
    shutil.copy(split_root / base.train[0].path, split_root / base.test[0].path)
    refused(r"test/ant/\d\.png \(test\) is the same picture as train/ant/\d\.png \(training\)", split_root)


def test_one_picture_under_two_labels(split_root):
    base = build_benchmark(settings(split_root)).sessions[0]
    shutil.copy(split_root / base.train[0].path, split_root / base.train[-1].path)
    refused(r"train/bee/\d\.png \(training\) is the same picture as train/ant/\d\.png", split_root)
