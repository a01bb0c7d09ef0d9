import errno
import os
import subprocess

import numpy as np
import pytest

from tasks.datasets import digits
from tasks.datasets.__main__ import main
from tasks.store import digest_of

DIGEST = "1d1b7f120b98c218964338e68a56a476.dir"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert main(["digits", "--root", str(folder)]) == 0
    return folder


def test_every_class_has_400_training_and_100_test_images(root):
    for split, count in (("train", 400), ("test", 100)):
        assert sorted(p.name for p in (root / split).iterdir()) == sorted(digits.CLASS_NAMES)
        for name in digits.CLASS_NAMES:
            assert len(list((root / split / name).iterdir())) == count


def test_content_is_the_same_on_any_machine(root):
    assert digest_of(root) == DIGEST


def test_a_complete_folder_is_left_alone(root, monkeypatch):
    monkeypatch.setattr(digits, "_mnist", lambda: pytest.fail("it was made again"))
    digits.write_digits(root)


@pytest.fixture
def small(monkeypatch):
    """Ten pictures a class, two of them for testing, so that damage and repair are quick."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 784)).astype(np.uint8)
    monkeypatch.setattr(digits, "_mnist", lambda: (pixels, np.repeat(np.arange(10), 10)))
    monkeypatch.setattr(digits, "TRAIN_PER_CLASS", 8)
    monkeypatch.setattr(digits, "TEST_PER_CLASS", 2)


@pytest.mark.usefixtures("small")
def test_an_incomplete_folder_is_made_again(tmp_path):
    digits.write_digits(tmp_path / "digits")
    whole = digest_of(tmp_path / "digits")
    next((tmp_path / "digits" / "train" / "six").iterdir()).unlink()
    digits.write_digits(tmp_path / "digits")
    assert digest_of(tmp_path / "digits") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]


@pytest.mark.usefixtures("small")
def test_what_is_half_made_is_cleared_away(tmp_path, monkeypatch):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f".digits.{pid}.tmp" / "train" / "one").mkdir(parents=True)

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(digits, "save_png", full)
        with pytest.raises(OSError, match="no space"):
            digits.write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_foreign_files_are_not_deleted(tmp_path, capsys):
    mine = tmp_path / "digits" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    assert main(["digits", "--root", str(mine.parent)]) == 1
    assert "thesis.txt" in capsys.readouterr().err
    assert mine.read_text() == "years of work"
