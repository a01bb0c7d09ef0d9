"""What Prefect shows of a finished experiment: names, tags, logs and artifacts, read back through its client."""

import re
from functools import cache

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterTags,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogWorker

from flows.progress import note, say, tag_run
from tests.conftest import Place

RUN_ID = "[0-9a-f]{32}"


@cache
def client() -> SyncPrefectClient:
    return get_client(sync_client=True)


@pytest.fixture
def experiment(finished: Place) -> FlowRun:
    """The flow run that made the session's one experiment: other tests ran it again, later."""
    tagged = FlowRunFilter(tags=FlowRunFilterTags(all_=["method:guided"]))
    found = client().read_flow_runs(flow_run_filter=tagged)
    mine = finished.overrides(tracking=True)
    return min((r for r in found if r.parameters.get("overrides") == mine), key=lambda run: run.created)


def sessions_of(run: FlowRun) -> list[FlowRun]:
    below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]))
    return sorted(client().read_flow_runs(flow_run_filter=below), key=lambda run: run.name)


def artifacts_of(run: FlowRun) -> list[Artifact]:
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    return client().read_artifacts(artifact_filter=mine)


def log_of(run: FlowRun) -> list[str]:
    APILogWorker.drain_all(timeout=10)
    found = client().read_logs(log_filter=LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
    assert {line.level for line in found} <= {20}, [line.message for line in found]
    return [line.message for line in sorted(found, key=lambda line: line.timestamp)]


def test_a_run_is_found_by_its_dataset_method_and_seed(experiment: FlowRun) -> None:
    assert set(experiment.tags) == {"dataset:digits", "method:guided", "seed:0"}
    for index, session in enumerate(sessions_of(experiment)):
        assert session.name == f"digits · guided · seed 0 · session {index}"
        assert set(session.tags) == set(experiment.tags)


def test_tasks_are_named_by_session_and_epoch_and_have_no_tags(experiment: FlowRun) -> None:
    session = sessions_of(experiment)[1]
    below = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[session.id]))
    tasks = client().read_task_runs(task_run_filter=below)
    names = {task.name for task in tasks}
    assert {
        "regenerate · session 1 · A_0",
        "train_classifier · session 1 · epoch 0",
        "evaluate_test · session 1",
    } <= names
    assert len(names) == len(tasks)
    assert not any(task.tags for task in tasks), "Prefect asks for a limit of each tag around each task"


def test_the_log_of_a_run_says_what_happened(experiment: FlowRun) -> None:
    first, *between, last = log_of(experiment)
    assert "results in runs/digits/guided/seed-0" in first
    assert [line.partition(":")[0] for line in between] == ["session 0", "session 1", "session 2"]
    assert last.startswith("done: A_base ")
    for index, session in enumerate(sessions_of(experiment)):
        *epochs, end = log_of(session)
        assert end == between[index]
        assert epochs
        assert epochs[0].startswith(f"session {index} epoch 0: validation ")


def test_a_line_is_in_the_log_and_once_in_the_terminal(
    prefect_server: None, capfd: pytest.CaptureFixture[str]
) -> None:
    @flow
    def talking() -> FlowRun:
        say("[once] and no more")
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        return context.flow_run

    assert log_of(talking()) == ["[once] and no more"]
    out, err = capfd.readouterr()
    assert (out + err).count("once") == 1, out + err


def test_outside_a_run_nothing_is_logged_or_tagged(capfd: pytest.CaptureFixture[str]) -> None:
    note("nobody reads this")
    tag_run("dataset:none")
    assert capfd.readouterr() == ("", "")


def test_each_session_has_its_page_and_the_experiment_its_table(experiment: FlowRun) -> None:
    link, table = sorted(artifacts_of(experiment), key=lambda artifact: str(artifact.key))
    assert link.key == "digits-guided-seed-0-mlflow"
    assert table.key == "session-accuracy"
    (parent,) = re.findall(rf"http://127\.0\.0\.1:5000/#/experiments/\d+/runs/{RUN_ID}", str(link.data))
    for index, session in enumerate(sessions_of(experiment)):
        (page,) = [a for a in artifacts_of(session) if a.type == "markdown"]  # slow stages have progress too
        assert page.key == f"digits-guided-seed-0-session-{index}"
        assert page.type == "markdown"
        text = str(page.data)
        assert f"Results: `runs/digits/guided/seed-0/session-{index:02d}`" in text
        assert "Contact sheet of A_1" in text
        (page_there,) = re.findall(rf"http://127\.0\.0\.1:5000/#/experiments/\d+/runs/{RUN_ID}", text)
        assert page_there != parent
        assert len(text) < 100_000
