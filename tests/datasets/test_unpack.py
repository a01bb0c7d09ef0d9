import gzip
import io
import stat
import tarfile
import zipfile

import pytest

from tasks.datasets.settings import DatasetError
from tasks.datasets.unpack import unpack
from tests.datasets.small_worlds import tar

GOOD = {"top/a.jpg": b"aa", "top/deep/b.jpg": b"b", "top/readme": b"c"}


def run(tmp_path, content, most_bytes=1000, most_files=10):
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    return unpack(archive, tmp_path / "out", lambda name: name.endswith(".jpg"), most_bytes, most_files)


def zipped(files, mode=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            if mode is not None:
                info.external_attr = mode << 16
            packed.writestr(info, content)
    return buffer.getvalue()


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("pack", [tar, lambda files: tar(files, mode="w"), zipped])
def test_the_wanted_files_come_out(tmp_path, pack):
    assert run(tmp_path, pack(GOOD)) == 2
    found = {
        p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert {name: path.read_bytes() for name, path in found.items()} == {
        name: content for name, content in GOOD.items() if name.endswith(".jpg")
    }
    assert not any(path.stat().st_mode & (stat.S_ISUID | stat.S_IXUSR) for path in found.values())


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize(
    "name",
    ["../out.jpg", "top/../../out.jpg", "/etc/out.jpg", "a\\..\\..\\out.jpg", "C:out.jpg", "../unwanted"],
)
def test_paths_that_lead_out_are_refused(tmp_path, pack, name):
    with pytest.raises(DatasetError, match=r"is refused: .* a path that leads out"):
        run(tmp_path, pack({"top/a.jpg": b"a", name: b"evil"}))
    assert {path.name for path in tmp_path.iterdir()} <= {"archive", "out"}


@pytest.mark.parametrize(
    "member",
    [
        special("top/l.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("top/l.jpg", tarfile.SYMTYPE, "a.jpg"),
        special("top/h.jpg", tarfile.LNKTYPE, "../../secret"),
        special("top/d", tarfile.CHRTYPE),
        special("top/p", tarfile.FIFOTYPE),
    ],
)
def test_links_and_devices_are_refused(tmp_path, member):
    with pytest.raises(DatasetError, match="a link or a device"):
        run(tmp_path, tar(GOOD, member))


def test_a_link_in_a_zip_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="a link, a device"):
        run(tmp_path, zipped({"top/l.jpg": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777))


def test_a_directory_that_leads_out_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="leads out"):
        run(tmp_path, tar(GOOD, special("../dir", tarfile.DIRTYPE)))


@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize("bounds", [{"most_bytes": 3}, {"most_files": 2}])
def test_size_and_number_are_bounded(tmp_path, pack, bounds):
    with pytest.raises(DatasetError, match="unpacks to more than"):
        run(tmp_path, pack(GOOD), **bounds)


def test_a_name_that_stands_twice_is_refused(tmp_path):
    twice = tar({"top/a.jpg": b"aa", "./top/a.jpg": b"bb"})
    with pytest.raises(DatasetError, match="there twice"):
        run(tmp_path, twice)


@pytest.mark.parametrize(
    "ruin", [lambda b: b"no archive", lambda b: b[: len(b) // 2], lambda b: b[:60] + b"????" + b[64:]]
)
def test_a_damaged_archive_is_said_to_be_one(tmp_path, ruin):
    with pytest.raises(DatasetError, match="damaged or no archive"):
        run(tmp_path, ruin(tar({**GOOD, "top/c.jpg": bytes(range(256)) * 3})), most_bytes=10**6)


def bomb(kind, size):
    """A tar whose extension header says, and has, that many bytes."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    ended = tarfile.TarInfo("top/a.jpg").tobuf() + bytes(1024)
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + b"a" * size + bytes(-size % 512) + ended)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_long_header_is_refused_before_it_is_read(tmp_path, kind):
    assert run(tmp_path, bomb(tarfile.GNUTYPE_LONGNAME, 4096)) == 0
    (tmp_path / "archive").unlink()
    with pytest.raises(DatasetError, match=r"an extension header of 1,000,000 bytes"):
        run(tmp_path, bomb(kind, 1_000_000))


def test_a_file_with_holes_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="holes"):
        run(tmp_path, tar(GOOD, special("top/c.jpg", tarfile.GNUTYPE_SPARSE)))


def test_a_zip_packed_in_an_unknown_way_is_damaged(tmp_path):
    content = bytearray(zipped({"top/a.jpg": b"a" * 9}))
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(mark) + place] = 97
    with pytest.raises(DatasetError, match="is damaged or no archive"):
        run(tmp_path, bytes(content))
