"""Versions: each run's folder kept by content in DVC's cache, and named by a pointer file beside it.

    runs/<dataset>/<method>/seed-<n>/       results, hard-linked from the state
    runs/<dataset>/<method>/seed-<n>.dvc    the pointer: DVC's digest of the folder, and who made it (``meta``)
    .dvc/cache/files/md5/..                 every file once, whichever run or epoch it belongs to, read-only

A pointer is what ``dvc add`` would have written: git keeps it, ``dvc push`` and ``dvc pull`` carry what it names. It
is written after each sealed epoch by the run itself, however the run was started. Objects have their content's
name and are links to files that are whole already, or copies that are given it when they are. A lock of the repository
keeps who deletes what no pointer names away from objects that have no pointer yet. DVC itself is imported only to find
its cache and to reach a remote.
"""

import configparser
import json
import logging
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from tasks.disk import Lock, writing
from tasks.records import Digest, Frozen
from tasks.store import StoreError, digest_of, directory_object, link, write_atomic

if TYPE_CHECKING:
    from dvc.repo import Repo

log = logging.getLogger("fscil.versions")

POINTER = ".dvc"
_READ_ONLY = 0o444  # the mode by which DVC knows that an object was not changed

_Stamp: TypeAlias = tuple[int, int, int]


class Entry(Frozen):
    """One file of a kept folder: its content's id, and its path in the folder."""

    md5: Digest
    relpath: str


class Pointer(Frozen):
    """What a pointer file says: the folder it stands beside, the folder's digest, and who made it."""

    folder: Path
    digest: Digest
    meta: Mapping[str, Any]


