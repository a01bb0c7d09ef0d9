"""What a disk refuses, said so that it can be mended: which place it is about, what is wrong with it, what to do.

Libraries say it in different ways: an ``OSError`` with a number, with or without a name; a Rust library's text with
``(os error 28)``. Here they become one sentence each.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from filelock import AcquireReturnProxy, FileLock

OURS = ("flows", "tasks")
_GO_ON = "what is sealed is whole, and the same command goes on from there"
_ROOM = {
    errno.ENOSPC: f"is on a disk that is full: make space there (`fscil gc` shows what no run names); {_GO_ON}",
    errno.EDQUOT: f"is on a disk where your quota is used up: make space there; {_GO_ON}",
    errno.EFBIG: f"takes no file as large as this one: raise the limit (`ulimit -f`); {_GO_ON}",
    errno.EIO: f"is on a disk that fails (input/output error): look at the disk, or bring a copy; {_GO_ON}",
}
_REFUSED = {
    errno.EROFS: "is read-only: make it writable or name another folder",
    errno.EACCES: "may not be used by you: see who owns it and with which mode, or name another folder",
    errno.EPERM: "may not be changed by you: see who owns it and with which mode, or name another folder",
}
_NO_FOLDER = {errno.ENOTDIR, errno.EEXIST}


class DiskError(OSError):
    """A place that cannot be written or read; the message names it and the remedy."""


def sentence_of(error: Exception, folder: Path | None = None) -> str | None:
    """What to do about an error, if it is a disk's.

    Args:
        error: any.
        folder: what was written to, for errors that name nothing.

    Returns:
        One sentence; None where it is no disk's error, or where nobody knows which folder it is about.
    """
    number = _number(error)
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    named = Path(name) if isinstance(name, str) else None
    if number in _ROOM and (place := named.parent if named else folder) is not None:
        return f"{place} {_ROOM[number]}"
    if number in _REFUSED and (place := _there(named) if named else folder) is not None:
        return f"{place} {_REFUSED[number]}"
    if number in _NO_FOLDER and named is not None:
        file = next((p for p in (named, *named.parents) if p.is_file()), None)
        return (
            None
            if file is None
            else f"{file} is a file where a folder should be: move it or name another folder"
        )
    return None


class Lock(FileLock):
    """A file lock; where the disk refuses its file or folder, a :class:`DiskError` says what to do."""

    def acquire(self, *args: Any, **kwargs: Any) -> AcquireReturnProxy[Self]:
        """As filelock does.

        Raises:
            DiskError: the disk is full, fails or is read-only.
        """
        with writing(Path(self.lock_file).parent):
            return super().acquire(*args, **kwargs)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Let the disk's errors of a block that writes to a folder say what to do.

    Raises:
        DiskError: the disk is full, fails or is read-only, or a file is where a folder should be.
    """
    try:
        yield
    except Exception as error:  # a library in Rust raises its own
        if (said := sentence_of(error, folder)) is None:
            raise
        raise DiskError(said) from error


def _there(path: Path) -> Path:
    """A path, or the nearest folder of it that exists: what cannot be made has no owner and no mode."""
    return next((p for p in (path, *path.absolute().parents) if os.path.lexists(p)), path)


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if type(error).__module__.partition(".")[0] in OURS:
        return None  # what a provider says may be quoted in it
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
