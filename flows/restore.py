"""`fscil restore`: bring back a kept run or a part of it.

A run is kept in DVC's cache after each epoch (tasks/versions.py). So runs/ may be deleted: a run, an epoch, a set of
images or an adapter comes back by its place or by its digest, from the cache or from DVC's remote.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from tasks.records import Digest, Frozen
from tasks.store import StoreError
from tasks.versions import Pointer, Versions, below, find, pointer_of, read_pointer

_DIGEST = re.compile(r"[0-9a-f]{32}(\.dir)?")


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
