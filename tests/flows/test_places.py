"""Where things are does not matter: links, file times from the future, other umasks, folders with strange names."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.config import load_config
from flows.experiment import RunError, fscil, preflight
from flows.garbage import collect_garbage, garbage
from flows.restore import restore
from tasks.store import StoreError, digest_of
from tasks.versions import Versions
from tests.conftest import Place
from tests.crowd import runs_in, twice
from tests.storm import leftovers, made


def change(place: Place, *overrides: str) -> None:
    """Check a run that has other settings than the one whose folder is there."""
    chosen = [*place.overrides("tuning.updates=7"), *overrides]
    preflight(load_config(["dataset=digits", "method=guided", "seed=0", *chosen]))


def test_what_a_linked_run_folder_points_to_is_never_deleted(finished: Place, tmp_path: Path) -> None:
    place, elsewhere = Place(tmp_path), tmp_path / "another disk" / "seed-0"
    shutil.copytree(finished.run("guided"), elsewhere)
    place.run("guided").parent.mkdir(parents=True)
    place.run("guided").symlink_to(elsewhere, target_is_directory=True)
    before = digest_of(elsewhere)
    with pytest.raises(RunError, match=r"written with other settings .*runtime\.replace=true"):
        change(place)
    change(place, "runtime.replace=true")
    assert not place.run("guided").exists()
    assert digest_of(elsewhere) == before


def test_a_replacement_that_is_interrupted_leaves_nothing_of_the_old_run_under_the_new_settings(
    finished: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, run = Place(tmp_path), Place(tmp_path).run("guided")
    shutil.copytree(finished.run("guided"), run)

    def interrupted(path: Path) -> None:
        if path.exists():
            (path / "config.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flows.experiment.remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            change(place, "runtime.replace=true")
    assert [path.name for path in run.parent.iterdir()] == [".seed-0.replaced.tmp"], (
        "the next start clears it away"
    )
    change(place)


def test_nothing_is_restored_through_a_linked_run_folder(tmp_path: Path) -> None:
    place, elsewhere = Place(made(tmp_path / "place")), tmp_path / "elsewhere"
    run = place.run("guided")
    run.mkdir(parents=True)
    (run / "authorized_keys").write_text("mine")
    versions = Versions.around(run)
    assert versions is not None
    digest = versions.keep(run, {})
    shutil.rmtree(run)
    elsewhere.mkdir()
    run.symlink_to(elsewhere)
    for what in (digest, "digits/guided/seed-0", str(run)):
        with pytest.raises(StoreError, match=r"seed-0 is a link, and nothing is restored through one"):
            restore(what, place.root / "runs")
    assert list(elsewhere.iterdir()) == []
    assert restore(digest, place.root / "runs", tmp_path / "there").put == 1


def test_files_from_the_future_are_neither_computed_anew_nor_thrown_away(
    finished: Place, tmp_path: Path
) -> None:
    place = Place(tmp_path)
    for name in ("state", "runs"):
        shutil.copytree(finished.root / name, tmp_path / name)
    (tmp_path / "state" / "stages" / "evaluate" / ("0" * 64)).mkdir()
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9))  # the year 2096: the clock was set back since
    stages = {path: path.stat().st_mtime_ns for path in tmp_path.glob("state/stages/*/*/record.json")}
    fscil("digits", "guided", 0, place.overrides())
    assert {path: path.stat().st_mtime_ns for path in stages} == stages
    assert place.files("guided") == finished.files("guided")
    found = garbage(place.root / "runs", place.root / "state", 7)
    collect_garbage(found, place.root / "runs", place.root / "state")
    assert all(path.is_file() for path in stages)
    assert (tmp_path / "state" / "stages" / "evaluate" / ("0" * 64)).is_dir(), "its age is not known"


@pytest.fixture(params=[0o077, 0o000, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.slow
def test_an_experiment_is_the_same_in_a_strange_folder_under_any_umask(
    finished: Place, tmp_path: Path, umask: int
) -> None:
    place = Place(tmp_path / "zwei Wörter, été & 数字 100% #1")
    place.root.mkdir()
    inside = str(place.root)
    named = [override.partition("=") for override in place.overrides(tracking=True)]
    quoted = [f"{name}='{value}'" if inside in value else f"{name}={value}" for name, _, value in named]
    fscil("digits", "guided", 0, quoted)
    assert place.files("guided") == finished.files("guided")
    assert runs_in(place) == runs_in(finished)
    assert twice(place) == []
    assert leftovers(place) == []
    for path in place.root.rglob("*"):
        mode = path.stat().st_mode
        assert mode & (stat.S_IRWXU if path.is_dir() else stat.S_IRUSR)
        assert not mode & umask, f"{path} is open to more than the umask allows"
