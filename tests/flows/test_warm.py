"""The process that runs the experiments of one `dvc repro`, with experiments that do as they are told, and a `dvc` that asks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from flows import warm
from flows.reproduce import will_run
from tasks.store import digest_of
from tests.conftest import ROOT

SERVER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace

profile = SimpleNamespace(datasets=("digits",), methods=("ncm",), seeds=(0, 1, 2, 3), at_once=2)
sys.modules["flows.reproduce"] = SimpleNamespace(  # importing the real one takes seconds
    read_profile=lambda: profile, will_run=lambda cell, ran: True
)
import flows.__main__
from flows import warm, warm_server

def experiment(arguments):
    for act, value in eval(Path("plan").read_text())[arguments[3]]:
        if act == "say":
            print(value, flush=True)
        elif act == "until":
            while not Path(value).exists():
                time.sleep(0.01)
        elif act == "await":
            warm.await_turn()
        elif act == "note":
            with Path("notes").open("a") as file:
                file.write(value + "\\n")
        elif act == "end":
            return value
    return 0

flows.__main__.main = experiment
warm_server.IMPORTED = ()
warm_server.keep_server = lambda kept: None
warm_server.made_from = lambda: [(Path("code").read_text(), 0, 0)]
sys.exit(warm_server.main(int(sys.argv[1])))
"""

CLIENT = """
import sys
from flows.warm import run_warm
code = run_warm(["cell", "digits", "ncm", sys.argv[1]])
sys.exit(77 if code is None else code)
"""

DVC = """
import os, subprocess, sys, time
from pathlib import Path
server = subprocess.Popen([sys.executable, "server.py", str(os.getpid())], stdout=open("log", "w"), stderr=subprocess.STDOUT)
Path("server.pid").write_text(str(server.pid))
while not Path(f".fscil/warm-{os.getpid()}.sock").exists():
    assert server.poll() is None, Path("log").read_text()
    time.sleep(0.01)
for line in sys.stdin:
    seed = line.strip()
    print("asked for", seed, flush=True)
    print("code", subprocess.call([sys.executable, "client.py", seed]), flush=True)
"""


class Dvc:
    """A program that is called `dvc repro`, and asks for the experiments it is told to."""

    def __init__(self, folder: Path, plan: dict[str, list[tuple[str, object]]]) -> None:
        self.folder = folder
        (folder / ".fscil").mkdir()
        for name, text in (
            ("server.py", SERVER),
            ("client.py", CLIENT),
            ("dvc.py", DVC),
            ("code", "as begun"),
        ):
            (folder / name).write_text(text)
        (folder / "plan").write_text(repr(plan))
        self.process = subprocess.Popen(
            [sys.executable, "dvc.py", "repro"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "DVC_STAGE": "s"},
        )  # fmt: skip

    def ask(self, seed: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()

    def said(self) -> list[str]:
        """What it shows until the experiment it asked for has ended."""
        assert self.process.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("code "):
            line = self.process.stdout.readline()
            assert line, self.log()
            lines.append(line.rstrip("\n"))
        return lines

    def run(self, seed: int) -> list[str]:
        self.ask(seed)
        return self.said()

    def let(self, name: str) -> None:
        (self.folder / name).touch()

    def await_log(self, line: str) -> None:
        until = time.monotonic() + 60
        while line not in self.log():
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)

    def await_note(self, line: str) -> None:
        notes, until = self.folder / "notes", time.monotonic() + 60
        while not notes.exists() or line not in notes.read_text().splitlines():
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)

    def log(self) -> list[str]:
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def server_ended(self) -> bool:
        """Whether the server ends within a minute."""
        stat, until = Path("/proc") / (self.folder / "server.pid").read_text() / "stat", time.monotonic() + 60
        while (
            stat.exists()
            and stat.read_text().rpartition(")")[2].split()[0] != "Z"
            and time.monotonic() < until
        ):
            time.sleep(0.05)
        return time.monotonic() < until


