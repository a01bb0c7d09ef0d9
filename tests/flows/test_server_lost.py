"""A Prefect server that is not there, or dies at the start, in the middle or at the end of a run."""

import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from prefect.events.worker import EventsWorker
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_CLOUD_API_URL,
    temporary_settings,
)

from flows import experiment, own_server, progress, session
from flows.__main__ import main
from flows.cli import EXIT_FAILED, known_errors
from flows.experiment import fscil
from flows.server_lost import ServerLostError, extra, told_if_lost
from tasks.vlm.transport import VlmError
from tests.conftest import Place
from tests.strangers import answering, dripping, nobody, silent, somebody_else


class Line:
    """A way to a server that can be cut or held up: what is sent is carried both ways until then."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._to = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._whole, self._flows = True, True
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}{parts.path}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *_: object) -> None:
        """From now on nobody answers here."""
        if not self._whole:
            return
        self._whole = False
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def hold_up(self, *_: object) -> None:
        """From now on whoever asks is heard and waits for an answer."""
        self._flows = False

    def _accept(self) -> None:
        while self._whole:
            try:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._to)
            except OSError:
                return
            self._open += [near, far]
            for here, there in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(here, there), daemon=True).start()

    def _carry(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while data := here.recv(2**16):
                if self._flows:
                    there.sendall(data)
        with suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)


@contextmanager
def on(line: Line) -> Iterator[None]:
    """As a command does, with a server that listens at the other end of a line."""
    with (
        temporary_settings(
            {PREFECT_API_URL: line.url, PREFECT_CLIENT_MAX_RETRIES: 1, PREFECT_API_REQUEST_TIMEOUT: 5}
        ),
        own_server.prefect_server(),
    ):
        yield


@pytest.mark.parametrize(
    ("moment", "lose"),
    [("start", Line.cut), ("middle", Line.cut), ("end", Line.cut), ("middle", Line.hold_up)],
)
def test_a_server_that_dies_or_hangs_ends_the_run_in_one_sentence_and_nothing_is_lost(
    moment: str,
    lose: Callable[[Line], None],
    finished: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = Place(tmp_path)
    shutil.copytree(finished.root / "state", tmp_path / "state")
    line = Line(str(PREFECT_API_URL.value()))
    seams = {
        "start": (experiment, "note"),
        "middle": (session, "say_epoch"),
        "end": (experiment, "show_experiment"),
    }
    module, name = seams[moment]
    real = getattr(module, name)

    def dying(*given: object) -> None:
        lose(line)
        real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, dying)
        with (
            pytest.raises(
                ServerLostError, match=r"does not answer any more .*the same command goes on from here"
            ),
            on(line),
        ):
            fscil("digits", "guided", 0, place.overrides())
    assert (place.run("guided") / "experiment.json").is_file() == (moment == "end")
    assert untold_events() == 0, "each would be tried for seconds before the process may end"
    fscil("digits", "guided", 0, place.overrides())
    assert place.files("guided") == finished.files("guided")


def untold_events() -> int:
    found = [one for one in EventsWorker._instances.values() if isinstance(one, EventsWorker)]
    return sum(one._queue.qsize() for one in found if not one._stopped)


def refused() -> None:
    """As httpx says it."""
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError as error:
        raise httpx.ConnectError("refused") from error


def test_a_command_ends_with_the_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def server() -> Iterator[None]:
        with told_if_lost("http://127.0.0.1:9/api", known_errors):
            yield

    monkeypatch.setattr("flows.__main__.prefect_server", server)
    monkeypatch.setattr(experiment, "preflight", lambda _config: None)
    monkeypatch.setattr(experiment, "fscil", lambda *_given: refused())
    assert main(["dataset=digits", "method=finetune"]) == EXIT_FAILED
    said = " ".join(capsys.readouterr().err.split())
    assert "error: the Prefect server at http://127.0.0.1:9/api does not answer any more" in said
    assert said.endswith("nothing sealed is lost - the same command goes on from here")


def test_the_error_that_could_not_be_reported_comes_first() -> None:
    def reporting() -> None:
        try:
            raise VlmError("the VLM at x takes no more requests")
        except VlmError:
            refused()

    with (
        pytest.raises(
            ServerLostError, match=r"^the VLM at x takes no more requests; besides, the Prefect server at"
        ),
        told_if_lost("http://127.0.0.1:1/api", known_errors),
    ):
        reporting()


def test_a_full_disk_of_its_database_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3 * 2**20))
    request = httpx.Request("POST", "http://127.0.0.1:1/api/logs")
    failed = httpx.HTTPStatusError("500", request=request, response=httpx.Response(500, request=request))
    with (
        pytest.raises(
            ServerLostError,
            match=r"at http://127\.0\.0\.1:1/api fails .*has 3 MiB left: make room .*nothing sealed is lost",
        ),
        told_if_lost("http://127.0.0.1:1/api", known_errors),
    ):
        raise failed


def test_other_errors_stay_as_they_are() -> None:
    with (
        pytest.raises(ServerLostError, match=r"127\.0\.0\.1:1/api does"),
        told_if_lost("http://127.0.0.1:1/api", known_errors),
    ):
        raise RuntimeError("Failed to reach API at somewhere")
    with (
        pytest.raises(VlmError, match=r"^the VLM failed"),
        told_if_lost("http://127.0.0.1:1/api", known_errors),
    ):
        raise VlmError("the VLM failed (502): Failed to reach API")
    with (
        pytest.raises(RuntimeError, match=r"^out of memory$"),
        told_if_lost("http://127.0.0.1:1/api", known_errors),
    ):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (nobody, "nobody listens there"),
        (silent, "it does not answer in time"),
        (dripping, "it does not answer in time"),
        (somebody_else, "what answers there is another program"),
    ],
)
def test_an_address_where_no_prefect_answers_is_told_and_a_server_of_its_own_is_run(
    way: Callable[[], AbstractContextManager[str]],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[object] = []

    def start(*given: object) -> tuple[None, str]:
        started.append(given)
        return None, "http://127.0.0.1:2"

    monkeypatch.setattr(own_server, "_start", start)
    monkeypatch.setattr(own_server, "_stop", lambda _process: None)
    monkeypatch.setattr(own_server, "HEALTH_S", 1)
    began = time.monotonic()
    with way() as address:
        url = f"{address}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        with temporary_settings({PREFECT_API_URL: url}), own_server.prefect_server():
            assert PREFECT_API_URL.value() == "http://127.0.0.1:2/api"
    said = capsys.readouterr().err
    assert said == f"no Prefect server at {url} ({why}); this command runs one of its own\n"
    assert len(started) == 1
    assert time.monotonic() - began < 15, "a server that hangs is not waited for"


@pytest.mark.parametrize(
    ("status", "said", "is_prefect"),
    [
        (200, b"true", True),
        (401, b"who are you?", True),
        (403, b"{}", True),
        (200, b'"true"', False),
        (404, b"true", False),
        (502, b"", False),
    ],
)
def test_prefect_is_known_by_its_health_or_by_who_guards_it(
    status: int, said: bytes, is_prefect: bool
) -> None:
    with answering(status, said) as url, temporary_settings({PREFECT_API_URL: url}):
        assert (own_server._why_not(url) is None) == is_prefect


@pytest.mark.parametrize(
    ("status", "said", "headers", "why"),
    [
        (503, b"", {"Retry_After": "3600"}, "what answers there says 503"),
        (429, b"", {"Retry_After": "3600"}, "what answers there says 429"),
        (503, b"", {"Prefect_Maintenance": "true"}, "what answers there says 503"),
        (302, b"", {"Location": "/api/health"}, "TooManyRedirects"),
        (200, b"true" + b" " * 2**20 + b"and so on", {}, "what answers there is another program"),
        (403, b"Invalid CSRF token", {}, None),
    ],
)
def test_who_says_to_come_back_later_is_not_waited_for(
    status: int, said: bytes, headers: dict[str, str], why: str | None
) -> None:
    began = time.monotonic()
    with answering(status, said, **headers) as url, temporary_settings({PREFECT_API_URL: url}):
        assert (own_server._why_not(url) or "None").startswith(str(why))
    assert time.monotonic() - began < own_server.HEALTH_S


def test_settings_of_prefect_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:99999/api"}),
        pytest.raises(ValueError, match=r"PREFECT_API_URL=.*99999.*out of range"),
    ):
        own_server.prefect_url()
    with (
        temporary_settings({PREFECT_API_SSL_CERT_FILE: str(tmp_path / "none.pem")}),
        pytest.raises(ValueError, match=r"PREFECT_API_SSL_CERT_FILE names .*none\.pem, which is no file"),
    ):
        own_server.prefect_url()


def test_prefects_cloud_is_taken_for_what_its_address_says() -> None:
    with (
        answering(404, b"") as url,
        temporary_settings({PREFECT_API_URL: url, PREFECT_CLOUD_API_URL: url}),
    ):
        assert own_server._why_not(url) is None


def test_events_that_cannot_be_sent_are_told_of_once() -> None:
    def passes(name: str, said: str) -> bool:
        return bool(
            logging.getLogger(name).filter(logging.LogRecord(name, logging.ERROR, "", 0, said, (), None))
        )

    with told_if_lost("http://127.0.0.1:1/api", known_errors):
        assert not passes("prefect._internal.concurrency", "Service %r failed to process item %r")
        assert passes("prefect._internal.concurrency", "Service %r failed with %s pending items.")
        assert not passes("EventsWorker", "Still processing items: 5 items remaining...")
        tried = [passes("prefect.events.clients", "Unable to connect to %r.") for _ in range(3)]
        assert sum(tried) <= 1, "one line in all, of this process"


def test_a_page_that_prefect_does_not_take_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with extra("page of the session"):
        raise httpx.ReadTimeout("late")
    assert [record.message for record in caplog.records] == [
        "Prefect takes no page of the session (ReadTimeout: late)"
    ]
    assert progress.extra is extra
