"""The files of answers that were paid for end with a digest, by which a damaged one is known when it is read."""

import hashlib


def marked(line: str, data: bytes = b"") -> str:
    """A text of one line, and below it the digest of it and of ``data``, which is kept in another file."""
    return f"{line}\n{_digest(line, data)}\n"


def unmarked(content: bytes, data: bytes = b"") -> str:
    """The line again.

    Raises:
        ValueError: it, or the data, is not what was kept.
    """
    line, _, mark = content.decode().partition("\n")
    if mark != f"{_digest(line, data)}\n":
        raise ValueError("its digest is another one")
    return line


def _digest(line: str, data: bytes) -> str:
    return hashlib.md5(line.encode() + b"\n" + data, usedforsecurity=False).hexdigest()
