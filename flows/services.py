"""`make up` and `make down`: the Prefect server, a worker and the MLflow UI, on 127.0.0.1 unless told otherwise.

Each service is a process group of its own with two files below ``.fscil/services``: ``<name>.pid``, which holds
"pid port host" and which the process keeps locked for as long as it lives, so that a number that the system gave
to another program is never taken for a service; and ``<name>.log``. Nothing here imports
Prefect, MLflow or torch, so that it is quick.
"""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flows.cli import REQUEST_S, SPINS

PROJECT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")
POOL = "fscil"
FOLDER = PROJECT / ".fscil" / "services"
START_S, STOP_S = 300, 20
LOG_LINES = 8

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServiceError(RuntimeError):
    """A service did not start; the message says which, why, and where its log is."""


@dataclass(frozen=True)
class Service:
    """One process: its files' name, what runs, and the port and the address that it is known by."""

    name: str
    command: tuple[str, ...]
    port: int
    host: str = HOST

    @property
    def pid_file(self) -> Path:
        """Holds "pid port host", and the lock."""
        return FOLDER / f"{self.name}.pid"

    @property
    def log(self) -> Path:
        """What the process prints."""
        return FOLDER / f"{self.name}.log"


def services(
    prefect_port: int, mlflow_port: int, runs_at_once: int, host: str = HOST
) -> tuple[Service, Service, Service]:
    """The server, the MLflow UI and the worker, in the order in which they are started."""
    prefect = (sys.executable, "-m", "prefect")
    mlflow = (
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{PROJECT}/mlflow.db",
    )
    work = ("worker", "start", "--pool", POOL, "--type", "process", "--limit", str(runs_at_once))
    return (
        Service(
            "server",
            (*prefect, "server", "start", "--host", host, "--port", str(prefect_port)),
            prefect_port,
            host,
        ),
        Service(
            "mlflow",
            (*mlflow, "--host", host, "--port", str(mlflow_port), "--workers", "1"),
            mlflow_port,
            host,
        ),
        Service("worker", (*prefect, *work), prefect_port, host),
    )


def up(
    prefect_port: int = 4200, mlflow_port: int = 5000, runs_at_once: int = 1, host: str = HOST
) -> list[str]:
    """Start what does not run yet, wait until each answers, register the deployments of prefect.yaml.

    Args:
        prefect_port: of the Prefect server.
        mlflow_port: of the MLflow UI.
        runs_at_once: how many flow runs the worker has under way; the others wait.
        host: the address to listen on; any but this machine's own is warned of.

    Returns:
        Lines that say where everything is.

    Raises:
        ValueError: a port is taken by another program, the address is none of this machine's, or the services run
            elsewhere.
        ServiceError: one of them did not start.
    """
    server, mlflow, worker = services(prefect_port, mlflow_port, runs_at_once, host)
    _check_ports(server, mlflow, worker)
    ui = f"http://{_here(host)}:{mlflow_port}"
    environment = environment_of(prefect_port, host) | {"FSCIL_MLFLOW_UI": ui}
    api = environment["PREFECT_API_URL"]
    for service in (server, mlflow):
        _start(service, environment)
    _wait(server, lambda: _get(f"{api}/health") == "true")
    since = time.time() - 60 * (running(worker) is not None)
    _start(worker, environment)
    _wait(mlflow, lambda: _get(f"{ui}/health") == "OK")
    _wait(worker, lambda: _polled_since(api, since))
    _register(environment)
    return [
        *warning_of(host),
        f"Prefect UI   http://{_here(host)}:{prefect_port}   (runs, logs, parameters)",
        f"MLflow UI    {ui}   (metrics, images, adapters)",
        f"worker       pool {POOL}, {runs_at_once} at a time; logs in {FOLDER}",
        f"from another folder first: export PREFECT_API_URL={api}",
    ]


def down() -> list[str]:
    """End the services that :func:`up` started, and what they run; name them. Sealed stages are kept."""
    ended = []
    for service in reversed(services(0, 0, 1)):
        found = running(service)
        if found is not None:
            _end(service, found[0])
            ended.append(service.name)
        service.pid_file.unlink(missing_ok=True)
    return ended


