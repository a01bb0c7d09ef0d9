"""Experiments of one `dvc repro` are run by one process that has imported everything (flows/warm_server.py).

DVC starts a program for each experiment, of which importing is half where nothing is drawn. The first of them leaves
a server behind. Who comes hands over its arguments, environment and terminal, passes signals on, and ends as the
process that the server forked for it did. Where no server can be had, an experiment runs as ever.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flows.cli import EXIT_FAILED, EXIT_TERMINATED, Terminated, fail, terminable

START_S, ENDING_S, POLL_S = 120, 60, 0.05

turn: socket.socket | None = None
"""Of an experiment that was begun ahead: where it asks the server whether it may write down what it came to."""


def socket_of(dvc: int) -> Path:
    """Where the server of a `dvc` process listens."""
    return Path(".fscil") / f"warm-{dvc}.sock"


def run_warm(arguments: Sequence[str]) -> int | None:
    """Have the server of this `dvc` process run a command.

    Args:
        arguments: of ``fscil``.

    Returns:
        Its exit code; None where there is no such server: not below DVC, not on this system, or of other code or settings.
    """
    if "DVC_STAGE" not in os.environ or not hasattr(os, "pidfd_open"):
        return None
    try:
        if (dvc := _dvc()) is None:
            return None
        watched = os.pidfd_open(dvc)
        if _dvc() != dvc:
            return EXIT_TERMINATED
    except (ProcessLookupError, FileNotFoundError):
        return EXIT_TERMINATED  # DVC has gone
    except OSError:
        return None  # a kernel or container that has no such call, though Python has
    try:
        server = _handed_over(dvc, arguments)
    except OSError:
        threading.Thread(target=_end_with, args=[watched], daemon=True).start()
        return None
    with server:
        return _waited(server)


def await_turn() -> None:
    """Return once DVC has asked for this experiment: it deletes what its stage wrote before.

    Raises:
        Terminated: the server has gone, and nobody will ask.
    """
    if turn is not None:
        turn.send(b"?")
        if not turn.recv(1):
            raise Terminated


def _end_with(watched: int) -> None:
    """Ask this process to end once the watched one has."""
    select.select([watched], [], [])
    os.kill(os.getpid(), signal.SIGTERM)


def _dvc() -> int | None:
    """The process that runs the stages: this one's parent, or that one's if it is a shell; None if it is no ``dvc``.

    Raises:
        OSError: it has gone.
    """
    parent = os.getppid()
    if b"-m flows" in (said := _command_line(parent)):
        parent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        said = _command_line(parent)
    if b"dvc" in said:
        return parent
    if parent == 1:
        raise ProcessLookupError("orphaned")
    return None


def _command_line(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ")


def _handed_over(dvc: int, arguments: Sequence[str]) -> socket.socket:
    """A connection to the server of this `dvc` process, which has taken the command over.

    Raises:
        OSError: there is none, or it is not one of the code and settings as they are now.
    """
    given = {"arguments": list(arguments), "program": sys.argv[0], "environment": dict(os.environ)}
    message = json.dumps(given).encode()
    server = _connected(dvc)
    try:
        socket.send_fds(server, [len(message).to_bytes(8, "big")], [sys.stdout.fileno(), sys.stderr.fileno()])
        server.sendall(message)
        if not server.recv(1):
            raise ConnectionError("it was not taken over")
    except BaseException:
        server.close()
        raise
    return server


def _connected(dvc: int) -> socket.socket:
    path = socket_of(dvc)
    path.parent.mkdir(exist_ok=True)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
        return connection
    except OSError:
        path.unlink(missing_ok=True)
    _await_the_end_of_others(path.parent)
    with path.with_name("warm.log").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.warm_server", str(dvc)],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        try:
            connection.connect(str(path))
            return connection
        except OSError:
            time.sleep(POLL_S)
    raise OSError("the server did not start")


def _await_the_end_of_others(folder: Path) -> None:
    """Give the servers of `dvc` processes that have ended the time to end what works for them: it may be the same run."""
    until = time.monotonic() + ENDING_S
    for path in folder.glob("warm-*.sock"):
        while not _runs(path) and time.monotonic() < until:
            with socket.socket(socket.AF_UNIX) as connection:
                try:
                    connection.connect(str(path))
                except OSError:
                    path.unlink(missing_ok=True)
                    break
            time.sleep(POLL_S)


def _runs(path: Path) -> bool:
    """Whether the `dvc` process does that the socket is named after."""
    try:
        return b"dvc" in _command_line(int(path.stem.partition("-")[2]))
    except (OSError, ValueError):
        return False


def _waited(server: socket.socket) -> int:
    """Pass on what this process is asked to do until the other one has ended."""
    with terminable():
        while True:
            try:
                if code := server.recv(8):
                    return int.from_bytes(code, "big")
                return _died()
            except OSError:
                return _died()
            except KeyboardInterrupt as stop:
                with suppress(OSError):
                    server.send(bytes([signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT]))


def _died() -> int:
    return fail(ConnectionError("the process that runs the experiments died"), EXIT_FAILED)
