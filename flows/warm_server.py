"""The process that runs the experiments of one `dvc repro`: it has imported everything, and forks for each.

It keeps one Prefect server, lives as long as the `dvc` process, and ends what works for it. DVC runs one stage after
another. Where the profile says that several experiments run at a time (``at_once``), those that DVC will ask for
next are begun meanwhile; what they print is shown when it asks. Each then has its share of the processor's threads.

Who comes after code or settings were changed is sent away and runs by itself: this process is made of the old ones.
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain, product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flows import warm
from flows.cli import quieten
from flows.own_server import keep_server

if TYPE_CHECKING:
    from flows.reproduce import Cell, Profile

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

ASKED = {signal.SIGINT, signal.SIGTERM}

ORDERLY_S = 60.0
"""What an experiment may take to end once it was asked to."""

SHOWN_S = 0.2
"""How often what an experiment prints that was begun ahead is shown, once it is asked for."""

Source = tuple[str, int, int]

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
    gone: bool = False  # has ended, and is not reaped yet

    @property
    def sources(self) -> list[int]:
        """Descriptors at which something may happen."""
        ending = [] if self.gone else [self.ended]
        waiting = [] if self.turn is None or self.waits or self.gone else [self.turn.fileno()]
        return [*ending, *waiting, *([self.client.fileno()] if self.client else [])]

    @property
    def shows(self) -> bool:
        """Whether somebody wants to see what it prints into a file."""
        return self.said is not None and self.client is not None

    def ask(self, client: socket.socket, streams: list[int]) -> None:
        """DVC wants it now."""
        self.client, self.asked = client, True
        if self.turn is None:  # its output goes there by itself
            for stream in streams:
                os.close(stream)
        else:
            self.streams = streams
            with suppress(OSError):  # it has ended this moment
                self.turn.send(b"!")

    def attend(self, ready: list[int]) -> None:
        """Pass signals on, note that it waits or has ended, show what it prints."""
        if self.turn is not None and self.turn.fileno() in ready and not self.waits:
            with suppress(OSError):  # it has ended
                self.waits = bool(self.turn.recv(1))
        if self.client is not None and self.client.fileno() in ready:
            if asked := _word_of(self.client):
                self.stop(asked[0])
            else:  # who asked was killed
                self.client.close()
                self.client = None
                self.stop()
        self.gone = self.gone or self.has_ended()
        self.show()

    def has_ended(self) -> bool:
        """Whether there is only its exit code left of it."""
        return bool(select.select([self.ended], [], [], 0)[0])

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal; one that is ending already would take a second request to end for impatience."""
        if number != signal.SIGTERM or not self.stopped:
            with suppress(ProcessLookupError):
                os.kill(self.child, number)
        self.stopped = True

    def show(self) -> bool:
        """Print what it has printed since, as far as the reader takes it; whether that is all."""
        while self.shows:
            assert self.said is not None
            if not (more := os.pread(self.said.fileno(), select.PIPE_BUF, self.shown)):
                break
            try:
                if not select.select([], self.streams[:1], [], 0)[1]:
                    return False
                self.shown += os.write(self.streams[0], more)
            except OSError:  # who reads has gone
                break
        return True

    def reap(self) -> int:
        """Its exit code, once it has ended; told to who asked."""
        if not select.select([self.ended], [], [], ORDERLY_S if self.stopped else None)[0]:
            os.kill(self.child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        code = code if code >= 0 else 128 - code
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

    def __init__(self, dvc: int, made_from: list[Source], profile: "Profile", ahead: bool) -> None:
        """Args: dvc: whose stages these are; made_from: code and settings; ahead: whether DVC will ask for all of them."""
        self._dvc, self._made_from = dvc, made_from
        self._at_once = profile.at_once if ahead else 1
        self._order = list(product(profile.datasets, profile.methods, profile.seeds))
        self._next = 0  # in that order, after the last that was asked for
        self._ran: list[Cell] = []
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
                if job.gone and job.show():
                    self._end(job)
            if forked := self._begin_ahead():
                return forked
        for job in self._jobs.values():
            job.stop()
        for job in self._jobs.values():
            job.reap()
        self._path.unlink(missing_ok=True)
        return None

    def _ready(self) -> list[int]:
        sources = [self._watched, self._listening.fileno()]
        sources += [source for job in self._jobs.values() for source in job.sources]
        shows = any(job.shows for job in self._jobs.values())
        return select.select(sources, [], [], SHOWN_S if shows else None)[0]

    def _accept(self) -> dict[str, Any] | None:
        connection, _ = self._listening.accept()
        try:
            given, streams = _received(connection)
        except (OSError, ValueError):  # of one that was killed on its way in
            connection.close()
            return None
        name = " ".join(given["arguments"])
        if made_from() != self._made_from:
            self._dismiss(lambda job: not job.asked)
            _send_away(connection, streams)
            return None
        self._given = given
        if (cell := _cell_of(name)) in self._order:
            self._next = self._order.index(cell) + 1
            passed = {name_of(*earlier) for earlier in self._order[: self._next - 1]}
            self._dismiss(lambda job: not job.asked and job.name in passed)
        self._dismiss(lambda job: job.name == name and (job.stopped or job.has_ended()))
        try:
            job = self._jobs.get(name) or self._forked(name)
        except OSError as error:  # no room for another process
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            _send_away(connection, streams)
            return None
        if job is None:
            return {**given, "streams": streams}
        job.ask(connection, streams)
        with suppress(OSError):  # it was killed meanwhile, which the job will notice
            connection.send(b"+")
        return None

    def _dismiss(self, those: Callable[[Job], bool]) -> None:
        """End jobs that nobody will ask for, or that are begun anew."""
        gone = [job for job in self._jobs.values() if those(job)]
        for job in gone:
            job.stop()
        for job in gone:
            self._end(job)

    def _forked(self, name: str, said: IO[bytes] | None = None) -> Job | None:
        """A new job; None in the process that is to do it.

        Raises:
            OSError: the system allows no other process.
        """
        ours, its = socket.socketpair() if said is not None else (None, None)
        server = os.getpid()
        child = None
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)  # until the other one is what it is to become
        try:
            if (child := os.fork()) == 0:
                _end_with_the_server(server)
                warm.turn = its
                self._forget(ours)
                return None
        finally:
            if child != 0:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
                if its is not None:
                    its.close()
        self._jobs[name] = Job(name, child, _watched(child), said, ours)
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
        if code and (job.asked or not job.stopped):
            self._at_once = 1  # DVC will end
        if not code and job.asked and (cell := _cell_of(job.name)):
            self._ran.append(cell)
        how = "" if job.said is None else ", begun ahead" if job.asked else ", begun ahead and not asked for"
        print(f"{job.name}: {code}{how}", file=sys.stderr, flush=True)

    def _begin_ahead(self) -> dict[str, Any] | None:
        """Begin the next experiments; in a forked process what it is to become."""
        while self._at_once > 1 and self._given and self._room():
            if (name := next(self._to_come(), None)) is None or made_from() != self._made_from:
                return None
            try:
                said = tempfile.TemporaryFile()  # noqa: SIM115 - the job closes it
                job = self._forked(name, said)
            except OSError as error:
                print(f"nothing more is begun ahead: {error}", file=sys.stderr, flush=True)
                self._at_once = 1
                return None
            if job is None:
                streams = [os.dup(said.fileno()), os.dup(said.fileno())]
                return {**self._given, "arguments": name.split(" "), "streams": streams}
        return None

    def _room(self) -> bool:
        """Whether another one may be begun: so many work at once, and no more wait for their turn."""
        working = sum(job.asked or not job.waits for job in self._jobs.values())
        unasked = sum(not job.asked for job in self._jobs.values())
        ending = any(job.asked and job.stopped for job in self._jobs.values())
        return working < self._at_once and unasked < self._at_once and not ending

    def _to_come(self) -> Iterator[str]:
        """What DVC will ask for, in its order."""
        from flows.reproduce import will_run

        for cell in self._order[self._next :]:
            name = name_of(*cell)
            if name not in self._jobs and name not in self._done and will_run(cell, self._ran):
                yield name


