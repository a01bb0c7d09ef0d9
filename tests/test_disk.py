"""Full, failing and read-only disks: one sentence that names the place and the remedy, and nothing sealed is lost."""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tasks.datasets.__main__ import main as write_data
from tasks.disk import DiskError, sentence_of, writing
from tasks.gpu import slot_held
from tasks.records import ArtifactRef, Frozen, StageRecord
from tasks.store import StageFolder, Store, artifacts_of, digest_of, export, write_atomic
from tasks.tracking_runs import make_database
from tasks.versions import Versions
from tasks.vlm.transport import VlmError
from tests.conftest import ROOT
from tests.small_disk import small_disk
from tests.test_versions import repository


class Out(Frozen):
    file: ArtifactRef


def sealed(store: Store, seed: int, size: int = 10, calls: list[int] | None = None) -> StageRecord[Out]:
    """A stage whose output is one file of so many bytes."""

    def compute(work: StageFolder) -> Out:
        (calls if calls is not None else []).append(seed)
        (work.path / "weights").write_bytes(bytes([seed]) * size)
        return Out(file=work.ref("weights", "adapter"))

    return store.run("stage", 1, settings={}, inputs={}, seed=seed, output=Out, compute=compute)


# ------------------------------------------------------------------------------------------ the sentences


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, ["disk that is full", "make space there", "fscil gc", "the same command goes on"]),
        (errno.EDQUOT, ["quota", "make space there"]),
        (errno.EFBIG, ["ulimit -f"]),
        (errno.EIO, ["input/output error", "look at the disk"]),
        (errno.EROFS, ["read-only", "name another folder"]),
        (errno.EACCES, ["may not be used by you", "who owns it"]),
    ],
)
def test_each_refusal_names_the_place_and_what_to_do(number: int, says: list[str]) -> None:
    with pytest.raises(DiskError) as told, writing(Path("state")):
        raise OSError(number, "as the system says it")
    assert str(told.value).startswith("state ")
    assert all(word in str(told.value) for word in says), str(told.value)


def test_errors_of_other_kinds_stay_what_they_are() -> None:
    assert sentence_of(ConnectionRefusedError(errno.ECONNREFUSED, "refused"), Path("state")) is None
    assert sentence_of(ValueError("os error of ours"), Path("state")) is None
    with pytest.raises(FileNotFoundError), writing(Path("state")):
        Path("nowhere/at/all").read_bytes()


def test_a_library_in_rust_is_understood_too(tmp_path: Path) -> None:
    said = sentence_of(
        SafetensorError("Error while serializing: No space left on device (os error 28)"), tmp_path
    )
    assert str(said).startswith(f"{tmp_path} is on a disk that is full")
    quoted = VlmError("the VLM failed (500): No space left on device (os error 28)")
    assert sentence_of(quoted, tmp_path) is None, "a provider's disk is not this machine's"


def test_a_copy_is_of_the_target_not_of_the_source(tmp_path: Path) -> None:
    error = OSError(
        errno.ENOSPC, "no room", str(tmp_path / "here" / "a"), None, str(tmp_path / "there" / "a")
    )
    assert str(sentence_of(error)).startswith(f"{tmp_path / 'there'} is on a disk that is full")


@pytest.mark.parametrize("name", ["runs", "runs/digits", "runs/digits/guided"])
def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("a file")
    with pytest.raises(DiskError, match=rf"{name} is a file where a folder should be: move it"):
        write_atomic(tmp_path / "runs" / "digits" / "guided" / "config.json", "{}")


# ------------------------------------------------------------------------------------------ no room


def test_a_stage_that_fills_the_disk_leaves_what_is_sealed_and_goes_on_later(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400) as disk:
        store, calls = Store(disk.path / "state"), []
        first = sealed(store, 1, calls=calls)
        with pytest.raises(DiskError, match=r"state/stages/stage is on a disk that is full"):
            sealed(store, 2, size=500_000, calls=calls)
        store.verify(artifacts_of(first))
        disk.grow(600)
        second = sealed(store, 2, size=500_000, calls=calls)
        assert sealed(store, 1, calls=calls) == first
        store.verify(artifacts_of(second))
    assert calls == [1, 2, 2]


