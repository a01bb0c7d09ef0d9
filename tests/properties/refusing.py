"""Right, or refused in the project's own words: what properties of hostile input have in common."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def or_refused(kind: type[Exception] | tuple[type[Exception], ...], *words: str) -> Iterator[None]:
    """What the block does is right, or refused with an error of this kind that says one of the words."""
    said = ""
    try:
        yield
    except kind as error:
        said = str(error)
    assert not said or any(word in said for word in words), said
