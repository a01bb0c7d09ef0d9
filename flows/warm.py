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
from pathlib import Path

from flows.cli import EXIT_FAILED, EXIT_TERMINATED, Terminated, fail, terminable

START_S, POLL_S = 120, 0.05

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
        Its exit code; None where there is no such server: not below DVC, or not on this system.
    """
    if "DVC_STAGE" not in os.environ or not hasattr(os, "pidfd_open"):
        return None
    dvc = _dvc()
    try:
        watched = os.pidfd_open(dvc)
    except OSError:
        return EXIT_TERMINATED  # DVC has gone
    try:
        with _connected(dvc) as server:
            given = {"arguments": list(arguments), "program": sys.argv[0], "environment": dict(os.environ)}
            message = json.dumps(given).encode()
            socket.send_fds(
                server, [len(message).to_bytes(8, "big")], [sys.stdout.fileno(), sys.stderr.fileno()]
            )
            server.sendall(message)
            return _waited(server)
    except OSError:
        threading.Thread(target=_end_with, args=[watched], daemon=True).start()
        return None


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


def _dvc() -> int:
    """The process that runs the stages: this one's parent, or that one's if it is a shell."""
    parent = os.getppid()
    if b"-m flows" in Path(f"/proc/{parent}/cmdline").read_bytes():
        parent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    return parent


def _connected(dvc: int) -> socket.socket:
    path = socket_of(dvc)
    path.parent.mkdir(exist_ok=True)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
        return connection
    except OSError:
        path.unlink(missing_ok=True)
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


def _waited(server: socket.socket) -> int:
    """Pass on what this process is asked to do until the other one has ended."""
    with terminable():
        while True:
            try:
                if code := server.recv(8):
                    return int.from_bytes(code, "big")
                return fail(ConnectionError("the process that runs the experiments died"), EXIT_FAILED)
            except KeyboardInterrupt as stop:
                server.send(bytes([signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT]))
