"""Of runs that share a folder of answers one asks each question, and pays for it; the others wait for what it is told."""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

log = logging.getLogger("fscil.vlm")

POLL_S = 0.1


def ask_once(
    folder: Path,
    keys: Sequence[str],
    known: Callable[[str], bool],
    ask: Callable[[Sequence[str], Callable[[str], None]], None],
) -> None:
    """Have each question answered, by this process or by another one that is asking it now.

    Args:
        folder: where processes that may ask the same keep their answers.
        keys: hexadecimal digests of the questions, each once.
        known: whether a question's answer is in the folder; called again after another process has asked it.
        ask: asks some, and calls what it is given with the key of each answer that it has kept.

    Raises:
        Exception: what ``ask`` raises; what was claimed is then free for others.
    """
    waiting = list(keys)
    with Claims(folder) as claims:
        while waiting:
            mine = [key for key in waiting if claims.take(key)]
            if missing := [key for key in mine if not known(key)]:
                ask(missing, claims.free)
            for key in mine:
                claims.free(key)
            others, waiting = [key for key in waiting if key not in set(mine)], []
            if others:
                log.warning("waiting for %d answers that another run has asked for", len(others))
            for key in others:
                claims.wait(key)
                if not known(key):  # who asked has failed
                    waiting.append(key)


class Claims:
    """Locks on the bytes of one file, one for each question. The kernel frees those of a process that ends.

    They hold between processes, not between the threads of one.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: made if need be; ``.asking`` in it is the file, which stays empty."""
        self._folder = folder

    def __enter__(self) -> Self:
        """Open the file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._folder / ".asking", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        """Close it, which frees all."""
        os.close(self._file)

    def take(self, key: str) -> bool:
        """Claim a question; whether no other process has. Where files cannot be locked, nobody has."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(key))
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        return True

    def free(self, key: str) -> None:
        """Give a question back, answered or not."""
        with suppress(OSError):  # where files cannot be locked there is nothing to give back
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _place(key))

    def wait(self, key: str) -> None:
        """Return once no other process has claimed it."""
        while not self.take(key):
            time.sleep(POLL_S)
        self.free(key)


def _place(key: str) -> int:
    return int(key[:15], 16)
