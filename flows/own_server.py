"""A Prefect server for as long as one command works, where none answers already.

It is a process in a session of its own, so that a Ctrl-C in the terminal reaches the command alone, which then still
has someone to tell how its runs ended. It ends when its standard input does, and so with the command, even if that is
killed with -9. Its socket is opened by the command and handed on: of several commands at once no two get one port.
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from flows.cli import console, failures_told_once, in_prefect_home, known_errors
from flows.server_lost import told_if_lost
from tasks.disk import Lock
from tasks.secrets import credentials_in

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

HOST = "127.0.0.1"
HERE = (HOST, "localhost", "::1")
START_S, STOP_S, LOGS_S = 180, 5, 5
CONNECT_S, HEALTH_S = 1, 3
GUARDED = (401, 403)
"""What a proxy or Prefect Cloud answers who may not ask; Prefect's own server tells its health to anybody."""
HEARTBEATS = "flows.heartbeat_frequency"
"""Each flow that sends them waits up to a second at its end; deployments, which a worker starts, send them."""


class ServerError(OSError):
    """The server did not start."""


@contextmanager
def prefect_server() -> Iterator[None]:
    """Use the Prefect server of the settings if it answers; else run one for as long as the block lasts.

    What fails meanwhile is told on the terminal by the command, not by Prefect. An address that the environment
    names and where no Prefect server answers is told of.

    Raises:
        ValueError: the settings' address holds a password or key.
        ServerError: it did not start.
        DiskError: Prefect's folder cannot be written to.
        ServerLostError: it does not answer any more.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = prefect_url()
    quick = temporary_settings(set_defaults={HEARTBEATS: None})
    if url and _answers(url):
        with quick, failures_told_once(), told_if_lost(url, known_errors):
            yield
        return
    if url and os.environ.get("PREFECT_API_URL"):
        console.print(
            f"no Prefect server listens at {url}; this command runs one of its own",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    from prefect.logging.handlers import APILogWorker

    with temporary_settings({PREFECT_API_URL: None}), tempfile.TemporaryFile() as said:
        process, address = _start_in_turn(said)
        try:
            with (
                temporary_settings({PREFECT_API_URL: f"{address}/api"}, {HEARTBEATS: None}),
                failures_told_once(),
                told_if_lost(address, known_errors),
            ):
                yield
        finally:
            APILogWorker.drain_all(timeout=LOGS_S)  # what is not sent by now has nowhere to go
            _stop(process)


def keep_server(stack: ExitStack) -> None:
    """Run a server for as long as this process and those that it forks live, where none listens already."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if (url := prefect_url()) and _answers(url):
        return
    said = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    with temporary_settings({PREFECT_API_URL: None}):
        process, address = _start_in_turn(said)
    stack.callback(_stop, process)
    stack.enter_context(temporary_settings({PREFECT_API_URL: f"{address}/api"}))


def prefect_url() -> str | None:
    """Where the settings say that Prefect's server is.

    Raises:
        ValueError: the address holds a password or key.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if url and credentials_in(url):
        raise ValueError(
            "PREFECT_API_URL holds a name, password or key, which Prefect would print and keep; leave it out and set "
            "PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        )
    return url


def _answers(url: str) -> bool:
    """Whether Prefect is at the settings' address: it says that it is well, or somebody before it asks who comes.

    It is asked as Prefect's client will ask, with the settings' keys, certificates and proxies.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, PREFECT_CLOUD_API_URL, temporary_settings

    if not _may_listen(url):
        return False
    patience = {"timeout": httpx.Timeout(HEALTH_S, connect=CONNECT_S)}
    cloud = url.startswith(PREFECT_CLOUD_API_URL.value())
    once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
    try:
        with once, get_client(patience, sync_client=True) as client:
            reply = client.request("GET", "/health")
            return cloud or reply.json() is True
    except httpx.HTTPStatusError as refused:
        return cloud or refused.response.status_code in GUARDED
    except (httpx.HTTPError, ValueError):
        return False


def _may_listen(url: str) -> bool:
    """False where this machine itself refuses at once; Prefect's client would try for two seconds."""
    parts = urlsplit(url)
    if parts.hostname not in HERE:
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=CONNECT_S):
            return True
    except OSError:
        return False


def _start_in_turn(said: IO[bytes]) -> tuple[subprocess.Popen[bytes], str]:
    """Of two that make the database at once one would fail."""
    from prefect.settings import PREFECT_HOME, get_current_settings

    home = PREFECT_HOME.value()
    with in_prefect_home(home), Lock(home / "starting.lock"):
        return _start(get_current_settings().to_environment_variables(exclude_unset=True), said)


def _start(settings: Mapping[str, str], said: IO[bytes]) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server((HOST, 0)) as listening:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(listening.fileno())],
            env={**os.environ, **settings, "PREFECT_SERVER_UI_ENABLED": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            pass_fds=[listening.fileno()],
            start_new_session=True,
        )
        address = f"http://{HOST}:{listening.getsockname()[1]}"
    try:
        _wait(process, address, said)
    except BaseException:
        _stop(process)
        raise
    return process, address


def _wait(process: subprocess.Popen[bytes], address: str, said: IO[bytes]) -> None:
    """Ask for its health, which it answers once it has started; a server that ended closes the connection."""
    import httpx

    try:
        httpx.get(f"{address}/api/health", timeout=START_S, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        said.seek(0)
        told = [line.strip() for line in said.read().decode(errors="replace").splitlines() if "rror" in line]
        raise ServerError(
            f"the Prefect server of this command did not start ({error}): {'; '.join(told[-4:])}. "
            "Start one with `make up` and look at its log, or set PREFECT_HOME to another folder"
        ) from error


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin is not None
    process.stdin.close()


def serve(descriptor: int) -> None:
    """Be the server, on a socket that is open already."""
    import uvicorn
    from prefect.server.api.server import create_app

    threading.Thread(target=_end_with_the_command, daemon=True).start()
    with _in_turn():
        app = create_app(ephemeral=True, final=True)
        config = uvicorn.Config(app, log_level="error", lifespan="on")
        uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


@contextmanager
def _in_turn() -> Iterator[None]:
    """Let SQLite's transactions wait for each other from their beginning.

    Prefect lets most of them begin as readers. One that then writes, after another has written, is refused at once with
    "database is locked", and its client asks again two seconds later: at the beginning of most sessions, while the
    last one's events are being written.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration
    from prefect.server.database.dependencies import temporary_database_config
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

    class InTurn(AioSqliteConfiguration):
        @asynccontextmanager
        async def begin_transaction(
            self, session: "AsyncSession", with_for_update: bool = True
        ) -> AsyncGenerator["AsyncSessionTransaction", None]:
            async with super().begin_transaction(session, with_for_update=True) as transaction:
                yield transaction

    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if not url.startswith("sqlite"):
        yield
        return
    with temporary_database_config(InTurn(connection_url=url)):
        yield


def _end_with_the_command() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
