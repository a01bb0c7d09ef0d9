"""Runs at the same time that have the same questions: each is asked once, by whichever run; a run that dies holds none."""

import errno
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fake_vlm import SETTINGS

from tasks.records import Usage
from tasks.vlm.cache import CachedClient
from tasks.vlm.claims import Claims, ask_once
from tasks.vlm.client import ChatClient, Message, OnReply, Reply, Request, Sampling
from tasks.vlm.transport import VlmError

FORK = multiprocessing.get_context("fork")
QUESTIONS = [Request(messages=(Message(role="user", text=f"question {n}"),)) for n in range(12)]
KEYS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(7)]


class Counting(ChatClient):
    """Answers one after another, and notes each question in a file that all processes share."""

    def __init__(self, log: Path, fails_at: int | None = None) -> None:
        self.log, self.fails_at = log, fails_at

    @property
    def sampling(self) -> Sampling:
        return SETTINGS.sampling

    def check(self) -> None:
        pass

    def complete_all(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        replies = []
        for index, request in enumerate(requests):
            if index == self.fails_at:
                raise VlmError("no answer")
            with self.log.open("a") as file:
                file.write(f"{request.messages[0].text}\n")
            time.sleep(0.02)
            replies.append(Reply(text=request.messages[0].text.upper(), usage=Usage(calls=1), model="m"))
            if on_reply:
                on_reply(index, replies[-1])
        return replies


def run(log: Path, folder: Path, order: Sequence[int], fails_at: int | None = None) -> None:
    """A run, in a process of its own."""
    seen: list[int] = []
    client = CachedClient(Counting(log, fails_at), folder)
    try:
        replies = client.complete_all([QUESTIONS[n] for n in order], lambda index, _reply: seen.append(index))
    except VlmError:
        os._exit(3)
    right = [reply.text for reply in replies] == [f"QUESTION {n}" for n in order]
    os._exit(0 if right and sorted(seen) == list(range(len(order))) else 1)


def start(*arguments: object) -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=run, args=arguments, daemon=True)
    process.start()
    return process


def ended(processes: Sequence[multiprocessing.process.BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_three_runs_at_once_pay_for_each_answer_once(tmp_path: Path) -> None:
    orders = [range(12), range(11, -1, -1), [6, 1, 11, 0, 3, 9]]
    runs = [start(tmp_path / "log", tmp_path / "answers", list(order)) for order in orders]
    assert ended(runs) == [0, 0, 0]
    asked = (tmp_path / "log").read_text().splitlines()
    assert sorted(asked) == sorted(f"question {n}" for n in range(12))


def test_what_one_run_could_not_have_answered_another_asks(tmp_path: Path) -> None:
    where = (tmp_path / "log", tmp_path / "answers")
    failing = start(*where, list(range(12)), 4)
    while not (tmp_path / "log").exists():
        time.sleep(0.005)
    assert ended([failing, start(*where, list(range(12)))]) == [3, 0]
    assert sorted((tmp_path / "log").read_text().splitlines()) == sorted(f"question {n}" for n in range(12))


def test_a_run_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    def hold() -> None:
        with Claims(tmp_path) as claims:
            assert all(claims.take(key) for key in KEYS[1:])
            (tmp_path / "held").touch()
            time.sleep(600)

    process = FORK.Process(target=hold, daemon=True)
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    with Claims(tmp_path) as claims:
        assert [key for key in KEYS if claims.take(key)] == KEYS[:1], "the others are another's"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        for key in KEYS:
            claims.wait(key)
        assert all(claims.take(key) for key in KEYS)


def test_an_answer_that_came_meanwhile_is_not_asked_for(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(keys: Sequence[str], kept: Callable[[str], None]) -> None:
        asked.extend(keys)
        for key in keys:
            kept(key)

    ask_once(tmp_path, KEYS, lambda key: key == KEYS[2], ask)
    assert asked == [key for key in KEYS if key != KEYS[2]]


def test_where_files_cannot_be_locked_each_run_asks_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refused)
    asked: list[str] = []
    ask_once(tmp_path, KEYS, lambda key: key in asked, lambda keys, _kept: asked.extend(keys))
    assert asked == KEYS
