import hashlib

import pytest

from tasks.datasets.download import fetch, shown
from tasks.datasets.settings import DatasetError
from tests.datasets.file_server import Shelf, serving

CONTENT = bytes(range(256)) * 1000
MD5 = ("md5", hashlib.md5(CONTENT).hexdigest())
MOST = 10**6


@pytest.fixture
def shelf():
    with serving(Shelf({"/a.tgz": CONTENT})) as served:
        yield served


def test_a_file_is_fetched_once(shelf, tmp_path):
    for _ in range(2):
        assert fetch(f"{shelf.address}/a.tgz", tmp_path / "a", MOST, MD5).read_bytes() == CONTENT
    assert shelf.asked == [("/a.tgz", None)]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def broken_off(shelf, tmp_path, at):
    shelf.break_at["/a.tgz"] = at
    with pytest.raises(
        DatasetError, match=rf"{at:,} of 256,000 bytes; {at:,} bytes are kept .*Run the command again"
    ):
        fetch(f"{shelf.address}/a.tgz", tmp_path / "a", MOST, MD5)
    assert not (tmp_path / "a").exists()


def test_a_broken_download_goes_on_where_it_broke_off(shelf, tmp_path):
    broken_off(shelf, tmp_path, 100_000)
    assert fetch(f"{shelf.address}/a.tgz", tmp_path / "a", MOST, MD5).read_bytes() == CONTENT
    assert shelf.asked[1:] == [("/a.tgz", "bytes=100000-")]


def test_a_server_without_ranges_sends_all_again(shelf, tmp_path):
    broken_off(shelf, tmp_path, 100_000)
    shelf.ranges = False
    assert fetch(f"{shelf.address}/a.tgz", tmp_path / "a", MOST, MD5).read_bytes() == CONTENT


def test_a_part_that_is_the_whole_is_taken(shelf, tmp_path):
    (tmp_path / "a.part").write_bytes(CONTENT)
    assert fetch(f"{shelf.address}/a.tgz", tmp_path / "a", MOST, MD5).read_bytes() == CONTENT


def test_another_file_is_refused_and_removed(shelf, tmp_path):
    shelf.files["/a.tgz"] = b"x" + CONTENT[1:]
    with pytest.raises(DatasetError, match=f"its md5 is [0-9a-f]+, not {MD5[1]}; it was removed"):
        fetch(f"{shelf.address}/a.tgz", tmp_path / "a", MOST, MD5)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_too_large_is_refused_and_removed(shelf, tmp_path):
    with pytest.raises(DatasetError, match=r"at least 256,000 bytes, more than the 1,000"):
        fetch(f"{shelf.address}/a.tgz", tmp_path / "a", 1000, MD5)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said(shelf, tmp_path):
    with pytest.raises(DatasetError, match=r"/b.tgz: HTTP 404 .*nothing was kept.*--from"):
        fetch(f"{shelf.address}/b.tgz", tmp_path / "b", MOST, MD5)
    with pytest.raises(DatasetError, match=r"cannot download http://127\.0\.0\.1:9/b\.tgz: "):
        fetch("http://127.0.0.1:9/b.tgz", tmp_path / "b", MOST, None)
    with pytest.raises(DatasetError, match="no file "):
        fetch(str(tmp_path / "none.tgz"), tmp_path / "b", MOST, None)
    with pytest.raises(DatasetError, match="ftp:// addresses are not fetched"):
        fetch("ftp://example.org/b.tgz", tmp_path / "b", MOST, None)


@pytest.mark.parametrize("spell", [str, lambda path: path.as_uri()])
def test_a_file_on_disk_is_used_where_it_is(tmp_path, spell):
    mine = tmp_path / "my archive.tgz"
    mine.write_bytes(CONTENT)
    assert fetch(spell(mine), tmp_path / "scratch" / "a", MOST, MD5) == mine
    with pytest.raises(DatasetError, match="it was left as it is"):
        fetch(spell(mine), tmp_path / "a", MOST, ("sha256", "0" * 64))
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]


def test_addresses_are_shown_without_what_may_be_secret():
    assert shown("https://me:word@example.org:8/a/b.zip?token=secret") == "https://example.org:8/a/b.zip"


@pytest.mark.parametrize(
    "address",
    [
        "http://me:planted@127.0.0.1/x.zip",
        "https://planted@127.0.0.1/x.zip",
        "http://127.0.0.1:planted/x.zip",
        "http://[planted/x.zip",
        "http:///planted",
    ],
)
def test_an_address_with_a_password_or_without_a_host_is_refused_and_not_repeated(tmp_path, address):
    with pytest.raises(DatasetError, match="address") as told:
        fetch(address, tmp_path / "x", MOST, None)
    assert "planted" not in str(told.value)
    assert list(tmp_path.iterdir()) == []