def test_a_disk_that_is_full_at_sealing_exporting_and_before(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 200) as disk:
        store = Store(tmp_path / "state")
        record = sealed(store, 1, size=50_000)
        runs = disk.path / "runs" / "epoch-000"
        ballast = disk.fill()
        with pytest.raises(DiskError, match=r"disk that is full: make space there"):
            export(store, artifacts_of(record), record, runs)
        assert not runs.exists(), "whole or not at all"
        with pytest.raises(DiskError, match="disk that is full"):
            sealed(Store(disk.path / "state"), 1)
        ballast.unlink()
        export(store, artifacts_of(record), record, runs)
        assert digest_of(runs / "weights") == record.output.file.digest
        assert sorted(p.name for p in runs.parent.iterdir()) == ["epoch-000"]


def test_a_cache_on_a_full_disk_keeps_no_half_object(tmp_path: Path) -> None:
    here = repository(tmp_path / "here")
    run = here / "runs" / "digits" / "guided" / "seed-0"
    run.mkdir(parents=True)
    (run / "weights").write_bytes(b"x" * 100_000)
    versions = Versions.around(run)
    assert versions is not None
    with small_disk(here / ".dvc" / "cache", 50) as disk:
        with pytest.raises(DiskError, match=r"\.dvc/cache.* is on a disk that is full"):
            versions.keep(run, {})
        assert [p for p in disk.path.rglob("*") if p.is_file()] == []
        disk.grow(400)
        digest = versions.keep(run, {})
        assert digest == digest_of(run)
        assert versions.restore(versions.entries(digest), tmp_path / "again") == 1


LARGE = """
import resource, sys
from pathlib import Path
from tasks.store import Store
from tests.test_disk import sealed
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    sealed(Store(Path(sys.argv[1])), 2, size=10_000)
except OSError as error:
    print(type(error).__name__, error)
"""


def test_where_nothing_can_be_mounted_a_limit_on_files_takes_the_same_way(tmp_path: Path) -> None:
    first = sealed(Store(tmp_path), 1)
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"DiskError {tmp_path / 'stages' / 'stage'} takes no file as large"), done
    assert sealed(Store(tmp_path), 1) == first
    assert sealed(Store(tmp_path), 2, size=10_000).seed == 2
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096, "the limit was the other process's"


# ------------------------------------------------------------------------------------------ read-only


def test_a_read_only_state_serves_what_is_sealed_elsewhere_and_refuses_new_work(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 400) as disk:
        store = Store(disk.path)
        record = sealed(store, 1)
        disk.make_read_only(True)
        with pytest.raises(DiskError, match="is read-only: make it writable or name another folder"):
            sealed(store, 2)
        for refused in (store.lock("mlflow"), store.run_lock("digits/guided/seed-0"), store.scratch()):
            with pytest.raises(DiskError, match=f"^{disk.path}(/locks)? is read-only"), refused:
                pass
        with pytest.raises(DiskError, match=f"^{disk.path}(/locks)? is read-only"):
            store.clear_scratch()
        export(store, artifacts_of(record), record, tmp_path / "epoch-000")
        assert digest_of(tmp_path / "epoch-000" / "weights") == record.output.file.digest
        disk.make_read_only(False)
        assert sealed(store, 2).seed == 2


def test_read_only_places_outside_of_the_state_are_named_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 400) as disk:
        disk.make_read_only(True)
        refused = pytest.raises(
            DiskError, match=f"^{disk.path} is read-only: make it writable or name another"
        )
        with refused, slot_held(disk.path / "gpus", "GPU-1", 1, "a GPU", print):
            pass
        with refused:
            make_database(f"sqlite:///{disk.path}/mlflow.db")
        for name in ("digits", "cub200"):
            assert write_data([name, "--root", str(disk.path / name)]) == 1
            assert capsys.readouterr().err.startswith(f"{disk.path} is read-only: make it writable")
