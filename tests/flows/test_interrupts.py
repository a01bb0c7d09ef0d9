"""An interrupt is an interrupt, wherever in a library it arrives."""

import errno
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from prefect import task_engine
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort

from flows.__main__ import main
from flows.cli import EXIT_TERMINATED, Terminated
from flows.experiment import fscil
from flows.interrupts import interrupts_first
from tests.conftest import Place
from tests.crowd import runs_in


def test_an_interrupt_while_prefect_begins_a_task_ends_the_run_as_one(
    digits: Path, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arrives(**_: object) -> NoReturn:
        raise Terminated

    place = Place(tmp_path, digits)
    monkeypatch.setattr(task_engine, "_create_task_run_locally", arrives)
    with pytest.raises(Terminated):
        fscil("digits", "finetune", 0, place.overrides(tracking=True))
    assert {status for _, status in runs_in(place)} == {"KILLED"}
    with get_client(sync_client=True) as client:
        last = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=2)
    assert {run.state.type.value for run in last if run.state} == {"CRASHED"}, (
        "neither ended by a fault of its own"
    )


@pytest.mark.parametrize("where", ["flows.config.compose", "flows.__main__.expand"])
def test_an_interrupt_while_settings_are_read_is_no_wrong_setting(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def arrives(*_: object, **__: object) -> NoReturn:
        try:
            raise Terminated
        finally:
            raise AttributeError("of what OmegaConf left half done")

    monkeypatch.setattr(where, arrives)
    assert main(["dataset=digits"]) == EXIT_TERMINATED
    assert capsys.readouterr().err.startswith("terminated; nothing sealed is lost")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no space left"),
        httpx.ConnectError("lost"),
        RuntimeError("Failed to reach API at somewhere"),
    ],
)
def test_a_full_disk_and_a_lost_server_are_told_of(error: Exception) -> None:
    @interrupts_first()
    def stopped() -> NoReturn:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise error  # noqa: B904 - as a library does

    with pytest.raises(type(error)):
        stopped()
