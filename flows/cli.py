"""What the commands share: the terminal, exit codes, errors that are for the user, and a Prefect server to run on."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from tasks.whereabouts import with_place

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
SERVER_START_S, LOGS_S = 180, 5

console = Console(stderr=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; like an interrupt it ends whatever runs, in order."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise Terminated for as long as the block lasts; outside of the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quieten(prefect_level: str = "WARNING") -> None:
    """Settings that Prefect, diffusers and transformers read when they are imported."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", prefect_level)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "prefect" not in sys.modules:
        home = os.environ.setdefault("PREFECT_HOME", str(Path(".fscil/prefect").resolve()))
        Path(home).mkdir(parents=True, exist_ok=True)


@contextmanager
def prefect_server() -> Iterator[None]:
    """Use the Prefect server of the settings if it listens; else run one for as long as the block lasts."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = PREFECT_API_URL.value()
    if url and _listens(url):
        yield
        return
    from prefect.logging.handlers import APILogWorker
    from prefect.server.api.server import SubprocessASGIServer

    with temporary_settings({PREFECT_API_URL: None}):
        server = SubprocessASGIServer()
        server.start(timeout=SERVER_START_S)
        assert server.server_process is not None, "it was started just now"
        guard = _ends_with_us(server.server_process.pid)
        try:
            with temporary_settings({PREFECT_API_URL: server.api_url}):
                yield
        finally:
            APILogWorker.drain_all(timeout=LOGS_S)  # what is not sent by now has nowhere to go
            server.stop()
            guard.kill()
            guard.wait()


def _ends_with_us(process: int) -> subprocess.Popen[bytes]:
    """A shell that ends a process once this one is gone, even if by ``kill -9``: its pipe closes then."""
    return subprocess.Popen(
        ["/bin/sh", "-c", f"read _; kill {process}"],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 80), timeout=0.5):
            return True
    except OSError:
        return False


def known_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user; anything else is a fault of ours and keeps its traceback."""
    from flows.experiment import RunError
    from flows.rerun import ReplayError
    from tasks.store import StoreError
    from tasks.vlm.transport import VlmError

    return (ValueError, RunError, ReplayError, StoreError, VlmError, OSError)


def fail(error: Exception, code: int) -> int:
    """Say what went wrong; return the exit code."""
    console.print(f"error: {with_place(error)}", style="red", highlight=False, markup=False, soft_wrap=True)
    return code
