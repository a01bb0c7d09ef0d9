"""The store: fingerprints, sealing, damage, drift of nothing, and DVC's own digests."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tasks.records import ArtifactRef, Digest, Frozen
from tasks.store import (
    StageFolder,
    Store,
    StoreError,
    artifacts_of,
    canonical,
    clear_leftovers,
    digest_of,
    export,
    fingerprint,
    read_json,
    read_lines,
    write_atomic,
    write_lines,
)
from tasks.whereabouts import with_place


class Row(Frozen):
    name: str
    value: float


class Out(Frozen):
    file: ArtifactRef
    count: int


def run_counted(store: Store, calls: list[str], *, seed: int = 0, content: str = "hello") -> object:
    def compute(work: StageFolder) -> Out:
        calls.append(content)
        (work.path / "sub").mkdir(exist_ok=True)
        (work.path / "sub" / "a.txt").write_text(content)
        return Out(file=work.ref("sub", "images"), count=1)

    return store.run(
        "stage", 1, settings={"x": 1}, inputs={"in": Digest("d")}, seed=seed, output=Out, compute=compute
    )


def test_same_work_is_computed_once_and_found_again(tmp_path: Path) -> None:
    calls: list[str] = []
    first = run_counted(Store(tmp_path), calls)
    second = run_counted(Store(tmp_path), calls)
    assert first == second
    assert calls == ["hello"]


def test_another_seed_is_other_work(tmp_path: Path) -> None:
    calls: list[str] = []
    first, second = run_counted(Store(tmp_path), calls, seed=0), run_counted(Store(tmp_path), calls, seed=1)
    assert first.fingerprint != second.fingerprint
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["flip", "delete", "cut the record", "empty the record"])
def test_damage_is_detected_and_only_that_stage_computed_anew(tmp_path: Path, damage: str, caplog) -> None:
    calls: list[str] = []
    record = run_counted(Store(tmp_path), calls)
    folder = tmp_path / "stages" / "stage" / record.fingerprint
    if damage == "flip":
        (folder / "sub" / "a.txt").write_text("hellO")
    elif damage == "delete":
        (folder / "sub" / "a.txt").unlink()
    elif damage == "cut the record":
        (folder / "record.json").write_text((folder / "record.json").read_text()[:40])
    else:
        (folder / "record.json").write_text("")
    assert run_counted(Store(tmp_path), calls) == record
    assert calls == ["hello", "hello"]
    assert "damaged" in caplog.text


def test_a_failing_stage_seals_nothing_and_the_next_attempt_starts_clean(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def failing(work: StageFolder) -> Out:
        (work.path / "half.txt").write_text("half")
        raise RuntimeError("out of luck")

    arguments = {"settings": {}, "inputs": {}, "seed": 0, "output": Out}
    with pytest.raises(RuntimeError, match="out of luck"):
        store.run("stage", 1, compute=failing, **arguments)

    def working(work: StageFolder) -> Out:
        assert not (work.path / "half.txt").exists()
        (work.path / "a.txt").write_text("a")
        return Out(file=work.ref("a.txt", "images"), count=1)

    record = store.run("stage", 1, compute=working, **arguments)
    assert sorted(p.name for p in store.locate(record.output.file).parent.iterdir()) == [
        "a.txt",
        "record.json",
        "timing.json",
    ]


def test_partial_work_is_kept_for_a_stage_that_asks_but_not_its_half_written_files(tmp_path: Path) -> None:
    store, seen = Store(tmp_path), []

    def compute(work: StageFolder) -> Out:
        seen.append(sorted(p.name for p in work.path.iterdir()))
        (work.path / "shard-0").write_text("done")
        (work.path / ".shard-1.77.tmp").write_text("ha")
        if len(seen) == 1:
            raise KeyboardInterrupt
        (work.path / ".shard-1.77.tmp").unlink()
        return Out(file=work.ref("shard-0", "images"), count=1)

    arguments = {"settings": {}, "inputs": {}, "seed": 0, "output": Out, "keep_partial": True}
    with pytest.raises(KeyboardInterrupt):
        store.run("stage", 1, compute=compute, **arguments)
    store.run("stage", 1, compute=compute, **arguments)
    assert seen == [[], ["shard-0"]]


def _slow_stage(root: str) -> None:
    def compute(work: StageFolder) -> Out:
        (work.path / "a.txt").write_text("a")
        time.sleep(60)
        return Out(file=work.ref("a.txt", "images"), count=1)

    Store(Path(root)).run("stage", 1, settings={}, inputs={}, seed=0, output=Out, compute=compute)


def test_a_killed_process_leaves_no_lock_and_no_record(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_slow_stage, args=(str(tmp_path),))
    process.start()
    partial = None
    for _ in range(600):
        partial = next(iter((tmp_path / "stages" / "stage").glob("*.partial/a.txt")), None)
        if partial:
            break
        time.sleep(0.1)
    assert partial, "the stage never started"
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    def compute(work: StageFolder) -> Out:
        (work.path / "a.txt").write_text("b")
        return Out(file=work.ref("a.txt", "images"), count=1)

    store = Store(tmp_path)
    record = store.run("stage", 1, settings={}, inputs={}, seed=0, output=Out, compute=compute)
    assert store.locate(record.output.file).read_text() == "b"
    assert not list((tmp_path / "stages" / "stage").glob("*.partial"))


# ------------------------------------------------------------------------------------------ identity


def test_pinned_fingerprint() -> None:
    # A change here makes every sealed stage of every user stale: raise a stage's version instead.
    mark = fingerprint(
        "train", 1, {"lr": 2e-4, "b": [1, None, True]}, {"data": Digest("abc"), "none": None}, 7
    )
    assert mark == PINNED


PINNED = "6d91632646a82421edf185f85328700b1cab77fa3c48f00742823d6ddde6c151"


def test_key_order_and_tuples_do_not_matter_but_values_do() -> None:
    a = fingerprint("s", 1, {"x": 1, "y": (1, 2)}, {}, 0)
    assert a == fingerprint("s", 1, {"y": [1, 2], "x": 1}, {}, 0)
    assert a != fingerprint("s", 1, {"y": [1, 2], "x": True}, {}, 0)
    assert a != fingerprint("s", 2, {"x": 1, "y": (1, 2)}, {}, 0)


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), float("inf"), Path("a"), object()])
def test_values_without_one_spelling_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="cannot be part of a fingerprint"):
        canonical({"a": [value]})


def test_digests_are_dvcs_own(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "two.txt").write_text("2")
    (folder / "one.txt").write_text("1")
    listing = [
        {"md5": hashlib.md5(b"2").hexdigest(), "relpath": "b/two.txt"},
        {"md5": hashlib.md5(b"1").hexdigest(), "relpath": "one.txt"},
    ]
    expected = hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"
    assert digest_of(folder) == expected
    hashing = pytest.importorskip("dvc_data.hashfile.build")
    from dvc_objects.fs.local import LocalFileSystem

    database = pytest.importorskip("dvc_data.hashfile.db").HashFileDB(
        LocalFileSystem(), str(tmp_path / "odb")
    )
    _, _, tree = hashing.build(database, str(folder), LocalFileSystem(), "md5")
    assert tree.hash_info.value == expected


def test_a_missing_path_or_empty_folder_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        digest_of(tmp_path / "nothing")
    with pytest.raises(StoreError, match="empty folder"):
        digest_of(tmp_path)


# ------------------------------------------------------------------------------------------ files


def test_rows_round_trip_and_a_bad_line_is_named(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.jsonl", [Row(name="ä\u2028b", value=0.1), Row(name="b", value=-2)]
    write_lines(path, rows)
    assert read_lines(path, Row) == rows
    path.write_text(path.read_text() + '{"name": "c"}\n')
    with pytest.raises(StoreError, match=r"rows\.jsonl, line 3"):
        read_lines(path, Row)


def test_atomic_write_leaves_the_old_file_if_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_export_links_files_and_writes_the_record_last(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    record = run_counted(store, [])
    target = tmp_path / "runs" / "epoch-000"
    export(store, artifacts_of(record), record, target)
    assert (target / "sub" / "a.txt").read_text() == "hello"
    assert (target / "sub" / "a.txt").stat().st_ino == (
        store.locate(record.output.file) / "a.txt"
    ).stat().st_ino
    before = target.stat().st_mtime_ns
    export(store, artifacts_of(record), record, target)
    assert target.stat().st_mtime_ns == before


def test_an_attached_run_folder_serves_when_the_state_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    record = run_counted(store, [])
    target = tmp_path / "runs" / "epoch-000"
    export(store, artifacts_of(record), record, target)
    elsewhere = Store(tmp_path / "other")
    with pytest.raises(StoreError, match="not in"):
        elsewhere.locate(record.output.file)
    elsewhere.attach(record, target)
    assert (elsewhere.locate(record.output.file) / "a.txt").read_text() == "hello"
    elsewhere.verify(artifacts_of(record))


def test_temporaries_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = (
        f".a.json.{dead.pid}.tmp",
        f".b.json.{os.getpid()}.tmp",
        f".c.{os.getpid()}.77.tmp",
        ".epoch-000.tmp",
    )
    for name in names[:3]:
        (tmp_path / name).write_text("half")
    (tmp_path / names[3] / "images").mkdir(parents=True)
    (tmp_path / "whole.json").write_text("{}")
    clear_leftovers(tmp_path.rglob(".*.tmp"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:3], "whole.json"])


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [Row(name="a", value=1), Row(name="b", value=2)])
    data = (tmp_path / "rows.jsonl").read_bytes().replace(b"b", b"\xff")
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(StoreError, match=r"rows\.jsonl, line 2, is not a Row"):
        read_lines(tmp_path / "rows.jsonl", Row)


def test_json_too_deep_to_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match=r"cannot read .*a\.json"):
        read_json(tmp_path / "a.json")


def test_an_error_says_in_which_stage_it_arose(tmp_path: Path) -> None:
    def compute(work: StageFolder) -> Out:
        raise ValueError("the loss is nan")

    with pytest.raises(ValueError, match="nan") as caught:
        Store(tmp_path).run("train", 1, settings={}, inputs={}, seed=0, output=Out, compute=compute)
    assert with_place(caught.value) == "train: the loss is nan"


def test_a_scratch_folder_goes_with_its_block_and_those_of_the_dead_with_the_next(tmp_path: Path) -> None:
    held = (
        "import sys, time; from pathlib import Path; from tasks.store import Store\n"
        "with Store(Path(sys.argv[1])).scratch() as work:\n"
        "    (work / 'a').touch(); print(work, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", held, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    store = Store(tmp_path)
    with suppress(KeyboardInterrupt), store.scratch():
        raise KeyboardInterrupt
    with store.scratch() as ours:
        assert {path.suffix for path in ours.parent.iterdir()} == {".tmp", ".lock"}
        assert (theirs / "a").exists()
        other.kill()
        other.wait()
        store.clear_scratch()
        assert set(ours.parent.iterdir()) == {ours, ours.with_suffix(".lock")}
    assert list((tmp_path / "tmp").iterdir()) == []
