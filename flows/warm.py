"""Experiments of one `dvc repro` share one process that has imported everything, and one Prefect server.

DVC starts a program for each experiment, of which importing is half where nothing is drawn. The first of them leaves
a server behind, which forks for each that comes: who comes hands over its arguments, environment and terminal,
passes signals on, and ends as the forked process did. The server lives as long as the `dvc` process, and ends what
works for it. Where it cannot be had, an experiment runs as ever.
"""

import ctypes
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
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from flows.cli import EXIT_FAILED, EXIT_TERMINATED, Terminated, fail, quieten, terminable
from flows.own_server import keep_server

START_S, POLL_S = 120, 0.05
PR_SET_PDEATHSIG = 1
"""Of Linux, see prctl(2)."""
IMPORTED = (
    "flows.experiment",
    "flows.reproduce",
    "mlflow",
    "peft",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
)
"""What experiments import at one point or another. None of it starts a Python thread or touches a GPU."""

_FOLDER = Path(".fscil")
_kept = ExitStack()


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
    _FOLDER.mkdir(exist_ok=True)
    path = _FOLDER / f"warm-{dvc}.sock"
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
        return connection
    except OSError:
        path.unlink(missing_ok=True)
    with (_FOLDER / "warm.log").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(dvc)],
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


# ------------------------------------------------------------------------------------------ the server


def serve(dvc: int) -> list[str] | None:
    """Fork for each who comes, until the `dvc` process ends.

    Returns:
        In a forked process the arguments that it is to run; in the server, at its end, None.
    """
    watched = os.pidfd_open(dvc)
    for name in IMPORTED:
        import_module(name)
    keep_server(_kept)
    path = _FOLDER / f"warm-{dvc}.sock"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen()
    while watched not in select.select([listening.fileno(), watched], [], [])[0]:
        connection, _ = listening.accept()
        try:
            given, streams = _received(connection)
        except (OSError, ValueError):  # of one that was killed on its way in
            connection.close()
            continue
        child = os.fork()
        if child == 0:
            _end_with_the_server()
            listening.close()
            connection.close()
            _become(given, streams)
            return list(given["arguments"])
        for stream in streams:
            os.close(stream)
        code = _watched_over(child, connection, watched)
        print(f"{' '.join(given['arguments'])}: {code}", file=sys.stderr, flush=True)
        with suppress(OSError):  # who came may have been killed
            connection.send(code.to_bytes(8, "big"))
        connection.close()
    path.unlink()
    _kept.close()
    return None


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, streams, _, _ = socket.recv_fds(connection, 8, 2)
    message = b""
    while len(message) < int.from_bytes(size, "big"):
        if not (part := connection.recv(1 << 16)):
            raise ConnectionError("who came has gone")
        message += part
    return json.loads(message), streams


def _end_with_the_server() -> None:
    """Have the kernel ask this process to end if its parent dies: nobody would tell it anything any more."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _become(given: dict[str, Any], streams: list[int]) -> None:
    """Take the place of who came: its terminal, environment and arguments."""
    for target, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(stream, target)
        os.close(stream)
    sys.stdout, sys.stderr = (  # the server's own remember that they were a file
        open(target, "w", 1, stream.encoding, stream.errors, closefd=False)  # noqa: SIM115
        for target, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    os.environ.clear()
    os.environ.update(given["environment"])
    del os.environ["DVC_STAGE"]  # else it would look for a server itself
    sys.argv = [given["program"], *given["arguments"]]


def _watched_over(child: int, connection: socket.socket, dvc: int) -> int:
    """Pass signals on until the process has ended; it is ended if who came, or `dvc`, dies. Its exit code."""
    ended, told = os.pidfd_open(child), False
    sources = [ended, connection.fileno(), dvc]
    while ended not in (ready := select.select(sources, [], [])[0]):
        asked = connection.recv(1) if connection.fileno() in ready else b""
        if asked or not told:  # one that is ending already would take another for impatience
            os.kill(child, asked[0] if asked else signal.SIGTERM)
        sources, told = (sources if asked else [ended]), True
    os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    quieten()
    if (wanted := serve(int(sys.argv[1]))) is not None:
        from flows.__main__ import main

        sys.exit(main(wanted))
