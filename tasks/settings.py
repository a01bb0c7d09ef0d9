"""Settings that a model got after records had been written with it."""

from typing import Any

from pydantic import Field


def added_later(value: object) -> Any:
    """A field that is ``value`` unless given, and then is not written.

    So what was recorded before the field was there stays valid, and has the same bytes and fingerprints.
    """
    return Field(default=value, exclude_if=lambda given: given == value)
