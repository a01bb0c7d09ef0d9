"""`fscil gc` deletes what no results name: it knows all results folders of a state, or deletes nothing."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
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
    """A copy of a finished run, outside of any DVC repository."""
    copy = Place(tmp_path / "place")
    for name in ("state", "runs"):
        shutil.copytree(finished.root / name, copy.root / name)
    shutil.rmtree(copy.root / "state" / "results")  # they name the original's
    return copy


def in_git(top: Path, root: Path) -> Callable[..., None]:
    """Make a git repository, and one of DVC in it or in a part of it; what calls git there."""

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *arguments], cwd=top, check=True)

    git("init", "--quiet")
    part = [] if root == top else ["--subdir"]
    subprocess.run([sys.executable, "-m", "dvc", "--cd", str(root), "init", "-q", *part], check=True)
    return git


def test_a_run_that_was_moved_to_another_disk_and_linked_is_no_garbage(place: Place, tmp_path: Path) -> None:
    made(place.root)
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


def test_checkouts_that_share_a_state_through_links_have_a_note_each(place: Place, tmp_path: Path) -> None:
    shared = (place.root / "state").rename(tmp_path / "shared")
    checkouts = [tmp_path / name for name in ("a", "b", "place")]
    for checkout in checkouts:
        checkout.mkdir(exist_ok=True)
        (checkout / "state").symlink_to(shared)
    for checkout in checkouts[1:]:
        (checkout / "runs").mkdir(exist_ok=True)
        (checkout / "runs" / "README").touch()
        note_results(checkout / "state", checkout / "runs")
    for checkout in checkouts:
        assert garbage(checkout / "runs", checkout / "state", -1).stages == ()
    assert garbage(tmp_path / "none", shared, -1).stages == (), "by its own name too"


def test_where_a_disk_is_to_be_mounted_there_are_no_results(place: Place) -> None:
    runs, state = place.root / "runs", place.root / "state"
    note_results(state, runs)
    runs.rename(place.root / "on another disk")
    runs.mkdir()
    with pytest.raises(StoreError, match=r"runs, where runs of .*, is not there or empty.*mount its disk"):
        garbage(runs, state, -1)


def test_a_run_notes_where_its_results_are(finished: Place) -> None:
    (note,) = (finished.root / "state" / "results").iterdir()
    assert str(finished.root / "runs") in note.read_text()


def kept_in(runs: Path) -> tuple[Versions, Path]:
    """A run's folder of one file, kept once, and what keeps it."""
    run = runs / "digits" / "guided" / "seed-0"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    versions = Versions.around(run)
    assert versions is not None
    versions.keep(run, {})
    return versions, run


@pytest.mark.parametrize(("tracked", "subfolder"), [(False, False), (True, True)])
def test_dvcs_cache_stays_where_git_hides_a_pointer_from_it(
    tracked: bool, subfolder: bool, tmp_path: Path
) -> None:
    top = tmp_path / "place"
    root = top / "project" if subfolder else top
    root.mkdir(parents=True)
    git = in_git(top, root)
    versions, run = kept_in(root / "runs-dev")
    assert "0 objects" in garbage(root / "runs", root / "state", -1).cache, "the pointer names what is there"
    (root / ".gitignore").write_text("runs-dev/\n")
    said = garbage(root / "runs", root / "state", -1)
    assert f"stays as it is: DVC does not see {pointer_of(run)}" in said.cache
    if tracked:
        git("add", "-f", str(pointer_of(run)))
        git("commit", "-q", "-m", "kept")
        (run / "config.json").write_text("another")
        versions.keep(run, {})
        said = garbage(root / "runs", root / "state", -1)
        assert f"stays as it is: DVC does not see {pointer_of(run)}" in said.cache
    collect_garbage(said, root / "runs", root / "state")
    assert len([path for path in (root / ".dvc" / "cache").rglob("*") if path.is_file()]) == 2 * (1 + tracked)


def test_what_another_commit_names_stays_in_a_project_that_is_a_part_of_a_repository(tmp_path: Path) -> None:
    root = tmp_path / "place" / "project"
    root.mkdir(parents=True)
    git = in_git(tmp_path / "place", root)
    _, run = kept_in(root / "runs")
    git("add", "-f", str(pointer_of(run)))
    git("commit", "-q", "-m", "kept")
    pointer_of(run).unlink()
    assert "0 objects" in garbage(root / "runs", root / "state", -1).cache
    git("commit", "-q", "-a", "--amend", "-m", "nothing")
    assert "2 objects" in garbage(root / "runs", root / "state", -1).cache


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
    for name in ("datasets", "results"):
        (state / name).mkdir(exist_ok=True)
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
