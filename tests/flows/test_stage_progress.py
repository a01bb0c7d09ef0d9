"""Progress in Prefect: none of a short stage, few updates of a long one, and no server's fault stops a stage."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact
from prefect.context import FlowRunContext

from flows import stage_progress as module
from flows.stage_progress import AFTER_S, EVERY_S, stage_progress
from tasks.progress import Told


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def shown_by(stage: Callable[[], None]) -> list[Artifact]:
    """The progress artifacts of a flow run whose only task does this."""

    @flow
    def running() -> UUID:
        task(stage, name="stage")()
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        return context.flow_run.id

    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[running()]))
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=chosen)


def test_a_long_stage_is_shown_from_any_thread_and_ends_full(prefect_server: None) -> None:
    def drawing() -> None:
        clock = Clock()
        told = stage_progress("drawing", "session 1 epoch 0", clock)
        clock.now += AFTER_S
        other = threading.Thread(target=told, args=("", 10, 1000))
        other.start()
        other.join()
        told("", 1000, 1000)
        settled(told)

    (shown,) = shown_by(drawing)
    assert (shown.key, shown.type, shown.data) == ("progress-drawing", "progress", 100)
    assert shown.description == "session 1 epoch 0: drawing 1,000/1,000"
    assert shown.task_run_id is not None


def test_a_short_stage_leaves_no_artifact(prefect_server: None) -> None:
    def drawing() -> None:
        told = stage_progress("drawing", "session 1 epoch 0", Clock())
        for done in range(1, 11):
            told("", done, 10)

    assert shown_by(drawing) == []


def settled(told: Told) -> None:
    """Wait for what is shown beside the stage."""
    shown, until = told.__self__, time.monotonic() + 60  # type: ignore[attr-defined]
    while shown._sending and shown._due < float("inf"):
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The percentages that a server would be sent."""
    sent: list[float] = []

    def create(percent: float, _key: str, _said: str) -> UUID:
        sent.append(percent)
        return UUID(int=1)

    monkeypatch.setattr(module, "create_progress_artifact", create)
    monkeypatch.setattr(module, "update_progress_artifact", lambda _id, percent, _said: sent.append(percent))
    return sent


def test_updates_are_seconds_apart(asked: list[float]) -> None:
    clock = Clock()
    told = stage_progress("tuning", "session 0 epoch 0", clock)
    for done in range(1, 1001):  # a minute of 1,000 updates
        clock.now += 0.06
        told("", done, 1000)
        settled(told)
    assert 2 < len(asked) <= 1 + (60 - AFTER_S) / EVERY_S + 1
    assert asked[-1] == 100


def test_a_server_that_fails_is_asked_once_and_the_stage_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[float] = []

    def refuse(percent: float, _key: str, _said: str) -> UUID:
        calls.append(percent)
        raise ConnectionError("gone")

    monkeypatch.setattr(module, "create_progress_artifact", refuse)
    clock = Clock()
    told = stage_progress("tuning", "session 0 epoch 0", clock)
    for done in range(1, 11):
        clock.now += AFTER_S
        told("", done, 10)
        settled(told)
    assert calls == [10.0]
    assert [record.message for record in caplog.records] == [
        "Prefect takes no progress of tuning (ConnectionError: gone)"
    ]


def test_a_server_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the answers that arrive meanwhile would be too late, and be paid for again."""
    answers, sent = threading.Event(), []

    def hang(percent: float, _key: str, _said: str) -> UUID:
        answers.wait(60)
        sent.append(percent)
        return UUID(int=1)

    monkeypatch.setattr(module, "create_progress_artifact", hang)
    monkeypatch.setattr(module, "update_progress_artifact", lambda _id, percent, _said: sent.append(percent))
    clock = Clock()
    told = stage_progress("comparing", "session 0 epoch 0", clock)
    for done in range(1, 10):
        clock.now += AFTER_S
        told("", done, 10)
    told("", 10, 10)
    assert sent == []
    answers.set()
    settled(told)
    assert sent == [10.0, 100.0]


def test_where_no_thread_can_be_started_the_stage_goes_on(
    asked: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    clock = Clock()
    told = stage_progress("tuning", "session 0 epoch 0", clock)
    for done in range(1, 11):
        clock.now += AFTER_S
        told("", done, 10)
    assert asked == []
    assert len(caplog.records) == 1
