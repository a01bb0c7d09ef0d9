"""`fscil restore` and `fscil gc`: bring back a kept run or a part of it; show, and then delete, what nothing names.

A run is kept in DVC's cache after each epoch (tasks/versions.py). So runs/ may be deleted: a run, an epoch, a set of
images or an adapter comes back by its place or by its digest, from the cache or from DVC's remote.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import Timeout

from flows.lineage import read_record
from tasks.disk import Lock
from tasks.records import AugmentationSet, Digest, EpochRecord, Frozen, SessionRecord, StageRecord
from tasks.store import StoreError, remove
from tasks.tracked import STAGES
from tasks.versions import Pointer, Versions, below, find, pointer_of, read_pointer

_DIGEST = re.compile(r"[0-9a-f]{32}(\.dir)?")
_DAY_S = 86_400
_ALWAYS_KEPT = "split"  # the benchmark's sessions, which all runs of a dataset share


class Restored(Frozen):
    """What a restoration did: where, how many files there are, and how many of them were put there now."""

    target: Path
    files: int
    put: int

    def sentence(self) -> str:
        """In words."""
        return f"{self.target}: {self.files} files, {self.put} restored, {self.files - self.put} were there"


def restore(what: str, runs: Path, to: Path | None = None) -> Restored:
    """Bring back a run, an epoch or any part of one.

    Args:
        what: a run (``digits/guided/seed-0``), a path in one (``runs/digits/guided/seed-0/session-01/epoch-002``),
            or the digest of a run, a folder or a file in one, as records, MLflow and DVC print it.
        runs: the results folder, whose pointers are known.
        to: another place for it; None: where it was.

    Raises:
        StoreError: no pointer names it, neither the cache nor the remote has it, or something is in the way.
    """
    versions = Versions.around(runs)
    if versions is None:
        raise StoreError(f"{runs} lies in no DVC repository, so nothing of it was kept; see `dvc init`")
    pointer, part = _by_digest(versions, what) if _DIGEST.fullmatch(what) else _by_place(what, runs)
    whole = versions.entries(pointer.digest)
    entries = below(whole, part)
    if to is None and pointer.folder.is_symlink():
        raise StoreError(
            f"{pointer.folder} is a link, and nothing is restored through one: remove it, or give --to <folder>"
        )
    target = to or pointer.folder / part
    if not entries and (entries := [entry for entry in whole if entry.relpath == part]):
        entries, target = (
            [entries[0].model_copy(update={"relpath": Path(part).name})],
            to or target.parent,
        )
    if not entries:
        raise StoreError(
            f"{pointer.folder} was kept without {part!r}; it has {_tops(e.relpath for e in whole)}"
        )
    put = versions.restore(entries, target, to or pointer.folder)
    return Restored(target=target, files=len(entries), put=put)


def bring_back(path: Path) -> bool:
    """Restore the run that a missing path lies in, if a pointer names it; whether one does.

    Raises:
        StoreError: neither the cache nor the remote has it.
    """
    for folder in (path, *list(path.parents)[:-1]):
        if folder.name and pointer_of(folder).is_file():
            restore(str(folder), folder.parent)
            return True
    return False


def _by_place(what: str, runs: Path) -> tuple[Pointer, str]:
    for place in (Path(os.path.abspath(what)), Path(os.path.abspath(runs / what))):
        for folder in (place, *list(place.parents)[:-1]):
            if pointer_of(folder).is_file():
                part = place.relative_to(folder).as_posix()
                return read_pointer(pointer_of(folder)), "" if part == "." else part
    raise StoreError(
        f"no run was kept at {what!r}: {runs} has no pointer for it; give a run such as digits/guided/seed-0, "
        "a path in one, or a digest, and `git pull` pointers that were committed elsewhere"
    )


def _by_digest(versions: Versions, digest: str) -> tuple[Pointer, str]:
    pointers = list(versions.pointers())
    for pointer in pointers:
        if pointer.digest == digest:
            return pointer, ""
    for pointer in pointers:
        if (part := find(versions.entries(pointer.digest), Digest(digest))) is not None:
            return pointer, part
    raise StoreError(f"none of {len(pointers)} kept runs has anything of digest {digest}")


def _tops(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.split("/")[0] for name in names}))


# ------------------------------------------------------------------------------------------ what nothing names


class Garbage(Frozen):
    """What could go: sealed stages that no run in runs/ names, and what DVC says of its cache."""

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


def garbage(runs: Path, state: Path, days: float) -> Garbage:
    """What nothing names any more and was last written more than some days ago.

    Raises:
        StoreError: a run is under way, whose stages are not named yet, or a link in ``runs`` points nowhere.
        ValueError: a record is damaged, so what it names is not known.
    """
    _refuse_while_running(state)
    stages = tuple(_unnamed(runs, state, days))
    held = sum(_freed(folder) for folder in stages)
    return Garbage(stages=stages, stage_bytes=held, cache=_dvc_gc(runs, dry=True))


def collect_garbage(found: Garbage, runs: Path, state: Path) -> None:
    """Delete what was shown: the stages, and from DVC's cache what neither this checkout nor any commit names.

    Raises:
        StoreError: a run was started meanwhile.
    """
    for folder in found.stages:
        _refuse_while_running(state)
        remove(folder)
    _dvc_gc(runs, dry=False)


def _refuse_while_running(state: Path) -> None:
    for path in sorted((state / "locks").glob("*.lock")):
        lock = Lock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise StoreError(
                f"a run is under way in {state}; `fscil gc` waits until it has ended: run it again then"
            ) from error
        lock.release()


def _unnamed(runs: Path, state: Path, days: float) -> Iterator[Path]:
    named, now = {_folder_of(record) for record in _stages_of(runs)}, time.time()
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
    for name, inner, files in os.walk(runs, followlinks=True, onerror=_unreadable(runs)):
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


def _unreadable(runs: Path) -> Callable[[OSError], None]:
    """What to do with a folder that cannot be listed: what it names is not known. Only the results may be missing."""

    def refuse(error: OSError) -> None:
        if runs.exists():
            raise error

    return refuse


def _linked(runs: Path) -> Path | None:
    """A link to a folder in the results, which DVC does not look through."""
    return next((folder for folder in _folders(runs) if folder.is_symlink()), None)


def _folder_of(record: StageRecord) -> str:
    return f"{record.stage}/{record.fingerprint}"


def _freed(folder: Path) -> int:
    """Bytes that deleting a folder frees: files with other names elsewhere stay."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)


def _dvc_gc(runs: Path, *, dry: bool) -> str:
    versions = Versions.around(runs)
    if versions is None:
        return "no DVC repository around, so no cache"
    if link := _linked(runs):
        return f"DVC's cache stays as it is: {link} is a link, and what lies behind it DVC would take for unnamed"
    scope = [
        "--workspace",
        *(["--all-commits", "--all-experiments"] if (versions.repository / ".git").exists() else []),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "gc", *scope, "--force", *(["--dry"] if dry else [])],
        cwd=versions.repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise StoreError(f"`dvc gc` failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    going = [
        line.removeprefix("Removing ") for line in done.stdout.splitlines() if line.startswith("Removing ")
    ]
    held = sum(Path(name).stat().st_size for name in going if Path(name).is_file())
    return f"{len(going)} objects of DVC's cache that no pointer, commit or experiment names, {held / 2**20:,.1f} MiB"