class Versions:
    """DVC's cache of the repository that a results folder lies in."""

    def __init__(self, repository: Path) -> None:
        """Args: repository: a folder with ``.dvc`` in it."""
        self.repository = repository
        self._known: dict[Path, tuple[_Stamp, Digest]] = {}
        self._left_out: set[Path] = set()

    @classmethod
    def around(cls, folder: Path) -> "Versions | None":
        """Those of the nearest repository that a folder lies in; None outside of any."""
        here = folder.resolve()
        return next((cls(parent) for parent in (here, *here.parents) if (parent / ".dvc").is_dir()), None)

    # -------------------------------------------------------------------------------------- keeping

    def keep(self, folder: Path, meta: Mapping[str, object]) -> Digest:
        """Keep a run's folder as it is now and point to it; what is kept already is not read again.

        A link that leads out of the folder, or to a folder, is left out with a warning: what it points to is somebody
        else's, or kept already.

        Args:
            folder: the run's folder.
            meta: who made the run; written into the pointer, no part of the digest. Who only found it stays out.

        Raises:
            StoreError: the folder is empty, or something else has its pointer's name.
            DiskError: the cache's disk is full, fails or is read-only; the run's folder is whole.
        """
        known = {file: self._digested(file) for file in self._own(folder)}
        entries = [
            Entry(md5=digest, relpath=file.relative_to(folder).as_posix())
            for file, (_, digest) in known.items()
        ]
        if not entries:
            raise StoreError(f"{folder} is empty: there is nothing to keep")
        digest, text = directory_object([entry.model_dump() for entry in entries])
        new = [(file, stamped[1]) for file, stamped in known.items() if self._known.get(file) != stamped]
        with writing(self._cache):
            for file, md5 in new:
                self._put(file, md5)
        with self.alone():
            with writing(self._cache):
                for file, md5 in new:
                    if not self._object(md5).exists():  # somebody has deleted what had no pointer yet
                        self._put(file, md5)
            if not self._is_whole(digest):
                listing = folder.with_name(f".{folder.name}.listing.tmp")  # where only this run writes
                write_atomic(listing, text)
                with writing(self._cache):
                    self._put(listing, digest)
                listing.unlink()
            pointer = pointer_of(folder)
            if not pointer.is_file() or read_pointer(pointer).digest != digest:
                size = sum(stamp[1] for stamp, _ in known.values())
                out = {
                    "md5": digest,
                    "size": size,
                    "nfiles": len(entries),
                    "hash": "md5",
                    "path": folder.name,
                }
                said = yaml.safe_dump(
                    {"outs": [out], "meta": dict(meta)}, sort_keys=False, allow_unicode=True
                )
                write_atomic(pointer, said)
        self._known = known
        return digest

    def alone(self) -> Lock:
        """The lock under which objects get their pointer, and those that have none are deleted."""
        return Lock(self.repository / ".dvc" / "tmp" / "fscil.lock")

    @property
    def has_commits(self) -> bool:
        """Whether DVC sees the commits of a git repository around."""
        config = configparser.ConfigParser(interpolation=None)
        with suppress(configparser.Error):  # which DVC itself will complain of
            config.read([self.repository / ".dvc" / "config", self.repository / ".dvc" / "config.local"])
        without = config.getboolean("core", "no_scm", fallback=False)
        return not without and any(
            (place / ".git").exists() for place in (self.repository, *self.repository.parents)
        )

    def pointer_to(self, objects: Iterable[Path]) -> Pointer | None:
        """A pointer of this checkout that names one of some objects of the cache."""
        named = {os.path.realpath(path) for path in objects}
        return next((p for p in self.pointers() if os.path.realpath(self._object(p.digest)) in named), None)

    def copy_in(self, folder: Path) -> bool:
        """Let the cache have a folder that its pointer names as it is, as copies, so that it may be changed later.

        Returns:
            Whether the pointer names the folder as it is now; another one is left to `dvc add`.
        """
        if not pointer_of(folder).is_file():
            return False
        digest = read_pointer(pointer_of(folder)).digest
        if not self._object(digest).is_file():
            if digest_of(folder) != digest:
                return False
            command = [sys.executable, "-m", "dvc", "commit", "--quiet", "--force", str(pointer_of(folder))]
            done = subprocess.run(command, cwd=self.repository, capture_output=True, text=True, check=False)
            if done.returncode:
                raise StoreError(f"`dvc commit {pointer_of(folder)}` failed: {done.stderr.strip()}")
        return True

    def _own(self, folder: Path) -> Iterator[Path]:
        """The folder's visible files; `dvc checkout` may have made them links to the cache."""
        homes = (_real(folder), _real(self._cache))
        for path in _visible(folder):
            if path.is_file() and (
                not path.is_symlink() or any(_real(path).is_relative_to(home) for home in homes)
            ):
                yield path
            elif path.is_symlink() and path not in self._left_out:
                log.warning(
                    "%s is a link that leads out of the run's folder, to a folder or to nothing; it is not kept, "
                    "and DVC will find the folder changed for as long as it is there",
                    path,
                )
                self._left_out.add(path)

    def _digested(self, file: Path) -> tuple[_Stamp, Digest]:
        """What a file holds, read again if it may have changed since it was put into the cache."""
        status = file.stat()
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._known.get(file)
        return known if known is not None and known[0] == stamp else (stamp, digest_of(file))

    def _put(self, file: Path, digest: Digest) -> None:
        """Make a file an object, by a second name at once, so that a kill leaves a whole object or none."""
        target = self._object(digest)
        if target.exists() and (target.samefile(file) or self._is_whole(digest)):
            return
        target.unlink(missing_ok=True)  # cut short by a copy that never ended, or damaged
        link(file, target)
        with suppress(PermissionError):  # somebody else's file, in a state that is shared
            target.chmod(_READ_ONLY)

    def _is_whole(self, digest: Digest) -> bool:
        path = self._object(digest)
        return path.is_file() and digest_of(path) == digest.removesuffix(".dir")

    def _object(self, digest: Digest) -> Path:
        return self._cache / digest[:2] / digest[2:]

    @property
    def _cache(self) -> Path:
        return _cache_of(self.repository)

    # -------------------------------------------------------------------------------------- bringing back

    def pointers(self) -> Iterator[Pointer]:
        """Those of all runs that this checkout knows."""
        paths = sorted(self.repository.glob(f"**/seed-*{POINTER}"))
        return (read_pointer(path) for path in paths if ".dvc" not in path.parts[:-1])

    def entries(self, digest: Digest) -> list[Entry]:
        """The files of a kept folder, brought from the remote if need be.

        Raises:
            StoreError: neither the cache nor a remote has it, or the cache's is damaged.
        """
        self.bring([digest])
        if not self._is_whole(digest):
            raise _damaged(self._object(digest))
        return [Entry.model_validate(entry) for entry in json.loads(self._object(digest).read_text("utf-8"))]

    def bring(self, digests: Iterable[Digest]) -> None:
        """Let the cache have objects; those that it lacks come from the default remote.

        Raises:
            StoreError: there is no remote, or it lacks one of them.
        """
        missing = sorted({digest for digest in digests if not self._object(digest).is_file()})
        if not missing:
            return
        from dvc.config import NoRemoteError
        from dvc_data.hashfile.hash_info import HashInfo

        some = f"{missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}"
        try:
            with _opened(self.repository) as repo:
                repo.cloud.pull([HashInfo("md5", digest) for digest in missing])
        except NoRemoteError as error:
            raise StoreError(
                f"{some} is not in DVC's cache and there is no remote to bring it from; "
                "name one with: dvc remote add -d <name> <address>"
            ) from error
        if still := [digest for digest in missing if not self._object(digest).is_file()]:
            raise StoreError(
                f"{some}: neither DVC's cache nor its default remote has {len(still)} of {len(missing)} objects; "
                "run `dvc push` where the run was made"
            )

    def restore(self, entries: Iterable[Entry], folder: Path, root: Path | None = None) -> int:
        """Put kept files into a folder, as links to the cache; files that are there and equal stay.

        Args:
            entries: what to put there.
            folder: where their paths begin.
            root: the folder that nothing is written outside of, whatever links are in it; None: ``folder``.

        Returns:
            How many were put there.

        Raises:
            StoreError: an object is damaged or missing, another file is in the way, or a link leads out.
        """
        listed = list(entries)
        self.bring(entry.md5 for entry in listed)
        missing = []
        for entry in listed:
            target = folder / _inside(entry.relpath)
            _refuse_way_out(target, root or folder)
            if not target.exists():
                missing.append((entry, target))
            elif digest_of(target) != entry.md5:
                raise StoreError(f"{target} is in the way with other content; move it and restore again")
        for entry, target in missing:
            kept = self._object(entry.md5)
            if not self._is_whole(entry.md5):
                raise _damaged(kept)
            with writing(folder):
                link(kept, target)
        return len(missing)


