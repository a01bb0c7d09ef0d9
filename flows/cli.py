"""What the commands share: the terminal, exit codes, and errors that are for the user."""

import _thread
import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from tasks.disk import DiskError, writing
from tasks.text import readable
from tasks.whereabouts import with_place

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
ERROR_CHARS = 8000
SPINS = "5000"
"""How long a thread of torch waits busily for the others. By default so long that two runs on one machine, whose
threads wait for some that the other run's keep from working, take thirty times as long; alone it makes no difference."""

REQUEST_S = "10"
"""What Prefect's client waits for each answer, six times in all. By default so long, a minute, that a run whose server
hangs ends after a quarter of an hour."""

console = Console(stderr=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; like an interrupt it ends whatever runs, in order."""


AGAIN_S = 0.05
_pipes: list[int] = []
"""Where Python writes the number of each signal that arrives, whoever handles it: of each `terminable` an end to read."""
_arrived: list[int] = []
"""What was read there, by the command that is under way."""

# a process that is forked would write its signals into the same pipe
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1) if _pipes else None)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise Terminated for as long as the block lasts; outside of the main thread nothing changes.

    SIGTERM and SIGINT may arrive where what they raise is lost: while Python clears up, in a callback whose errors it
    drops, once in thirty times; then they are sent again. Or amid code in C, which makes an error of its own of it;
    then :func:`stop_under` knows that they had arrived, under the handler that Prefect sets while a flow runs as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    lasts = [True]

    def dropped(error: "sys.UnraisableHookArgs") -> None:
        if (number := _number(error.exc_value)) is None:
            return told(error)
        # not threading's, whose locks this thread may hold just now
        _thread.start_new_thread(again, (number,))

    def again(number: int) -> None:
        time.sleep(AGAIN_S)
        if lasts:
            os.kill(os.getpid(), number)

    told, sys.unraisablehook = sys.unraisablehook, dropped
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _arrive)}
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # else it is ignored, or somebody else's
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _arrive)
    pipe = os.pipe()
    for end in pipe:
        os.set_blocking(end, False)
    _pipes.append(pipe[0])
    outer = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
    try:
        yield
    except BaseException as stop:
        if _number(stop) == signal.SIGTERM and not isinstance(stop, Terminated):  # Prefect's, out of its flow
            raise Terminated from stop
        raise
    finally:
        lasts.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = told
        signal.set_wakeup_fd(outer)
        _pipes.pop()
        for end in pipe:
            os.close(end)
        _arrived.clear()


def _number(stop: BaseException | None) -> int | None:
    """The signal that an exception was raised for: by this module, by Python, or by Prefect while a flow runs."""
    if isinstance(stop, KeyboardInterrupt):
        return signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    return getattr(stop, "signal", None) if type(stop).__name__ == "TerminationSignal" else None


def _arrive(number: int, _: object) -> NoReturn:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def noted() -> KeyboardInterrupt | None:
    """What the last signal that has arrived is to raise, if one has."""
    with suppress(IndexError, BlockingIOError):
        numbers = os.read(_pipes[-1], 4096)
        _arrived.extend(number for number in numbers if number in (signal.SIGTERM, signal.SIGINT))
    if not _arrived:
        return None
    return Terminated() if _arrived[-1] == signal.SIGTERM else KeyboardInterrupt()


def stop_under(error: BaseException) -> BaseException | None:
    """The interrupt or request to end that an error was raised in answer to; a timeout's cancellation is none."""
    under = error.__context__
    while under is not None and _number(under) is None:
        under = under.__context__
    return under or noted()


def speak_plainly() -> None:
    """Print what the terminal's encoding does not have as escapes, where Python would end with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quieten(prefect_level: str = "WARNING") -> None:
    """Settings that Prefect, MLflow, diffusers, transformers and torch read when they are imported.

    Raises:
        DiskError: Prefect's folder cannot be made.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", prefect_level)
    os.environ.setdefault("PREFECT_API_REQUEST_TIMEOUT", REQUEST_S)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    if "prefect" not in sys.modules:
        home = os.environ.setdefault("PREFECT_HOME", str(Path(".fscil/prefect").resolve()))
        with in_prefect_home(Path(home)):
            Path(home).mkdir(parents=True, exist_ok=True)


@contextmanager
def in_prefect_home(home: Path) -> Iterator[None]:
    """Let the disk's errors of a block that writes to Prefect's folder say what to do, and what names the folder.

    Raises:
        DiskError: the disk is full, fails or is read-only.
    """
    try:
        with writing(home):
            yield
    except DiskError as error:
        raise DiskError(f"{error} (PREFECT_HOME names Prefect's)") from error


@contextmanager
def failures_told_once() -> Iterator[None]:
    """Keep what Prefect says of a failing run off the terminal while the block lasts: its server has it all.

    An error that is for the user is then one sentence; any other one's traceback is printed by Python.
    """

    def by_others(record: logging.LogRecord) -> bool:
        return not (
            record.name in ("prefect.flow_runs", "prefect.task_runs") and record.levelno >= logging.ERROR
        )

    handlers = logging.getLogger().handlers[:]
    for handler in handlers:
        handler.addFilter(by_others)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(by_others)


def known_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user; anything else is a fault of ours and keeps its traceback."""
    from flows.experiment import RunError
    from flows.rerun import ReplayError
    from tasks.store import StoreError
    from tasks.vlm.transport import VlmError

    return (ValueError, RunError, ReplayError, StoreError, VlmError, OSError)


def fail(error: Exception, code: int) -> int:
    """Say what went wrong; return the exit code.

    Raises:
        BaseException: the interrupt that a library has answered with this error, unless a disk or a server speaks.
    """
    if not isinstance(error, OSError) and (stop := stop_under(error)):
        raise (stop if isinstance(stop, KeyboardInterrupt) else Terminated()) from error
    console.print(
        f"error: {readable(with_place(error), ERROR_CHARS)}",
        style="red",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return code
