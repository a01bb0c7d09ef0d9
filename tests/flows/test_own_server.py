"""The Prefect server of one command: apart from the terminal, gone with the command, never on another one's port."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPException
from pathlib import Path

import httpx
import pytest
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_HOME,
    temporary_settings,
)

from flows import own_server
from flows.own_server import ServerError
from tests.conftest import ROOT

CODE = """
import os, sys, time
from flows.own_server import prefect_server
from prefect.settings import PREFECT_API_URL
with prefect_server():
    print(PREFECT_API_URL.value(), flush=True)
    sys.stdin.read()
"""


class Command:
    """A command that works under a server until its input ends, in a group of its own, as from a terminal."""

    def __init__(self, home: Path, **settings: str) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE],
            cwd=ROOT, env=kept | {"PREFECT_HOME": str(home), "DO_NOT_TRACK": "1"} | settings, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def url(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.read() == b"true"
    except (OSError, HTTPException):  # it may end in the middle of an answer
        return False


def falls_silent(url: str) -> bool:
    until = time.monotonic() + 30
    while answers(url) and time.monotonic() < until:
        time.sleep(0.1)
    return not answers(url)


def test_two_commands_at_once_have_a_server_each_until_they_end(tmp_path: Path) -> None:
    first, second = Command(tmp_path), Command(tmp_path)
    urls = first.url, second.url
    assert urls[0] != urls[1]
    assert all(url.startswith("http://127.0.0.1:") and answers(url) for url in urls)
    first.process.communicate("")
    assert first.process.returncode == 0
    assert not answers(urls[0])
    second.process.send_signal(
        signal.SIGSTOP
    )  # the terminal's Ctrl-C, before the command itself has looked at it
    os.killpg(second.process.pid, signal.SIGINT)
    time.sleep(1)
    assert answers(urls[1]), "the interrupt of the terminal is not the server's"
    second.process.kill()
    assert falls_silent(urls[1]), "a server outlives its command"


def test_those_who_write_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """A reader that becomes a writer would be refused, and Prefect's client ask again two seconds later."""
    command = Command(tmp_path)

    def write(number: int) -> int:
        task_run = {"task_key": "draw", "dynamic_key": str(number), "flow_run_id": None}
        return httpx.post(f"{url}/task_runs/", json=task_run, timeout=60, trust_env=False).status_code

    url = command.url
    with ThreadPoolExecutor(16) as writers:
        told = list(writers.map(write, range(160)))
    command.process.communicate("")
    assert told == [201] * 160


def test_who_waits_too_long_for_the_turn_is_told_before_it_stops_listening(tmp_path: Path) -> None:
    """Else the client would ask again for what is still waiting, and both would be written."""
    command = Command(tmp_path, PREFECT_API_REQUEST_TIMEOUT="2")
    url = command.url
    with closing(sqlite3.connect(tmp_path / "prefect.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        status = httpx.post(f"{url}/flows/", json={"name": "late"}, timeout=30, trust_env=False).status_code
        other.execute("ROLLBACK")
        assert status == 503, "asked again by Prefect's client"
        assert other.execute("select count(*) from flow where name = 'late'").fetchone() == (0,)
    assert httpx.post(f"{url}/flows/", json={"name": "late"}, timeout=30, trust_env=False).is_success
    command.process.communicate()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    nowhere = f"sqlite+aiosqlite:///{tmp_path}/nowhere/prefect.db"
    changed = {PREFECT_API_URL: None, PREFECT_HOME: tmp_path, PREFECT_API_DATABASE_CONNECTION_URL: nowhere}
    with (
        temporary_settings(changed),
        pytest.raises(ServerError, match=r"(?s)did not start .*unable to open database file.*make up"),
        own_server.prefect_server(),
    ):
        pass
