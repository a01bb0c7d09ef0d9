"""Fetch a file from an address or from disk: with progress, resumed where it broke off, never believed unchecked.

What arrives is written to ``<target>.part``; after a break the next call asks for the rest alone (HTTP Range). The
part takes its name when it is complete and its digest is right. Nothing is tried twice: the message says to run again.
"""

import hashlib
import http.client
import re
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from tasks.datasets.settings import DatasetError

CHUNK = 1 << 20
TIMEOUT = 60
"""Seconds without a byte after which a transfer counts as broken off."""


def fetch(address: str, target: Path, most: int, digest: tuple[str, str] | None) -> Path:
    """Get a file.

    Args:
        address: ``http(s)://`` or ``file://``, or a path.
        target: Where a download goes; a file on disk stays where it is.
        most: Bound on its size in bytes.
        digest: Name of the algorithm (``md5``, ``sha256``) and hexadecimal digits; None where nothing is known.

    Returns:
        ``target``, or the file on disk.

    Raises:
        DatasetError: It is not there, broke off, is too large, or is another file than the digest's.
    """
    if (local := local_path(address)) is not None:
        if not local.is_file():
            raise DatasetError(f"no file {local}; give the address or the path of one")
        _refuse_other(local, digest, "it was left as it is: give another file")
        return local
    if target.is_file() and (digest is None or digest_is(target, digest)):
        return target
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    _download(address, part, most)
    try:
        _refuse_other(part, digest, "it was removed: run again, or give another address")
    except DatasetError:
        part.unlink()
        raise
    return part.replace(target)


def local_path(address: str) -> Path | None:
    """The path that an address names, where it names one on disk.

    Raises:
        DatasetError: A scheme other than http, https and file, a name or password before the host, or no port's number.
    """
    try:
        parts = urlsplit(address)
        name, host, _ = parts.username, parts.hostname, parts.port
    except ValueError as error:
        raise DatasetError("the address given cannot be read: its host or port is none") from error
    if parts.scheme in ("http", "https"):
        if name is not None or not host:
            raise DatasetError(
                f"an address of {parts.scheme}:// is host and path, without a name or password: fetch what needs one in "
                "another way, and give the path of the file"
            )
        return None
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if "://" in address:
        raise DatasetError(
            f"{parts.scheme}:// addresses are not fetched; give http(s)://, file:// or a path on disk"
        )
    return Path(address).expanduser()


def file_digest(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file, which may be large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def digest_is(path: Path, digest: tuple[str, str]) -> bool:
    """Whether a file has this digest, given as algorithm and hexadecimal digits."""
    return file_digest(path, digest[0]) == digest[1].lower()


def _refuse_other(path: Path, digest: tuple[str, str] | None, remedy: str) -> None:
    if digest is not None and not digest_is(path, digest):
        raise DatasetError(
            f"{path.name} is not the file that was asked for: its {digest[0]} is {file_digest(path, digest[0])}, not "
            f"{digest[1]}; {remedy}"
        )


# ---------------------------------------------------------------------------------------- HTTP


def _download(address: str, part: Path, most: int) -> None:
    """Bring ``part`` to its full length."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(address, headers={"User-Agent": "fscil-augment"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        with urlopen(request, timeout=TIMEOUT) as reply:
            start, total = _extent(reply, part, have)
            _append(reply, part, start, total, most, shown(address))
    except HTTPError as error:
        if error.code == 416 and have and error.headers.get("Content-Range") == f"bytes */{have}":
            return  # the part is the whole
        if error.code == 416:
            part.unlink(missing_ok=True)
        raise _broken(address, part, f"HTTP {error.code} {error.reason}") from error
    except (URLError, http.client.HTTPException, OSError) as error:
        raise _broken(address, part, str(getattr(error, "reason", error)) or type(error).__name__) from error
    if total is not None and part.stat().st_size != total:
        raise _broken(address, part, f"it broke off at {part.stat().st_size:,} of {total:,} bytes")


def _extent(reply: http.client.HTTPResponse, part: Path, have: int) -> tuple[int, int | None]:
    """Where the reply's bytes begin, and how long the whole is, if the server says so."""
    if reply.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
        if span is not None and int(span[1]) == have:
            return have, None if span[2] == "*" else int(span[2])
        part.unlink()
        raise http.client.HTTPException("the server sent another part than the one asked for")
    length = reply.headers.get("Content-Length")
    return 0, int(length) if length is not None and length.isdecimal() else None


def _append(reply: IO[bytes], part: Path, start: int, total: int | None, most: int, name: str) -> None:
    size = total or 0
    with (
        part.open("r+b" if start else "wb") as file,
        tqdm(
            desc=Path(name).name, total=total, initial=start, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        file.seek(start)
        while size <= most and (chunk := reply.read(CHUNK)):
            bar.update(file.write(chunk))
            size = max(size, file.tell())
    if size > most:
        part.unlink()
        raise DatasetError(
            f"{name} has at least {size:,} bytes, more than the {most:,} that it should have at most"
        )


def shown(address: str) -> str:
    """An address as it may be printed: without user, password and query."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


def _broken(address: str, part: Path, reason: str) -> DatasetError:
    have = part.stat().st_size if part.exists() else 0
    kept = f"{have:,} bytes are kept and the next run goes on from there" if have else "nothing was kept"
    return DatasetError(
        f"cannot download {shown(address)}: {reason}; {kept}. Run the command again, or fetch the file in another "
        f"way and name it with --from (an archive) or --lists (a folder of lists)"
    )
