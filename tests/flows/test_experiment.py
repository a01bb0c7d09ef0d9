"""One guided experiment on real digits through all six stages, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tasks.images import save_png
from tasks.records import AugmentedImage, EpochRecord, ExperimentRecord, SessionRecord, Verdict
from tasks.store import digest_of, read_lines
from tests.conftest import ROOT, Place


def epochs_of(run: Path) -> list[tuple[Path, EpochRecord]]:
    folders = sorted(run.glob("session-*/epoch-*"))
    return [(f, EpochRecord.model_validate_json((f / "record.json").read_text())) for f in folders]


def test_every_stage_ran_and_is_on_disk(finished: Place) -> None:
    run = finished.run("guided")
    record = ExperimentRecord.model_validate_json((run / "experiment.json").read_text())
    assert [len(s.counts) for s in record.sessions] == [6, 8, 10]
    assert [sum(c.total for c in s.counts) for s in record.sessions] == [36, 48, 60]
    first, last = epochs_of(run)[:2]
    assert first[1].regenerate
    assert first[1].compare
    assert first[1].tune
    assert last[1].mine is None, "the last epoch of a session needs no further set"
    for name in (
        "classifier",
        "predictions.jsonl",
        "pairs.jsonl",
        "verdicts.jsonl",
        "transcript.jsonl",
        "images",
        "adapter",
    ):
        assert (first[0] / name).exists(), name


def test_one_image_per_slot_with_its_prompt_and_seed(finished: Place) -> None:
    for folder, record in epochs_of(finished.run("guided")):
        if record.regenerate is None:
            continue
        rows = read_lines(folder / "manifest.jsonl", AugmentedImage)
        assert len(rows) == record.regenerate.output.count == len({row.slot for row in rows})
        assert len({row.seed for row in rows}) == len(rows)
        assert all(digest_of(folder / "images" / row.path) == row.digest for row in rows)
        assert all(row.parent_id for row in rows)


def test_verdicts_reach_the_next_prompts(finished: Place) -> None:
    folder, record = epochs_of(finished.run("guided"))[0]
    assert record.compare
    verdicts = {v.augmented_id: v for v in read_lines(folder / "verdicts.jsonl", Verdict)}
    assert verdicts, "an early classifier gets something wrong"
    children = {row.parent_id: row for row in read_lines(folder / "manifest.jsonl", AugmentedImage)}
    assert all(children[name].prompt == verdict.prompt_next for name, verdict in verdicts.items())
    semantic = [v for v in verdicts.values() if v.level == "semantic"]
    assert len(semantic) == record.compare.output.semantic


def test_results_hold_no_absolute_path_clock_or_host(finished: Place) -> None:
    for path in finished.run("guided").rglob("*.json*"):
        if path.name != "config.json":
            text = path.read_text()
            assert str(finished.root) not in text, path
            assert "20" + "26-" not in text, path


def test_running_again_computes_nothing_and_changes_nothing(finished: Place) -> None:
    from flows.experiment import fscil

    stages = finished.root / "state" / "stages"
    before = {p: p.stat().st_mtime_ns for p in stages.rglob("record.json")}
    results = finished.files("guided")
    fscil("digits", "guided", 0, finished.overrides(tracking=True))
    assert {p: p.stat().st_mtime_ns for p in stages.rglob("record.json")} == before
    assert finished.files("guided") == results


def test_mlflow_has_parent_children_and_each_point_once(finished: Place) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.root}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    assert len(runs) == 1 + 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    child = next(run for run in runs if run.data.tags.get("mlflow.parentRunId"))
    for name in child.data.metrics:
        steps = [point.step for point in client.get_metric_history(child.info.run_id, name)]
        assert len(steps) == len(set(steps)), name


# ------------------------------------------------------------------------------------------ leakage


def test_a_poisoned_test_split_changes_no_weight_no_prompt_and_no_image(
    finished: Place, tmp_path: Path
) -> None:
    from flows.experiment import fscil

    data = tmp_path / "digits"
    (data / "train").parent.mkdir()
    (data / "train").symlink_to(finished.data / "train")
    noise = torch.Generator().manual_seed(0)
    for path in sorted((finished.data / "test").rglob("*.png")):
        target = data / "test" / path.relative_to(finished.data / "test")
        target.parent.mkdir(parents=True, exist_ok=True)
        save_png(torch.rand(3, 28, 28, generator=noise), target)
    poisoned = Place(tmp_path, data)
    fscil("digits", "guided", 0, poisoned.overrides())

    def learned(place: Place) -> dict[str, str]:
        tested = ("record.json", "experiment.json", "inputs.json")  # the last has the digest of all data
        return {
            name: digest
            for name, digest in place.files("guided").items()
            if not (name.split("/")[-1] in tested and "epoch" not in name) and "/test/" not in name
        }

    assert learned(poisoned) == learned(finished)
    assert any("adapter" in name for name in learned(poisoned))
    ours = SessionRecord.model_validate_json(
        (poisoned.run("guided") / "session-02" / "record.json").read_text()
    )
    theirs = SessionRecord.model_validate_json(
        (finished.run("guided") / "session-02" / "record.json").read_text()
    )
    assert ours.test != theirs.test, "the poison did not reach the test split"


# ------------------------------------------------------------------------------------------ kill and resume


def start(place: Place) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flows", "dataset=digits", "method=guided", "seed=0", *place.overrides()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_API")}
    environment |= {
        "PREFECT_HOME": str(place.root / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def kill_when(process: subprocess.Popen[bytes], seen: Path, pattern: str) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"ended before {pattern} appeared: {process.stderr.read().decode()[-2000:]}")
        if next(seen.glob(pattern), None):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"{pattern} never appeared")


KILLS = ("regenerate/*.partial/shard-*.jsonl", "tune_lora/*.partial")


def kill_and_compare(place: Place, finished: Place, patterns: tuple[str, ...]) -> None:
    from flows.experiment import fscil

    for pattern in patterns:
        kill_when(start(place), place.root / "state" / "stages", pattern)
    sealed = {p: p.stat().st_mtime_ns for p in (place.root / "state" / "stages").rglob("record.json")}
    assert not (place.run("guided") / "experiment.json").exists()
    fscil("digits", "guided", 0, place.overrides())
    assert place.files("guided") == finished.files("guided")
    assert {p: p.stat().st_mtime_ns for p in sealed} == sealed, "something sealed was computed again"
    leftovers = [
        p for p in place.root.rglob("*") if p.suffix in {".partial", ".tmp"} and "prefect" not in p.parts
    ]
    assert leftovers == []


def test_killed_anywhere_the_same_command_ends_with_equal_results(finished: Place, tmp_path: Path) -> None:
    kill_and_compare(Place(tmp_path), finished, ("tune_lora/*.partial",))


@pytest.mark.slow
def test_killed_again_and_again(finished: Place, tmp_path: Path) -> None:
    patterns = (
        "regenerate/*.partial/shard-*.jsonl",
        "train_classifier/*.partial",
        "evaluate/*.partial",
        "mine_failures/*.partial",
        "vlm_compare/*.partial",
    )
    kill_and_compare(Place(tmp_path), finished, patterns)


def test_vlm_answers_are_not_paid_twice(finished: Place) -> None:
    answers = list((finished.root / "state" / "vlm").rglob("*.json"))
    asked = set()
    for transcript in finished.run("guided").rglob("transcript.jsonl"):
        asked |= {json.loads(line)["key"] for line in transcript.read_text().splitlines()}
    assert {path.stem for path in answers} == asked
