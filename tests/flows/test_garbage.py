"""`fscil gc` deletes what no results name: it knows all results folders of a state, or deletes nothing."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.__main__ import main
from flows.cli import EXIT_FAILED
from flows.experiment import fscil
from flows.garbage import collect_garbage, garbage, note_results, nothing_running
from tasks.store import Store, StoreError
from tasks.versions import Versions, pointer_of
from tests.conftest import Place
from tests.storm import leftovers, made


@pytest.fixture
def place(finished: Place, tmp_path: Path) -> Place:
    """A copy of a finished run, in a DVC repository."""
    copy = Place(made(tmp_path / "place"))
    for name in ("state", "runs"):
        shutil.copytree(finished.root / name, copy.root / name)
    return copy


def test_a_run_that_was_moved_to_another_disk_and_linked_is_no_garbage(place: Place, tmp_path: Path) -> None:
    runs, state = place.root / "runs", place.root / "state"
    assert garbage(runs, state, -1).stages == ()
    elsewhere = (runs / "digits").rename(tmp_path / "another disk")
    (runs / "digits").symlink_to(elsewhere)
    found = garbage(runs, state, -1)
    assert found.stages == ()
    assert f"stays as it is: {runs / 'digits'} is a link" in found.cache
    elsewhere.rename(tmp_path / "not mounted")
    with pytest.raises(StoreError, match=r"runs/digits is a link that points nowhere.*mount"):
        garbage(runs, state, -1)
    (runs / "digits").unlink()
    assert garbage(runs, state, -1).stages, "what nothing names any more"


def test_results_on_a_disk_that_is_not_mounted_are_not_taken_for_none(place: Place, tmp_path: Path) -> None:
    runs, state = place.root / "runs", place.root / "state"
    elsewhere = runs.rename(tmp_path / "another disk")
    runs.symlink_to(elsewhere)
    assert garbage(runs, state, -1).stages == ()
    elsewhere.rename(tmp_path / "not mounted")
    with pytest.raises(StoreError, match=r"runs is no folder, or a link to one that is not there: mount"):
        garbage(runs, state, -1)


def test_all_results_folders_of_a_state_name_its_stages(place: Place, tmp_path: Path) -> None:
    runs, state = place.root / "runs", place.root / "state"
    others = runs.rename(place.root / "runs-dev")
    shutil.rmtree(state / "results")
    assert garbage(runs, state, -1).stages, "nobody knows of the other folder"
    note_results(state, others)
    assert garbage(runs, state, -1).stages == ()
    with_all = shutil.copytree(place.root, tmp_path / "moved")
    shutil.rmtree(place.root)
    assert garbage(with_all / "runs", with_all / "state", -1).stages == (), "they have moved together"
    shutil.rmtree(with_all / "runs-dev")
    with pytest.raises(
        StoreError, match=r"runs-dev, where runs of .*, is not there.*or, if it was deleted"
    ) as told:
        garbage(with_all / "runs", with_all / "state", -1)
    (note,) = (with_all / "state" / "results").iterdir()
    assert str(note) in str(told.value)
    note.unlink()
    assert garbage(with_all / "runs", with_all / "state", -1).stages


def test_a_run_notes_where_its_results_are(finished: Place) -> None:
    (note,) = (finished.root / "state" / "results").iterdir()
    assert str(finished.root / "runs") in note.read_text()


def test_dvcs_cache_stays_where_git_hides_a_pointer_from_it(tmp_path: Path) -> None:
    root = tmp_path / "place"
    for command in (
        ["git", "init", "--quiet", str(root)],
        [sys.executable, "-m", "dvc", "--cd", str(root), "init", "-q"],
    ):
        subprocess.run(command, check=True)
    run = root / "runs-dev" / "digits" / "guided" / "seed-0"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    versions = Versions.around(run)
    assert versions is not None
    versions.keep(run, {})
    assert "0 objects" in garbage(root / "runs", root / "state", -1).cache, "the pointer names what is there"
    (root / ".gitignore").write_text("runs-dev/\n")
    said = garbage(root / "runs", root / "state", -1)
    assert f"stays as it is: git ignores {pointer_of(run)}" in said.cache
    collect_garbage(said, root / "runs", root / "state")
    assert len([path for path in (root / ".dvc" / "cache").rglob("*") if path.is_file()]) == 2


def test_who_runs_and_who_deletes_wait_for_each_other(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.experiment.QUIET_S", 0.05)
    state, ended = place.root / "state", threading.Event()
    chosen = ["gc", "--runs", str(place.root / "runs"), "--state", str(state)]
    with Store(state).run_lock("digits/guided/seed-0"):
        assert main(chosen) == EXIT_FAILED
    assert "a run is under way" in capsys.readouterr().err
    lock = Store(state).lock("of a stage")
    with lock:
        assert main(chosen) == 0, "only runs are waited for"

    def runs() -> None:
        fscil("digits", "guided", 0, place.overrides())
        ended.set()

    thread = threading.Thread(target=runs)
    with nothing_running(state):
        thread.start()
        assert not ended.wait(3)
    thread.join()
    assert ended.is_set()


def test_whatever_a_killed_run_was_writing_is_cleared_away(place: Place) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    run, state = place.run("guided"), place.root / "state"
    (state / "datasets").mkdir(exist_ok=True)
    for path in (
        run.with_name(f"..seed-0.listing.tmp.{dead.pid}.tmp"),
        run.with_name(f".seed-0.dvc.{dead.pid}.tmp"),
        *(state / name / f".a.json.{dead.pid}.tmp" for name in ("datasets", "results", "runs")),
    ):
        path.write_text("half")
    theirs = run.with_name(f"..seed-01.listing.tmp.{os.getpid()}.tmp")
    theirs.write_text("of another run")
    fscil("digits", "guided", 0, place.overrides())
    assert leftovers(place) == [theirs]
