"""An interrupt is an interrupt, wherever in a library it arrives."""

import asyncio
import errno
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from prefect import task_engine
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import TerminationSignal
from prefect.utilities.callables import cloudpickle_wrapped_call
from prefect.utilities.engine import capture_sigterm

from flows.__main__ import main
from flows.cli import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Terminated,
    fail,
    noted,
    stop_under,
    terminable,
)
from flows.experiment import fscil
from flows.interrupts import interrupts_first
from flows.session import run_session
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


@pytest.mark.parametrize(
    ("stop", "ends"),
    [
        (Terminated(), Terminated),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (TerminationSignal(signal=signal.SIGTERM), Terminated),  # Prefect's, while a flow runs
    ],
)
def test_an_interrupt_that_arrives_while_python_clears_up_is_not_lost(
    stop: BaseException, ends: type[KeyboardInterrupt], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a callback of a weak reference, whose errors Python drops."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Thing:
        pass

    def arrives(_: object) -> NoReturn:
        raise stop

    def clears_up() -> None:
        thing = Thing()
        watched = weakref.ref(thing, arrives)
        del thing
        assert watched() is None
        time.sleep(10)

    with pytest.raises(ends) as ended, terminable():
        clears_up()
    assert type(ended.value) is ends
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("under_prefect", [False, True])
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, EXIT_TERMINATED, "terminated"), (signal.SIGINT, EXIT_INTERRUPTED, "interrupted")],
)
def test_an_interrupt_of_which_code_in_c_made_an_error_of_its_own_is_one(
    number: int,
    code: int,
    said: str,
    under_prefect: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As torch does, which clears the error and says that it could not determine a shape."""

    def arrives() -> NoReturn:
        with suppress(KeyboardInterrupt, TerminationSignal):
            os.kill(os.getpid(), number)
        raise ValueError("could not determine the shape")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may have had it ignored
    for where in ("flows.config.compose", "flows.__main__.expand"):
        with monkeypatch.context() as patched:
            patched.setattr(where, lambda *_, **__: while_flow(arrives) if under_prefect else arrives())
            assert main(["dataset=digits"]) == code
        assert capsys.readouterr().err.startswith(f"{said}; nothing sealed is lost")
    assert main(["no such override"]) == EXIT_USAGE, "the next command knows nothing of it"


def while_flow(call: Callable[[], NoReturn]) -> NoReturn:
    """Call under the handler of SIGTERM that Prefect sets while a flow runs."""
    with capture_sigterm():
        call()


def test_an_end_that_prefect_asked_for_is_one_outside_of_its_flow_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def arrives(*_: object, **__: object) -> NoReturn:
        try:
            raise TerminationSignal(signal=signal.SIGTERM)
        finally:
            raise KeyError("an error that is no user's")

    monkeypatch.setattr("flows.config.compose", arrives)
    assert main(["dataset=digits"]) == EXIT_TERMINATED
    assert capsys.readouterr().err.startswith("terminated; nothing sealed is lost")


def test_a_signal_of_a_process_that_was_forked_is_its_own() -> None:
    with terminable():
        if (child := os.fork()) == 0:
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.waitpid(child, 0)
        assert stop_under(ValueError("of this process")) is None


def test_what_another_library_waits_for_signals_with_is_given_back() -> None:
    heard, written = os.pipe()
    os.set_blocking(written, False)
    before = signal.set_wakeup_fd(written)
    try:
        with terminable(), suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        assert signal.set_wakeup_fd(before) == written
        os.close(written)
    assert os.read(heard, 8) == b""
    os.close(heard)


def test_an_interrupt_that_was_swallowed_ends_the_run_after_the_epoch(
    digits: Path, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by who goes on without MLflow, or by Prefect as a flow ends."""
    place, epochs = Place(tmp_path, digits), []

    def swallows(*_: object) -> None:
        epochs.append(1)
        with suppress(KeyboardInterrupt, TerminationSignal):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("flows.session.say_epoch", swallows)
    with pytest.raises(Terminated), terminable():
        fscil("digits", "finetune", 0, place.overrides())
    assert len(epochs) == 1
    assert noted() is None, "the next command knows nothing of it"


def test_other_errors_that_python_drops_are_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))

    class Thing:
        def __del__(self) -> None:
            raise OSError("on the way out")

    with terminable():
        Thing()
    assert told == [OSError]
    with terminable(), terminable():
        pass
    Thing()
    assert told == [OSError, OSError], "the hook is the one that was there before"


def test_a_timeout_is_no_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    """asyncio raises it in answer to a cancellation, which is no Exception either."""

    @interrupts_first()
    def waits() -> None:
        try:
            asyncio.run(asyncio.wait_for(asyncio.sleep(5), 0.01))
        except TimeoutError as late:
            raise ValueError("no answer") from late

    with pytest.raises(ValueError, match="no answer") as told:
        waits()
    late = told.value.__context__
    assert late is not None
    assert isinstance(late.__context__, asyncio.CancelledError)
    error = ValueError("too slow")
    error.__context__ = asyncio.CancelledError()
    assert fail(error, EXIT_USAGE) == EXIT_USAGE
    assert "too slow" in capsys.readouterr().err


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


def test_the_flow_of_a_session_can_be_sent_to_another_process() -> None:
    """Ray sends it with each shard; what looks for interrupts around it cannot be sent."""
    cloudpickle_wrapped_call(run_session.fn)  # TypeError if it cannot
    with pytest.raises(TypeError, match="pickle"):
        cloudpickle_wrapped_call(interrupts_first()(run_session.fn))
