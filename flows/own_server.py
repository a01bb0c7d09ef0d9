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
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from queue import Empty, Queue
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from flows.cli import console, failures_told_once, in_prefect_home, known_errors
from flows.interrupts import interrupts_first
from flows.server_lost import told_if_lost
from tasks.disk import Lock
from tasks.secrets import credentials_in
from tasks.text import readable

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
    from sqlalchemy.pool import ConnectionPoolEntry

HOST = "127.0.0.1"
HERE = (HOST, "localhost", "::1")
START_S, STOP_S, LOGS_S = 180, 5, 5
CONNECT_S, HEALTH_S, HEALTH_BYTES = 1, 10, 64
GUARDED = (401, 403)
"""What a proxy or Prefect Cloud answers who may not ask; Prefect's own server tells its health to anybody."""
NOBODY, SLOW = "nobody listens there", "it does not answer in time"
BUSY = 0.7
"""How much of the time that a client waits for its answer a transaction may wait for its turn."""
HEARTBEATS = "flows.heartbeat_frequency"
"""Each flow that sends them waits up to a second at its end; deployments, which a worker starts, send them."""


class ServerError(OSError):
    """The server did not start."""


@contextmanager
def prefect_server() -> Iterator[None]:
    """Use the Prefect server of the settings if it answers; else run one for as long as the block lasts.

    What fails meanwhile is told on the terminal by the command, not by Prefect. An address where no Prefect server
    answers is told of, with the reason, unless it is the project's own, at which nothing has been started.

    Raises:
        ValueError: the settings' address holds a password or key, or no port; its certificates are not there.
        ServerError: it did not start.
        DiskError: Prefect's folder cannot be written to.
        ServerLostError: it does not answer any more.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = prefect_url()
    quick = temporary_settings(set_defaults={HEARTBEATS: None})
    why_not = _why_not(url) if url else NOBODY
    if url and why_not is None:
        with quick, failures_told_once(), told_if_lost(url, known_errors), interrupts_first():
            yield
        return
    if url and (why_not != NOBODY or os.environ.get("PREFECT_API_URL")):
        console.print(
            f"no Prefect server at {url} ({why_not}); this command runs one of its own",
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
                interrupts_first(),
            ):
                yield
        finally:
            APILogWorker.drain_all(timeout=LOGS_S)  # what is not sent by now has nowhere to go
            _stop(process)


def keep_server(stack: ExitStack) -> None:
    """Run a server for as long as this process and those that it forks live, where none listens already."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if (url := prefect_url()) and _why_not(url) is None:
        return
    said = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    with temporary_settings({PREFECT_API_URL: None}):
        process, address = _start_in_turn(said)
    stack.callback(_stop, process)
    stack.enter_context(temporary_settings({PREFECT_API_URL: f"{address}/api"}))


def prefect_url() -> str | None:
    """Where the settings say that Prefect's server is.

    Raises:
        ValueError: the address holds a password or key, or no port; the file of certificates is not there.
    """
    from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL

    url, certificates = PREFECT_API_URL.value(), PREFECT_API_SSL_CERT_FILE.value()
    if url and credentials_in(url):
        raise ValueError(
            "PREFECT_API_URL holds a name, password or key, which Prefect would print and keep; leave it out and set "
            "PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        )
    try:
        urlsplit(url or "").port  # noqa: B018 - raises where it is none
    except ValueError as error:
        raise ValueError(f"PREFECT_API_URL={url}: {error}; an address is http://<host>:<port>/api") from error
    if certificates and not os.path.isfile(certificates):
        raise ValueError(
            f"PREFECT_API_SSL_CERT_FILE names {certificates}, which is no file; mend or unset it"
        )
    return url


def _why_not(url: str) -> str | None:
    """Why nobody at the settings' address is taken for Prefect; None where it is there.

    It says that it is well, or somebody before it asks who comes. It is asked with the settings' keys, certificates
    and proxies, but once and for so many seconds in all: Prefect's client would ask again for as long as the answer
    tells it to.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLOUD_API_URL

    if not _may_listen(url):
        return NOBODY
    said: Queue[tuple[int, bytes] | str] = Queue()
    with get_client({"timeout": HEALTH_S}, sync_client=True) as client:
        asking = threading.Thread(target=_ask, args=(client, said), daemon=True)
        asking.start()
        try:
            answer = said.get(timeout=HEALTH_S)
        except Empty:
            answer = SLOW
    asking.join(CONNECT_S)  # with the client closed it has nothing to wait for
    if isinstance(answer, str):
        return answer
    status, body = answer
    if status in GUARDED or url.startswith(PREFECT_CLOUD_API_URL.value()):
        return None
    if status != 200:
        return f"what answers there says {status}"
    return None if body == b"true" else "what answers there is another program"


def _ask(client: "SyncPrefectClient", said: "Queue[tuple[int, bytes] | str]") -> None:
    """Put the answer's status and first bytes there, or why there is none."""
    import httpx

    http = client._client
    try:
        question = http.build_request("GET", "/health")
        with closing(httpx.Client.send(http, question, stream=True)) as reply:
            said.put((reply.status_code, next(reply.iter_bytes(HEALTH_BYTES), b"")))
    except httpx.TimeoutException:
        said.put(SLOW)
    except Exception as error:  # whatever a certificate, a proxy or a closed connection raises
        said.put(readable(f"{type(error).__name__}: {error}", 200))


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

    And Prefect lets one wait for a minute, longer than its client does for the answer. The client would then ask again
    for what is still waiting, and both would be written. So a server says earlier that it could not.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration
    from prefect.server.database.dependencies import temporary_database_config
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_REQUEST_TIMEOUT

    class InTurn(AioSqliteConfiguration):
        @asynccontextmanager
        async def begin_transaction(
            self, session: "AsyncSession", with_for_update: bool = True
        ) -> AsyncGenerator["AsyncSessionTransaction", None]:
            async with super().begin_transaction(session, with_for_update=True) as transaction:
                yield transaction

        def setup_sqlite(self, conn: "DBAPIConnection", record: "ConnectionPoolEntry") -> None:
            super().setup_sqlite(conn, record)
            with closing(conn.cursor()) as cursor:
                cursor.execute(
                    f"PRAGMA busy_timeout = {PREFECT_API_REQUEST_TIMEOUT.value() * 1000 * BUSY:.0f}"
                )

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