class RunVersions:
    """Keeps one run each time it is told to; outside of a DVC repository it does nothing."""

    def __init__(self, folder: Path, meta: Mapping[str, object]) -> None:
        """Args: folder: the run's results. meta: who makes the run, for the pointer."""
        self._versions, self._folder, self._meta = Versions.around(folder.parent), folder, meta

    def keep(self) -> Digest | None:
        """Keep the folder as it is now; its digest, or None outside of a repository."""
        return self._versions.keep(self._folder, self._meta) if self._versions else None


def below(entries: Iterable[Entry], folder: str) -> list[Entry]:
    """Those of a part of a kept folder, with paths relative to it; ``""`` is the whole."""
    prefix = f"{folder}/" if folder else ""
    return [
        Entry(md5=entry.md5, relpath=entry.relpath.removeprefix(prefix))
        for entry in entries
        if entry.relpath.startswith(prefix)
    ]


def find(entries: Iterable[Entry], digest: Digest) -> str | None:
    """Where in a kept folder a file or folder of this content is; None if nowhere."""
    folders: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.md5 == digest:
            return entry.relpath
        for parent in PurePosixPath(entry.relpath).parents[:-1]:
            folders[parent.as_posix()].append(entry)
    for folder, members in folders.items():
        if directory_object([entry.model_dump() for entry in below(members, folder)])[0] == digest:
            return folder
    return None


def pointer_of(folder: Path) -> Path:
    """The pointer file beside a run's folder."""
    return folder.with_name(folder.name + POINTER)


def read_pointer(path: Path) -> Pointer:
    """Read a pointer file.

    Raises:
        StoreError: it is not one.
    """
    try:
        said = yaml.safe_load(path.read_text("utf-8"))
        (out,) = said["outs"]
        if out["path"] in (".", ".."):
            raise ValueError(f"its folder is {out['path']}")
        return Pointer(
            folder=path.with_name(out["path"]), digest=Digest(out["md5"]), meta=said.get("meta") or {}
        )
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{path} is no pointer of DVC to one folder ({error}); bring it back with git, or delete it: "
            "its run writes it anew"
        ) from error


def _damaged(kept: Path) -> StoreError:
    return StoreError(
        f"DVC's cache is damaged: {kept} holds {digest_of(kept)}; delete that file and restore again from a remote, "
        "or give the run's own command, which puts it there anew"
    )


def _visible(folder: Path) -> Iterator[Path]:
    """All there is, but for what is being written."""
    for path in sorted(folder.rglob("*")):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _inside(relpath: str) -> PurePosixPath:
    path = PurePosixPath(relpath)
    if path.is_absolute() or ".." in path.parts:
        raise StoreError(f"a kept folder names {relpath!r}, which lies outside of it")
    return path


def _refuse_way_out(target: Path, root: Path) -> None:
    """See that a link lets no file be written outside of a folder; a file that is there is not written."""
    place = target.parent if target.exists() else target
    if not _real(place).is_relative_to(_real(root)):
        link = next((path for path in (place, *place.parents) if path.is_symlink()), place)
        raise StoreError(f"{link} is a link that leads out of {root}; move it and restore again")


def _real(path: Path) -> Path:
    """A path without links; one that links to itself stays, where ``resolve`` ends with an error."""
    return Path(os.path.realpath(path))


@lru_cache(maxsize=8)
def _cache_of(repository: Path) -> Path:
    with _opened(repository) as repo:
        return Path(repo.cache.local.path)


def _opened(repository: Path) -> "Repo":
    from dvc.repo import Repo

    return Repo(str(repository))
