"""Where an error arose: each level that it passes notes its name, so that the sentence for the user can open with them.

The error stays what it is, of its own kind and with its own message; a traceback shows the notes below it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_MARK = "in "


@contextmanager
def inside(place: str) -> Iterator[None]:
    """Errors that leave the block note that they come from ``place``, such as ``session 1``."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{_MARK}{place}")
        raise


def with_place(error: BaseException) -> str:
    """The error's message after where it arose, the outermost place first: ``session 1, epoch 0, evaluate: ...``."""
    notes = [note.removeprefix(_MARK) for note in getattr(error, "__notes__", ()) if note.startswith(_MARK)]
    return f"{', '.join(reversed(notes))}: {error}" if notes else str(error)