def name_of(dataset: str, method: str, seed: int) -> str:
    """The command of an experiment."""
    return f"cell {dataset} {method} {seed}"


def _cell_of(name: str) -> "Cell | None":
    """The experiment of a command; None of another command."""
    words = name.split(" ")
    return (
        (words[1], words[2], int(words[3]))
        if words[0] == "cell" and words[3:] and words[3].isdigit()
        else None
    )


def made_from() -> list[Source]:
    """Code and settings as they are now: names, times and sizes of files."""
    top = Path(__file__).parents[1]
    listed = (
        top.glob("flows/*.py"),
        top.glob("tasks/**/*.py"),
        top.glob("configs/**/*.yaml"),
        [top / "params.yaml"],
    )
    found = []
    for file in chain.from_iterable(listed):
        with suppress(OSError):
            about = file.stat()
            found.append((str(file), about.st_mtime_ns, about.st_size))
    return sorted(found)


def _watched(child: int) -> int:
    """A descriptor that tells that a child has ended; without one, as where there are too many, it is ended at once.

    Raises:
        OSError: the system allows none.
    """
    try:
        return os.pidfd_open(child)
    except OSError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise


def _send_away(connection: socket.socket, streams: list[int]) -> None:
    """Let who came run by itself."""
    connection.close()
    for stream in streams:
        os.close(stream)


def _word_of(client: socket.socket) -> bytes:
    """What it says, which is nothing if it was killed."""
    try:
        return client.recv(1)
    except OSError:
        return b""


def all_stages(dvc: int) -> bool:
    """Whether a `dvc` process reproduces whatever has changed, and not stages that it was given."""
    said = Path(f"/proc/{dvc}/cmdline").read_bytes().decode().split("\0")[:-1]
    rest = said[said.index("repro") + 1 :] if "repro" in said else ["?"]
    return all(word.startswith("-") for word in rest)


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    size, streams, _, _ = socket.recv_fds(connection, 8, 2)
    try:
        message = b""
        while len(message) < int.from_bytes(size, "big"):
            if not (part := connection.recv(1 << 16)):
                raise ConnectionError("who came has gone")
            message += part
        return json.loads(message), streams
    except BaseException:
        for stream in streams:
            os.close(stream)
        raise


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
    as_begun = made_from()
    for name in IMPORTED:
        import_module(name)
    from flows.reproduce import read_profile

    with ExitStack() as kept:
        keep_server(kept)
        server = Server(dvc, as_begun, read_profile(), all_stages(dvc))
        if (given := server.serve()) is None:
            return 0
        _kept.append(kept.pop_all())  # the server ends what is in it; its address stays known here
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
    _become(given)
    from flows.__main__ import main as run

    return run(given["arguments"])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
