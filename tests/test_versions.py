"""Runs kept in DVC's cache: once by content, with the ids that DVC itself would give, carried by its own push and pull."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from tasks.records import Digest
from tasks.store import StoreError, digest_of
from tasks.versions import Versions, below, find, pointer_of, read_pointer


def dvc(repository: Path, *arguments: str) -> str:
    environment = {**os.environ, "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def repository(folder: Path) -> Path:
    folder.mkdir()
    dvc(folder, "init", "--no-scm", "--quiet")
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return repository(tmp_path / "here")


def run_in(place: Path, **files: str) -> Path:
    folder = place / "runs" / "digits" / "guided" / "seed-0"
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


EPOCHS = {
    "config": "{}",
    "session-00__epoch-000__adapter__w": "A0",
    "session-00__epoch-000__images__one": "1",
    "session-00__epoch-001__adapter__w": "A0",
    "session-00__epoch-001__images__one": "2",
}


def objects(place: Path) -> list[str]:
    cache = place / ".dvc" / "cache" / "files" / "md5"
    return sorted(p.parent.name + p.name for p in cache.rglob("*") if p.is_file())


def test_outside_of_a_repository_there_are_no_versions(tmp_path: Path) -> None:
    assert Versions.around(tmp_path) is None


def test_the_digest_is_dvcs_and_equal_content_is_kept_once(here: Path) -> None:
    run = run_in(here, **EPOCHS)
    versions = Versions.around(run)
    assert versions is not None
    digest = versions.keep(run, {"git_commit": "abc"})
    assert digest == digest_of(run)
    assert len(objects(here)) == 1 + 4, "a listing, and four contents of five files"
    pointer = read_pointer(pointer_of(run))
    assert (pointer.folder, pointer.digest, pointer.meta) == (run, digest, {"git_commit": "abc"})
    versions.keep(run, {"git_commit": "another, which computed nothing"})
    assert read_pointer(pointer_of(run)) == pointer
    assert "up to date" in dvc(here, "status"), "DVC reads the pointer and finds the folder as it says"


def test_a_kept_file_is_one_file_with_the_cache_and_read_only(here: Path) -> None:
    run = run_in(here, config="{}")
    versions = Versions.around(run)
    assert versions is not None
    versions.keep(run, {})
    kept = here / ".dvc" / "cache" / "files" / "md5" / digest_of(run / "config")[:2]
    (path,) = kept.iterdir()
    assert path.samefile(run / "config")
    assert path.stat().st_mode & 0o222 == 0


def test_a_second_keeping_reads_only_what_is_new(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_in(here, **EPOCHS)
    versions = Versions.around(run)
    assert versions is not None
    versions.keep(run, {})
    read: list[str] = []

    def digest(path: Path) -> Digest:
        read.append(path.name)
        return digest_of(path)

    monkeypatch.setattr("tasks.versions.digest_of", digest)
    run_in(here, experiment="done")
    assert versions.keep(run, {}) == digest_of(run)
    assert read == ["experiment"]


def test_what_is_being_written_is_not_kept(here: Path) -> None:
    run = run_in(here, **EPOCHS, **{".epoch-002.tmp__half": "x"})
    versions = Versions.around(run)
    assert versions is not None
    digest = versions.keep(run, {})
    assert [entry.relpath for entry in versions.entries(digest) if "tmp" in entry.relpath] == []


def test_what_is_kept_has_its_pointer_before_others_may_delete(here: Path) -> None:
    versions = Versions.around(run := run_in(here, config="one"))
    assert versions is not None
    thread = threading.Thread(target=versions.keep, args=[run, {}])
    with versions.alone():
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert list((here / ".dvc" / "cache").rglob("*.dir")) == []
        shutil.rmtree(here / ".dvc" / "cache" / "files")  # as unnamed
    thread.join(30)
    assert len([path for path in (here / ".dvc" / "cache").rglob("*") if path.is_file()]) == 2
    assert read_pointer(pointer_of(run)).digest == digest_of(run)


def test_a_copy_has_its_name_when_it_is_whole(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no links: another disk."""
    versions = Versions.around(run := run_in(here, config="one"))
    assert versions is not None
    copies, copy = [], shutil.copy2

    def link(*_: object) -> NoReturn:
        raise OSError(errno.EXDEV, "another disk")

    def breaks_off(source: Path, target: Path) -> None:
        copies.append(Path(target).name)
        copy(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", link)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copy2", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            versions.keep(run, {})
    (name,) = copies
    assert name.startswith(".")
    assert name.endswith(".tmp")
    assert [path for path in (here / ".dvc" / "cache").rglob("*") if path.is_file()] == []
    digest = versions.keep(run, {})
    assert versions.restore(versions.entries(digest), here / "there") == 1
    assert [path.name for path in (here / "there").iterdir()] == ["config"]


def test_a_truncated_object_is_replaced(here: Path) -> None:
    run = run_in(here, config="whole")
    versions = Versions.around(run)
    assert versions is not None
    target = here / ".dvc" / "cache" / "files" / "md5" / digest_of(run / "config")[:2]
    target.mkdir(parents=True)
    (target / digest_of(run / "config")[2:]).write_text("wh")
    versions.keep(run, {})
    assert (target / digest_of(run / "config")[2:]).read_text() == "whole"


def test_pushed_and_pulled_into_a_second_clone(here: Path, tmp_path: Path) -> None:
    run = run_in(here, **EPOCHS)
    versions = Versions.around(run)
    assert versions is not None
    digest = versions.keep(run, {})
    dvc(here, "remote", "add", "-d", "store", str(tmp_path / "remote"))
    dvc(here, "push", "--quiet")

    there = repository(tmp_path / "there")
    dvc(there, "remote", "add", "-d", "store", str(tmp_path / "remote"))
    other = Versions.around(there)
    assert other is not None
    files = other.entries(digest)
    target = there / "runs" / "digits" / "guided" / "seed-0"
    assert other.restore(files, target) == 5
    assert digest_of(target) == digest
    assert other.restore(files, target) == 0, "what is there stays"

    pointer_of(target).write_bytes(pointer_of(run).read_bytes())
    dvc(there, "pull", "--quiet")
    assert "up to date" in dvc(there, "status")


def test_an_epoch_is_found_by_its_digest_and_restored_alone(here: Path, tmp_path: Path) -> None:
    run = run_in(here, **EPOCHS)
    versions = Versions.around(run)
    assert versions is not None
    entries = versions.entries(versions.keep(run, {}))
    images = run / "session-00" / "epoch-001" / "images"
    assert find(entries, digest_of(images)) == "session-00/epoch-001/images"
    assert find(entries, digest_of(images / "one")) == "session-00/epoch-001/images/one"
    assert find(entries, Digest("0" * 32)) is None
    versions.restore(below(entries, "session-00/epoch-001/images"), tmp_path / "again")
    assert digest_of(tmp_path / "again") == digest_of(images)


def test_neither_cache_nor_remote(here: Path) -> None:
    versions = Versions.around(here)
    assert versions is not None
    with pytest.raises(StoreError, match=r"0{32}\.dir is not in DVC's cache .* dvc remote add"):
        versions.entries(Digest("0" * 32 + ".dir"))


def test_another_file_in_the_way_and_a_damaged_object_are_refused(here: Path, tmp_path: Path) -> None:
    run = run_in(here, config="right")
    versions = Versions.around(run)
    assert versions is not None
    entries = versions.entries(versions.keep(run, {}))
    (tmp_path / "config").write_text("wrong")
    with pytest.raises(StoreError, match="in the way with other content"):
        versions.restore(entries, tmp_path)
    kept = here / ".dvc" / "cache" / "files" / "md5" / entries[0].md5[:2] / entries[0].md5[2:]
    kept.unlink()
    kept.write_text("other")
    with pytest.raises(StoreError, match="cache is damaged"):
        versions.restore(entries, tmp_path / "empty")


def test_a_listing_cannot_write_outside_of_its_folder(here: Path, tmp_path: Path) -> None:
    run = run_in(here, config="x")
    versions = Versions.around(run)
    assert versions is not None
    (entry,) = versions.entries(versions.keep(run, {}))
    for name in ("../out", str(tmp_path / "out")):
        with pytest.raises(StoreError, match="lies outside"):
            versions.restore([entry.model_copy(update={"relpath": name})], tmp_path / "in")


def test_a_link_that_leads_out_of_a_run_is_left_out_and_told_of_once(
    here: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_in(here, **EPOCHS)
    (tmp_path / "secret").write_text("of somebody else")
    (run / "note").symlink_to(tmp_path / "secret")
    (run / "folder").symlink_to(tmp_path)
    (run / "again").symlink_to(run / "config")
    (run / "latest").symlink_to(run / "session-00")
    (run / "loop").symlink_to("loop")
    versions = Versions.around(run)
    assert versions is not None
    first = versions.keep(run, {})
    assert versions.keep(run, {}) == first
    assert {entry.relpath for entry in versions.entries(first)} == {
        *(name.replace("__", "/") for name in EPOCHS),
        "again",
    }
    kept = [p.read_text() for p in (here / ".dvc" / "cache").rglob("*") if p.is_file()]
    assert "of somebody else" not in kept
    said = [record.getMessage() for record in caplog.records if record.name == "fscil.versions"]
    assert [line.split(" is a link that leads out")[0] for line in said] == [
        str(run / name) for name in ("folder", "latest", "loop", "note")
    ]


def test_links_to_the_cache_are_the_runs_own(here: Path) -> None:
    """`dvc checkout` makes them where ``cache.type`` is ``symlink``."""
    run = run_in(here, config="{}")
    versions = Versions.around(run)
    assert versions is not None
    digest = versions.keep(run, {})
    (kept,) = (p for p in (here / ".dvc" / "cache").rglob("*") if p.is_file() and p.samefile(run / "config"))
    (run / "config").unlink()
    (run / "config").symlink_to(kept)
    assert versions.keep(run, {}) == digest
    assert versions.restore(versions.entries(digest), run) == 0


@pytest.mark.parametrize("name", ["session-00", "session-00/epoch-000/adapter", "config"])
def test_a_link_in_the_folder_lets_nothing_be_restored_outside(here: Path, tmp_path: Path, name: str) -> None:
    run = run_in(here, **EPOCHS)
    versions = Versions.around(run)
    assert versions is not None
    entries = versions.entries(versions.keep(run, {}))
    target, elsewhere = tmp_path / "again", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (target / name).parent.mkdir(parents=True)
    (target / name).symlink_to(elsewhere if "/" in name or "-" in name else elsewhere / "nothing")
    with pytest.raises(StoreError, match=rf"again/{name} is a link that leads out of .*again; move it"):
        versions.restore(entries, target)
    part = below(entries, "session-00/epoch-000")
    if name == "session-00":
        with pytest.raises(StoreError, match="session-00 is a link that leads out"):
            versions.restore(part, target / "session-00" / "epoch-000", target)
    assert list(elsewhere.iterdir()) == []


def test_a_link_to_itself_is_in_the_way(here: Path, tmp_path: Path) -> None:
    versions = Versions.around(run := run_in(here, **EPOCHS))
    assert versions is not None
    entries = versions.entries(versions.keep(run, {}))
    (target := tmp_path / "again").mkdir()
    (target / "config").symlink_to("config")
    with pytest.raises(StoreError, match="again/config is a link that points nowhere; remove it"):
        versions.restore(entries, target)


def test_a_file_that_is_no_pointer(tmp_path: Path) -> None:
    path = tmp_path / "seed-0.dvc"
    path.write_text("outs: []\n")
    with pytest.raises(StoreError, match="no pointer of DVC"):
        read_pointer(path)
    for folder in ("..", ".", "a/b", "/etc", ""):
        path.write_text(f"outs:\n- md5: {'0' * 32}.dir\n  path: '{folder}'\n")
        with pytest.raises(StoreError, match="no pointer of DVC"):
            read_pointer(path)


def test_data_that_their_pointer_names_are_copied_in_and_others_are_left(here: Path) -> None:
    data = here / "data"
    data.mkdir()
    (data / "one").write_text("1")
    versions = Versions.around(data)
    assert versions is not None
    assert not versions.copy_in(data), "no pointer"
    digest = digest_of(data)
    (here / "data.dvc").write_text(
        f"outs:\n- md5: {digest}\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: data\n"
    )
    assert versions.copy_in(data)
    assert len(objects(here)) == 2
    assert (data / "one").stat().st_nlink == 1
    assert "up to date" in dvc(here, "status")
    (data / "two").write_text("2")
    (here / "data.dvc").write_text((here / "data.dvc").read_text().replace(digest, "0" * 32 + ".dir"))
    assert not versions.copy_in(data)
