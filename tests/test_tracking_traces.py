"""The VLM's dialogues in MLflow are those of the transcript, once, and the machine is measured while a run works."""

import json
import time
from pathlib import Path

import pytest
from mlflow.entities import SpanType

from tasks.records import Usage
from tasks.store import StoreError, Timing
from tasks.tracking_runs import Runs, TrackingSettings
from tasks.tracking_traces import log_dialogue
from tasks.vlm.cassette import write_transcript
from tasks.vlm.client import Exchange, Message, Picture, Reply, Request, Sampling
from tests.test_tracking import empty_database, settings, settings_at  # noqa: F401 - fixtures

SAMPLING = Sampling(model="captioner", temperature=0.0, max_tokens=300, detail="low")
TIMING = Timing(seconds=2.0, finished="2026-01-02T03:04:05+00:00", host="here")
PICTURE = Picture(digest="0" * 32, url="data:image/png;base64,AAAA")


def exchanges(number: int) -> list[Exchange]:
    return [
        Exchange.of(
            Request(messages=(Message(role="user", text=f"What is this, {n}?", pictures=(PICTURE,)),)),
            SAMPLING,
            Reply(
                text=f"ein Stück <b>{n}</b>",
                usage=Usage(calls=1, prompt_tokens=10, completion_tokens=n),
                model="c",
            ),
        )
        for n in range(number)
    ]


@pytest.fixture
def runs(settings: TrackingSettings) -> Runs:  # noqa: F811
    return Runs(settings)


@pytest.fixture
def transcript(tmp_path: Path) -> Path:
    write_transcript(tmp_path / "transcript.jsonl", exchanges(5))
    return tmp_path / "transcript.jsonl"


def test_a_stage_is_a_trace_and_a_call_a_span(runs: Runs, transcript: Path) -> None:
    run = runs.find_or_create("key", "session-00", {})
    for _ in range(2):  # as after a kill
        log_dialogue(runs, run, "session 0 · epoch 1 · compare", transcript, TIMING, {"semantic": 4})
    (trace,) = runs.client.search_traces(locations=[runs.experiment_id])
    root, *calls = trace.data.spans
    assert trace.info.trace_metadata["mlflow.sourceRun"] == run.info.run_id
    assert trace.info.request_time == TIMING.timestamp_ms - 2000
    assert trace.info.execution_duration == 2000
    assert trace.info.response_preview == "calls 5, shown 3, semantic 4"
    assert trace.info.token_usage == {"input_tokens": 50, "output_tokens": 10, "total_tokens": 60}
    assert (root.name, root.inputs, root.outputs) == (
        "session 0 · epoch 1 · compare", {"calls": 5, "shown": 3}, {"semantic": 4},
    )  # fmt: skip
    names = [f"{n + 1}: ein Stück <b>{n}</b>" for n in range(3)]
    assert [call.name for call in calls] == names, "no more than traced_calls"
    assert {call.parent_id for call in calls} == {root.span_id}
    assert {call.span_type for call in calls} == {SpanType.CHAT_MODEL}
    assert calls[2].outputs["choices"][0]["message"]["content"] == "ein Stück <b>2</b>"
    assert calls[2].inputs["messages"] == [
        {"role": "user", "content": f"What is this, 2?\n[picture, md5 {'0' * 32}]"}
    ]
    assert "base64" not in json.dumps(trace.to_dict())


def test_no_calls_no_trace(runs: Runs, tmp_path: Path) -> None:
    run = runs.find_or_create("key", "session-00", {})
    write_transcript(tmp_path / "none.jsonl", [])
    log_dialogue(runs, run, "compare", tmp_path / "none.jsonl", TIMING, {})
    assert not runs.client.search_traces(locations=[runs.experiment_id])


def test_a_damaged_transcript_is_named(runs: Runs, transcript: Path) -> None:
    transcript.write_text(transcript.read_text()[:-20])
    with pytest.raises(StoreError, match=r"transcript\.jsonl"):
        log_dialogue(runs, runs.find_or_create("key", "s", {}), "compare", transcript, TIMING, {})


def test_the_machine_is_measured_while_the_block_lasts(tmp_path: Path, empty_database: Path) -> None:  # noqa: F811
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    runs = Runs(settings_at(tmp_path, machine_every_s=0.05))
    run_id = runs.find_or_create("key", "run", {}).info.run_id
    for _ in range(2):  # a second process goes on where the first one ended
        with runs.machine(run_id):
            time.sleep(0.6)
    points = runs.client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert len(points) > 2
    assert sorted(point.step for point in points) == list(range(len(points)))
    assert all(0 <= point.value <= 100 for point in points)