def warning_of(host: str) -> list[str]:
    """What somebody should know who lets others reach the servers: one line, or none."""
    if host in (HOST, "localhost", "::1"):
        return []
    return [
        f"warning      the servers listen on {host} and ask for no login: whoever reaches this machine can read all "
        f"runs, change them, and start any command as you. Safer: {HOST}, and ssh -L from afar"
    ]


def environment_of(prefect_port: int, host: str = HOST) -> dict[str, str]:
    """What the services and the flow runs that they start are told."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_SERVER_")}
    return kept | {
        "DO_NOT_TRACK": "true",
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", SPINS),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_API_REQUEST_TIMEOUT": os.environ.get("PREFECT_API_REQUEST_TIMEOUT", REQUEST_S),
        "PREFECT_API_URL": f"http://{_here(host)}:{prefect_port}/api",
        "PREFECT_HOME": str(PROJECT / ".fscil" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": "/api",  # of the page's own address, whichever the browser knows it by
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }


# ------------------------------------------------------------------------------------------ processes


def running(service: Service) -> tuple[int, int, str] | None:
    """The service's process id, port and address, if it lives: its file is locked for just as long."""
    try:
        with service.pid_file.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, port, *host = file.read().split()
                return int(pid), int(port), host[0] if host else HOST
    except FileNotFoundError:
        pass
    return None


def _start(service: Service, environment: Mapping[str, str]) -> None:
    if running(service) is not None:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    with service.pid_file.open("w") as lock, service.log.open("ab") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            service.command,
            cwd=PROJECT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )
        lock.write(f"{process.pid} {service.port} {service.host}")


def _end(service: Service, pid: int) -> None:
    """Ask the whole group to stop, and after a while make it."""
    _signal(pid, signal.SIGTERM)
    until = time.monotonic() + STOP_S
    while running(service) is not None and time.monotonic() < until:
        time.sleep(0.2)
    _signal(pid, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return  # none of it is left


def _check_ports(*wanted: Service) -> None:
    for service in wanted:
        found = running(service)
        if found and found[1:] != (service.port, service.host):
            raise ValueError(
                f"the {service.name} already runs on port {found[1]} of {found[2]}: `make down` first to move it to "
                f"{service.port} of {service.host}"
            )
        if found is None and service.name != "worker" and _taken(service.host, service.port):
            setting = "PREFECT_PORT" if service.name == "server" else "MLFLOW_PORT"
            raise ValueError(
                f"port {service.port} is taken by another program; choose another: make up {setting}=<port>"
            )


def _taken(host: str, port: int) -> bool:
    """Whether another program has a port; raises ValueError for an address that is none of this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise ValueError(
                f"nothing can listen on port {port} of {host!r} ({error.strerror}): give an address of this machine, "
                f"such as {HOST}, and a port above 1023"
            ) from error
    return False


def _here(host: str) -> str:
    """How this machine reaches a server that listens on ``host``, as it stands in a URL."""
    if host in EVERYWHERE:
        return HOST
    return f"[{host}]" if ":" in host else host


# ------------------------------------------------------------------------------------------ answers


def _wait(service: Service, answers: Callable[[], bool]) -> None:
    until = time.monotonic() + START_S
    while not answers():
        if running(service) is None:
            raise ServiceError(
                f"the {service.name} ended at once; {service.log} ends with:\n{_tail(service.log)}"
            )
        if time.monotonic() > until:
            raise ServiceError(f"the {service.name} did not answer within {START_S} s; see {service.log}")
        time.sleep(0.3)


def _get(url: str, body: object = None) -> str | None:
    """What a service answers, None while it does not."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _direct.open(request, timeout=5) as reply:
            return reply.read().decode()
    except OSError:
        return None


def _polled_since(api: str, since: float) -> bool:
    """Whether a worker of the pool has asked for work since then."""
    workers = json.loads(_get(f"{api}/work_pools/{POOL}/workers/filter", {}) or "[]")
    beats = [worker["last_heartbeat_time"] for worker in workers if worker["last_heartbeat_time"]]
    return any(datetime.fromisoformat(beat).timestamp() >= since for beat in beats)


def _register(environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    log = FOLDER / "deploy.log"
    with log.open("wb") as file:
        done = subprocess.run(
            command, cwd=PROJECT, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        raise ServiceError(f"the deployments were not registered; {log} ends with:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
