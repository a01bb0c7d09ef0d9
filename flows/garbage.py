"""`fscil gc`: show, and then delete, what nothing names any more.

A sealed stage is named by a record in a results folder. A state may serve several (`runtime.runs`), so each run notes
where its results are; a results folder that is not there stops everything, as what it named is not known.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from filelock import Timeout

from flows.lineage import read_record
from tasks.disk import Lock
from tasks.records import AugmentationSet, EpochRecord, Frozen, SessionRecord, StageRecord
from tasks.store import Store, StoreError, remove, write_json
from tasks.tracked import STAGES
from tasks.versions import Versions, pointer_of

_DAY_S = 86_400
_ALWAYS_KEPT = "split"  # the benchmark's sessions, which all runs of a dataset share


class Garbage(Frozen):
    """What could go: sealed stages that no run's results name, and what DVC says of its cache."""

    stages: tuple[Path, ...]
    stage_bytes: int
    cache: str

    def lines(self) -> list[str]:
        """In words."""
        named = [f"  {path}" for path in self.stages]
        size = f"{self.stage_bytes / 2**20:,.1f} MiB"
        return [
            *named,
            f"{len(self.stages)} sealed stages or leftovers that no run names, {size}",
            self.cache,
        ]


class ResultsNote(Frozen):
    """Where a run of a state has its results: as the machine calls it, and seen from the state, as both may move."""

    absolute: str
    relative: str

    def found(self, state: Path) -> list[Path]:
        """The folders that the two names lead to; an empty one is a place where a disk is not mounted."""
        places = (Path(os.path.normpath(state.absolute() / self.relative)), Path(self.absolute))
        return [place for place in places if place.is_dir() and any(place.iterdir())]


def note_results(state: Path, runs: Path) -> None:
    """Note that a results folder names stages of a state.

    Raises:
        DiskError: the disk is full, fails or is read-only.
    """
    absolute = os.path.abspath(runs)
    note = ResultsNote(absolute=absolute, relative=os.path.relpath(absolute, os.path.abspath(state)))
    path = state / "results" / f"{sha256(note.model_dump_json().encode()).hexdigest()[:32]}.json"
    if not path.is_file():
        write_json(path, note)


@contextmanager
def nothing_running(state: Path) -> Iterator[None]:
    """See that no run of a state is under way, and let those that start wait until the block has ended.

    Raises:
        StoreError: one is, whose stages are not named yet.
    """
    if not (state / "locks").is_dir():
        yield  # nothing has ever run
        return
    store = Store(state)
    with store.gc_lock():
        for path in store.run_locks():
            lock = Lock(path, timeout=0)
            try:
                lock.acquire()
            except Timeout as error:
                raise StoreError(
                    f"a run is under way in {state}; `fscil gc` waits until it has ended: run it again then"
                ) from error
            lock.release()
        yield


def garbage(runs: Path, state: Path, days: float) -> Garbage:
    """What nothing names any more and was last written more than some days ago; call within :func:`nothing_running`.

    Raises:
        StoreError: a results folder is not there, or a link in one points nowhere, so what it names is not known.
        ValueError: a record is damaged, so what it names is not known.
    """
    places = _places(runs, state)
    stages = tuple(_unnamed(places, state, days))
    held = sum(_freed(folder) for folder in stages)
    return Garbage(stages=stages, stage_bytes=held, cache=_dvc_gc(runs, places, dry=True))


def collect_garbage(found: Garbage, runs: Path, state: Path) -> None:
    """Delete what was shown: the stages, and from DVC's cache what neither this checkout nor any commit names.

    Call within the same :func:`nothing_running`.
    """
    for folder in found.stages:
        remove(folder)
    _dvc_gc(runs, _places(runs, state), dry=False)


