"""The process that runs the experiments of one `dvc repro`: it has imported everything, and forks for each.

It keeps one Prefect server, lives as long as the `dvc` process, and ends what works for it. DVC runs one stage after
another. Where the profile says that several experiments run at a time (``at_once``), those that DVC will ask for
next are begun meanwhile; what they print is shown when it asks. Each then has its share of the processor's threads.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import IO, Any

from flows import warm
from flows.cli import quieten
from flows.own_server import keep_server

IMPORTED = (
    "flows.experiment",
    "flows.reproduce",
    "mlflow",
    "peft",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
)
"""What experiments import at one point or another. None of it starts a Python thread or touches a GPU."""

PR_SET_PDEATHSIG = 1
"""Of Linux, see prctl(2)."""

SHOWN_S = 0.2
"""How often what an experiment prints that was begun ahead is shown, once it is asked for."""

_kept: list[ExitStack] = []


@dataclass
class Job:
    """An experiment in a process of its own."""

    name: str
    child: int
    ended: int  # pidfd
    said: IO[bytes] | None = None  # of one begun ahead: what it prints
    turn: socket.socket | None = None  # of one begun ahead: see flows.warm.turn
    waits: bool = False  # has come to its end, and is not asked for yet
    asked: bool = False
    client: socket.socket | None = None
    streams: list[int] = field(default_factory=list)
    shown: int = 0
    stopped: bool = False

    @property
    def sources(self) -> list[int]:
        """Descriptors at which something may happen."""
        waiting = [] if self.turn is None or self.waits else [self.turn.fileno()]
        return [self.ended, *waiting, *([self.client.fileno()] if self.client else [])]

    def ask(self, client: socket.socket, streams: list[int]) -> None:
        """DVC wants it now."""
        self.client, self.asked = client, True
        if self.turn is None:  # its output goes there by itself
            for stream in streams:
                os.close(stream)
        else:
            self.streams = streams
            self.turn.send(b"!")

    def attend(self, ready: list[int]) -> None:
        """Pass signals on, note that it waits, show what it prints."""
        if self.turn is not None and self.turn.fileno() in ready and not self.waits:
            self.waits = bool(self.turn.recv(1))
        if self.client is not None and self.client.fileno() in ready:
            if asked := self.client.recv(1):
                self.stop(asked[0])
            else:  # who asked was killed
                self.client.close()
                self.client = None
                self.stop()
        self.show()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal; one that is ending already would take a second request to end for impatience."""
        if number != signal.SIGTERM or not self.stopped:
            with suppress(ProcessLookupError):
                os.kill(self.child, number)
        self.stopped = True

    def show(self) -> None:
        """Print what it has printed since."""
        while self.said is not None and self.streams:
            if not (more := os.pread(self.said.fileno(), 1 << 16, self.shown)):
                return
            self.shown += len(more)
            with suppress(OSError):  # who asked may have gone
                os.write(self.streams[0], more)

    def reap(self) -> int:
        """Its exit code, once it has ended; told to who asked."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        code = code if code >= 0 else 128 - code
        self.show()
        if self.client is not None:
            with suppress(OSError):
                self.client.send(code.to_bytes(8, "big"))
            self.client.close()
        for descriptor in (*self.streams, self.ended):
            os.close(descriptor)
        for thing in (self.said, self.turn):
            if thing is not None:
                thing.close()
        return code


class Server:
    """Forks for each experiment that is asked for, and for those that will be."""

    def __init__(self, dvc: int, at_once: int) -> None:
        """Args: dvc: whose stages these are; at_once: experiments that may be under way."""
        self._dvc, self._at_once = dvc, at_once
        self._path = warm.socket_of(dvc)
        self._watched = os.pidfd_open(dvc)
        self._jobs: dict[str, Job] = {}
        self._done: set[str] = set()
        self._given: dict[str, Any] = {}
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self._path))
        self._path.chmod(0o600)
        self._listening.listen()

    def serve(self) -> dict[str, Any] | None:
        """Work until the `dvc` process ends.

        Returns:
            In a forked process what it is to become; in the server, at its end, None.
        """
        while self._watched not in (ready := self._ready()):
            if self._listening.fileno() in ready and (forked := self._accept()):
                return forked
            for job in list(self._jobs.values()):
                job.attend(ready)
                if job.ended in ready:
                    self._end(job)
            if forked := self._begin_ahead():
                return forked
        for job in self._jobs.values():
            job.stop()
        for job in self._jobs.values():
            job.reap()
        self._path.unlink()
        return None

    def _ready(self) -> list[int]:
        sources = [self._watched, self._listening.fileno()]
        sources += [source for job in self._jobs.values() for source in job.sources]
        shows = any(job.said is not None and job.client is not None for job in self._jobs.values())
        return select.select(sources, [], [], SHOWN_S if shows else None)[0]

    def _accept(self) -> dict[str, Any] | None:
        connection, _ = self._listening.accept()
        try:
            given, streams = _received(connection)
        except (OSError, ValueError):  # of one that was killed on its way in
            connection.close()
            return None
        self._given, name = given, " ".join(given["arguments"])
        if (job := self._jobs.get(name)) is None and (job := self._forked(name)) is None:
            return {**given, "streams": streams}
        job.ask(connection, streams)
        return None

    def _forked(self, name: str, said: IO[bytes] | None = None) -> Job | None:
        """A new job; None in the process that is to do it."""
        ours, its = socket.socketpair() if said is not None else (None, None)
        server = os.getpid()
        if (child := os.fork()) == 0:
            _end_with_the_server(server)
            warm.turn = its
            self._forget(ours)
            return None
        if its is not None:
            its.close()
        self._jobs[name] = Job(name, child, os.pidfd_open(child), said, ours)
        return self._jobs[name]

    def _forget(self, ours: socket.socket | None) -> None:
        """In a forked process: let go of what is the server's and other experiments'."""
        for thing in (self._listening, ours, *(job.client for job in self._jobs.values())):
            if thing is not None:
                thing.close()
        for job in self._jobs.values():
            for stream in job.streams:
                os.close(stream)
            if job.turn is not None:
                job.turn.close()

    def _end(self, job: Job) -> None:
        code = job.reap()
        del self._jobs[job.name]
        self._done.add(job.name)  # one that failed ahead is begun anew when it is asked for
        if code:
            self._at_once = 1  # DVC will end
        how = "" if job.said is None else ", begun ahead" if job.asked else ", begun ahead and not asked for"
        print(f"{job.name}: {code}{how}", file=sys.stderr, flush=True)

    def _begin_ahead(self) -> dict[str, Any] | None:
        """Begin the next experiments; in a forked process what it is to become."""
        while self._at_once > 1 and self._given and self._room():
            if (name := next(self._to_come(), None)) is None:
                return None
            said = tempfile.TemporaryFile()  # noqa: SIM115 - the job closes it
            if self._forked(name, said) is None:
                streams = [os.dup(said.fileno()), os.dup(said.fileno())]
                return {**self._given, "arguments": name.split(" "), "streams": streams}
        return None

    def _room(self) -> bool:
        """Whether another one may be begun: so many work at once, and no more wait for their turn."""
        working = sum(job.asked or not job.waits for job in self._jobs.values())
        unasked = sum(not job.asked for job in self._jobs.values())
        return working < self._at_once and unasked < self._at_once

    def _to_come(self) -> Iterator[str]:
        """What DVC will ask for, in its order."""
        from flows.reproduce import cell_file, read_profile

        profile = read_profile()
        for dataset, method, seed in product(profile.datasets, profile.methods, profile.seeds):
            name = f"cell {dataset} {method} {seed}"
            known = name in self._jobs or name in self._done
            if not known and not cell_file(dataset, method, seed).exists():
                yield name


def all_stages(dvc: int) -> bool:
    """Whether a `dvc` process reproduces whatever has changed, and not stages that it was given."""
    said = Path(f"/proc/{dvc}/cmdline").read_bytes().decode().split("\0")[:-1]
    rest = said[said.index("repro") + 1 :] if "repro" in said else ["?"]
    return all(word.startswith("-") for word in rest)


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, streams, _, _ = socket.recv_fds(connection, 8, 2)
    message = b""
    while len(message) < int.from_bytes(size, "big"):
        if not (part := connection.recv(1 << 16)):
            raise ConnectionError("who came has gone")
        message += part
    return json.loads(message), streams


def _end_with_the_server(server: int) -> None:
    """Have the kernel ask this process to end if its parent dies: nobody would tell it anything any more."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != server:
        os.kill(os.getpid(), signal.SIGTERM)


def _become(given: dict[str, Any]) -> None:
    """Take the place of who came: its terminal, environment and arguments."""
    for target, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *given["streams"])):
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


def main(dvc: int) -> int:
    """Be the server; in a forked process, the experiment."""
    quieten()
    for name in IMPORTED:
        import_module(name)
    from flows.reproduce import read_profile

    with ExitStack() as kept:
        keep_server(kept)
        server = Server(dvc, read_profile().at_once if all_stages(dvc) else 1)
        if (given := server.serve()) is None:
            return 0
        _kept.append(kept.pop_all())  # the server ends what is in it; its address stays known here
    _become(given)
    from flows.__main__ import main as run

    return run(given["arguments"])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