@pytest.fixture
def dvc(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Dvc]:
    made = Dvc(tmp_path, request.param)
    yield made
    made.process.kill()
    made.process.communicate()
    assert made.server_ended()


def plan(**acts: Sequence[tuple[str, object]]) -> pytest.MarkDecorator:
    """What each experiment does, by its seed; the others wait for their turn and end."""
    usual = {str(seed): [("await", 0), ("note", f"ended {seed}")] for seed in range(4)}
    return pytest.mark.parametrize(
        "dvc", [usual | {name[1:]: list(act) for name, act in acts.items()}], indirect=True
    )


@plan(
    _0=[("until", "go-0")],
    _1=[("note", "begun 1"), ("say", "one has begun"), ("until", "go-1"), ("say", "one fails"), ("end", 3)],
)
def test_one_that_fails_after_it_was_begun_ahead_and_asked_for_ends_as_it_did(dvc: Dvc) -> None:
    dvc.ask(0)
    dvc.await_note("begun 1")
    dvc.let("go-0")
    assert dvc.said()[-1] == "code 0"
    dvc.ask(1)
    time.sleep(1)  # it is told that it was asked for, and never listens
    dvc.let("go-1")
    assert dvc.said() == ["asked for 1", "one has begun", "one fails", "code 3"]
    assert dvc.run(2) == ["asked for 2", "code 0"]
    assert dvc.log() == [
        "cell digits ncm 0: 0",
        "cell digits ncm 1: 3, begun ahead",
        "cell digits ncm 2: 0, begun ahead",
    ]


@plan(_0=[("until", "go-0")], _1=[("note", "begun 1"), ("end", 3)])
def test_one_that_failed_ahead_is_run_anew_when_it_is_asked_for(dvc: Dvc) -> None:
    dvc.ask(0)
    dvc.await_log("cell digits ncm 1: 3, begun ahead and not asked for")
    (dvc.folder / "plan").write_text(repr({"0": [("until", "go-0")], "1": [("say", "mended")]}))
    dvc.let("go-0")
    assert dvc.said()[-1] == "code 0"
    assert dvc.run(1) == ["asked for 1", "mended", "code 0"]


@plan(_0=[("until", "go-0")], _1=[("note", "begun 1"), ("await", 0), ("note", "ended 1")])
def test_one_that_dvc_passes_over_is_ended_and_makes_room(dvc: Dvc) -> None:
    dvc.ask(0)
    dvc.await_note("begun 1")
    dvc.let("go-0")
    assert dvc.said()[-1] == "code 0"
    assert dvc.run(2)[-1] == "code 0"
    assert "cell digits ncm 1: 143, begun ahead and not asked for" in dvc.log()
    assert dvc.run(3)[-1] == "code 0"
    assert (dvc.folder / "notes").read_text().splitlines() == ["begun 1", "ended 2", "ended 3"]
    assert dvc.log()[-1] == "cell digits ncm 3: 0, begun ahead", "it goes on beginning ahead"


@plan(_0=[("until", "go-0")], _1=[("note", "begun 1"), ("await", 0)])
def test_who_comes_after_the_code_was_changed_runs_by_itself(dvc: Dvc) -> None:
    dvc.ask(0)
    dvc.await_note("begun 1")
    (dvc.folder / "code").write_text("edited")
    dvc.let("go-0")
    assert dvc.said()[-1] == "code 0"
    assert dvc.run(1)[-1] == "code 77", "run_warm returned None"
    opened = Path("/proc") / (dvc.folder / "server.pid").read_text() / "fd"
    before = len(list(opened.iterdir()))
    for _ in range(3):
        assert dvc.run(1)[-1] == "code 77"
    assert len(list(opened.iterdir())) == before, "it lets go of what they brought"
    assert "cell digits ncm 1: 143, begun ahead and not asked for" in dvc.log()


