"""How far a long stage is: a bar in the terminal, and whoever else watches.

A stage says where it stands as often as it likes; a watcher that is slow, such as a server, limits itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm import tqdm

Told = Callable[[str, int, int], None]
"""Told the phase of the stage, maybe "", how many of its items are done, and of how many; from any thread."""

Watcher = Callable[[str, str], Told]
"""Asked once a stage, by its name and its place such as "session 1 epoch 0"."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Stages of this block tell the watcher too."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def stage_bar(stage: str, place: str, unit: str, total: int | None = None) -> Iterator[Told]:
    """A bar for one stage, shown where the terminal is one.

    Args:
        stage: what it does, such as ``drawing``.
        place: whose, such as ``session 1 epoch 0``.
        unit: what is counted, such as ``image``.
        total: how many there will be, if that is known.

    Yields:
        What to tell the phase, how many are done and of how many.
    """
    watcher = _watcher.get()
    told = watcher(stage, place) if watcher is not None else None
    with tqdm(total=total, desc=f"{place}: {stage}", unit=unit, disable=None, leave=False) as bar:

        def at(phase: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(phase, refresh=False)
            bar.update(done - bar.n)
            if told is not None:
                told(phase, done, total)

        yield at