def _places(runs: Path, state: Path) -> list[Path]:
    """The results folders whose records name stages: the one given and those that runs have noted."""
    if os.path.lexists(runs) and not runs.is_dir():
        raise StoreError(
            f"{runs} is no folder, or a link to one that is not there: mount its disk, or name it with --runs"
        )
    places = {os.path.realpath(runs): runs} if runs.is_dir() else {}
    for path in sorted((state / "results").glob("*.json")):
        note = read_record(path, ResultsNote)
        if not (found := note.found(state)):
            raise StoreError(
                f"{note.absolute}, where runs of {state} have their results, is not there or empty, so what they name is "
                f"not known and nothing can be deleted: mount its disk, or, if it was deleted for good, delete {path} too"
            )
        places |= {os.path.realpath(place): place for place in found}
    return list(places.values())


def _unnamed(places: list[Path], state: Path, days: float) -> Iterator[Path]:
    named, now = {_folder_of(record) for runs in places for record in _stages_of(runs)}, time.time()
    for folder in sorted((state / "stages").glob("*/*")):
        old = now - folder.stat().st_mtime > days * _DAY_S
        if folder.parent.name != _ALWAYS_KEPT and f"{folder.parent.name}/{folder.name}" not in named and old:
            yield folder


def _stages_of(runs: Path) -> Iterator[StageRecord]:
    found: list[StageRecord | None] = []
    for folder in _folders(runs):
        path, inside = folder / "record.json", folder.parent.name.startswith("session-")
        if not path.is_file():
            continue
        if folder.name.startswith("session-"):
            session = read_record(path, SessionRecord)
            found += [session.initial, session.test]
        elif inside and folder.name.startswith("epoch-"):
            epoch = read_record(path, EpochRecord)
            found += [getattr(epoch, stage) for stage in STAGES]
        elif inside and folder.name == "initial":
            found.append(read_record(path, StageRecord[AugmentationSet]))
    return (record for record in found if record is not None)


def _folders(runs: Path) -> Iterator[Path]:
    """All folders below one, through links too: runs may have been moved to another disk.

    Raises:
        StoreError: a link points nowhere, as where that disk is not mounted, so what it named is not known.
        OSError: a folder may not be read.
    """
    seen = set()
    for name, inner, files in os.walk(runs, followlinks=True, onerror=_refuse):
        folder, real = Path(name), os.path.realpath(name)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        for path in (folder / file for file in files):
            if path.is_symlink() and not path.exists():
                raise StoreError(
                    f"{path} is a link that points nowhere, so what it named is not known and nothing can be deleted: "
                    "mount what it points to, or remove it"
                )
        yield folder


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed may name anything."""
    raise error


def _folder_of(record: StageRecord) -> str:
    return f"{record.stage}/{record.fingerprint}"


def _freed(folder: Path) -> int:
    """Bytes that deleting a folder frees: files with other names elsewhere stay."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)


def _dvc_gc(runs: Path, places: list[Path], *, dry: bool) -> str:
    versions = Versions.around(runs)
    if versions is None:
        return "no DVC repository around, so no cache"
    if link := next((folder for place in places for folder in _folders(place) if folder.is_symlink()), None):
        return f"DVC's cache stays as it is: {link} is a link, and what lies behind it DVC would take for unnamed"
    with versions.alone():
        going = _going(versions, "--dry")
        if (unseen := versions.pointer_to(going)) is not None:
            return (
                f"DVC's cache stays as it is: DVC does not see {pointer_of(unseen.folder)}, which git or .dvcignore hides "
                "from it, and would take what it names for unnamed"
            )
        held = sum(path.stat().st_size for path in going if path.is_file())
        if not dry:
            _going(versions)
    return f"{len(going)} objects of DVC's cache that no pointer, commit or experiment names, {held / 2**20:,.1f} MiB"


def _going(versions: Versions, *options: str) -> list[Path]:
    """What `dvc gc` removes, or would."""
    if versions.has_commits:
        options = ("--all-commits", "--all-experiments", *options)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "gc", "--workspace", "--force", *options],
        cwd=versions.repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise StoreError(f"`dvc gc` failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    lines = done.stdout.splitlines()
    return [Path(line.removeprefix("Removing ")) for line in lines if line.startswith("Removing ")]
