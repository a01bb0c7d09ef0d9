"""Unpack an archive that others made: pictures come out, and nothing else happens.

Refused, whole, at the first sight of it: a name that leads out of the folder, a link of either kind, a device, a
name that stands twice, more files or bytes than were said. Owners, modes and times of the archive are not taken over.
"""

import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Self

from tasks.datasets.settings import DatasetError

CHUNK = 1 << 20
LONGEST_HEADER = 1 << 16
"""Of a tar archive's extension headers, in bytes: room for paths and attributes."""


class Member(NamedTuple):
    """A file in an archive: its name, the size that the archive says, and how to read it."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]


def unpack(
    archive: Path, target: Path, wanted: Callable[[str], bool], most_bytes: int, most_files: int
) -> int:
    """Write the wanted files of a tar (of any compression) or zip archive below ``target``.

    Args:
        archive: The file.
        target: An empty folder, or none yet; what is there after an error is not for use.
        wanted: Whether to write the file of this name; the others are checked as well.
        most_bytes: Bound on all files together, in bytes.
        most_files: Bound on their number.

    Returns:
        How many files were written.

    Raises:
        DatasetError: The archive is unsafe, too large, damaged, or no archive.
    """
    seen = written = files = 0
    try:
        for member in _members(archive):
            files, seen = files + 1, seen + member.size
            if files > most_files or seen > most_bytes:
                raise DatasetError(
                    f"{archive} unpacks to more than {most_files:,} files or {most_bytes:,} bytes; it is not the "
                    f"archive that was expected"
                )
            path = target / _safe(archive, member.name)
            if wanted(member.name):
                _write(archive, member, path)
                written += 1
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        zlib.error,
        lzma.LZMAError,
        EOFError,
    ) as error:
        raise DatasetError(f"{archive} is damaged or no archive: {error}; fetch it again") from error
    return written


def _members(archive: Path) -> Iterator[Member]:
    if zipfile.is_zipfile(archive):
        yield from _zip_members(archive)
        return
    with tarfile.open(archive, "r|*", tarinfo=_Header) as tar:
        for info in tar:
            if info.isdir():
                _safe(archive, info.name)
            elif info.isreg():
                yield Member(info.name, info.size, lambda info=info: tar.extractfile(info))  # type: ignore[misc]
            else:
                raise _unsafe(archive, info.name, "a link or a device")


_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Header(tarfile.TarInfo):
    """A header whose extension (a long name, attributes) is short: tarfile reads it into memory at one go."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError("a file with holes, which no data set needs")
        if info.type in _EXTENSIONS and info.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"an extension header of {info.size:,} bytes")
        return info


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
                raise _unsafe(archive, info.filename, "a link, a device or encrypted")
            if info.is_dir():
                _safe(archive, info.filename)
            else:
                yield Member(info.filename, info.file_size, lambda info=info: packed.open(info))  # type: ignore[misc]


def _safe(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
        raise _unsafe(archive, name, "a path that leads out of the folder")
    return path


def _unsafe(archive: Path, name: str, what: str) -> DatasetError:
    return DatasetError(f"{archive} is refused: {name!r} in it is {what}")


def _write(archive: Path, member: Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = member.open()
    assert opened is not None, "only regular files are opened"
    try:
        with opened, path.open("xb") as file:
            left = member.size
            while chunk := opened.read(CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise _unsafe(archive, member.name, "longer than it says")
                file.write(chunk)
    except FileExistsError as error:
        raise _unsafe(archive, member.name, "there twice") from error