@plan(
    _0=[("until", "go-0")], _1=[("say", "x" * 200_000), ("note", "said 1"), ("await", 0), ("note", "ended 1")]
)
def test_a_reader_who_does_not_read_holds_nobody_up(dvc: Dvc) -> None:
    dvc.ask(0)
    dvc.await_note("said 1")
    dvc.let("go-0")
    assert dvc.said()[-1] == "code 0"
    dvc.ask(1)
    dvc.await_note("ended 1")
    time.sleep(1)  # the pipe is full
    os.kill(dvc.process.pid, signal.SIGKILL)
    assert dvc.server_ended()


@plan(_0=[("until", "go-0")], _1=[("say", "x" * 200_000), ("say", "the end"), ("await", 0)])
def test_all_that_was_printed_ahead_is_shown(dvc: Dvc) -> None:
    dvc.ask(0)
    time.sleep(0.5)
    dvc.let("go-0")
    assert dvc.said()[-1] == "code 0"
    dvc.ask(1)
    time.sleep(1)
    assert dvc.said() == ["asked for 1", "x" * 200_000, "the end", "code 0"]


def test_a_dvc_that_has_gone_is_not_taken_for_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {1: b"/sbin/init", 7: b"python /venv/bin/dvc repro", 8: b"python notebook.py"}
    monkeypatch.setattr(warm, "_command_line", lambda process: lines[process])
    monkeypatch.setenv("DVC_STAGE", "s")
    for parent, found in ((7, 7), (8, None)):
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        assert warm._dvc() == found
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert warm.run_warm(["cell"]) == warm.EXIT_TERMINATED
    monkeypatch.setattr(os, "getppid", lambda: 7)
    for number, code in ((errno.ESRCH, warm.EXIT_TERMINATED), (errno.ENOSYS, None), (errno.EPERM, None)):

        def opened(_: int, number: int = number) -> int:
            raise OSError(number, "no")

        monkeypatch.setattr(os, "pidfd_open", opened)
        assert warm.run_warm(["cell"]) == code, "an old kernel, or a container that allows it not"


def test_what_dvc_is_about_to_run(tmp_path: Path) -> None:
    """No result, other settings, or code that is not as it was for those that ran since."""
    out = tmp_path / "reports"
    cells = [("digits", method, 0) for method in ("ncm", "teen", "cec")]
    for _, method, seed in cells:
        for file in (
            out / "settings" / "digits" / f"{method}.json",
            out / "cells" / "digits" / method / f"seed-{seed}.json",
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(method))

    def lock(code: dict[str, str]) -> Path:
        def deps(method: str) -> list[dict[str, str]]:
            settings = out / "settings" / "digits" / f"{method}.json"
            return [
                {"path": settings.as_posix(), "md5": digest_of(settings)},
                {"path": "tasks", "md5": code[method]},
            ]

        stages = {
            f"experiment@digits-{m}-0": {"cmd": f"python -m flows cell digits {m} 0", "deps": deps(m)}
            for m in code
        } | {"data@digits": {"cmd": "python -m flows data digits"}}
        (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
        return tmp_path / "dvc.lock"

    def about_to(file: Path, *ran: tuple[str, str, int]) -> list[str]:
        return [cell[1] for cell in cells if will_run(cell, ran, out, file)]

    file = lock({"ncm": "1", "teen": "1", "cec": "1"})
    assert about_to(file) == []
    (out / "settings" / "digits" / "teen.json").write_text("other")
    assert about_to(file) == ["teen"]
    (out / "cells" / "digits" / "ncm" / "seed-0.json").unlink()
    assert about_to(file) == ["ncm", "teen"]
    time.sleep(0.01)
    assert about_to(lock({"ncm": "1", "teen": "1"})) == ["ncm", "cec"]
    time.sleep(0.01)
    file = lock({"ncm": "2", "teen": "1", "cec": "1"})
    assert about_to(file, cells[0]) == ["ncm", "teen", "cec"]
    file.write_text("{ no lock")
    assert about_to(file) == ["ncm", "teen", "cec"]
