"""`make up` and `make down`: the Prefect server, a worker and the MLflow UI, on 127.0.0.1 of this machine.

Each service is a process group of its own with two files below ``.fscil/services``: ``<name>.pid``, which holds
"pid port" and which the process keeps locked for as long as it lives, so that a number that the system gave to
another program is never taken for a service; and ``<name>.log``. Nothing here imports
Prefect, MLflow or torch, so that it is quick.
"""

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

PROJECT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
POOL = "fscil"
FOLDER = PROJECT / ".fscil" / "services"
START_S, STOP_S = 300, 20
LOG_LINES = 8

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServiceError(RuntimeError):
    """A service did not start; the message says which, why, and where its log is."""


@dataclass(frozen=True)
class Service:
    """One process: its files' name, what runs, and the port that it is known by."""

    name: str
    command: tuple[str, ...]
    port: int

    @property
    def pid_file(self) -> Path:
        """Holds "pid port", and the lock."""
        return FOLDER / f"{self.name}.pid"

    @property
    def log(self) -> Path:
        """What the process prints."""
        return FOLDER / f"{self.name}.log"


def services(prefect_port: int, mlflow_port: int, runs_at_once: int) -> tuple[Service, Service, Service]:
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
            (*prefect, "server", "start", "--host", HOST, "--port", str(prefect_port)),
            prefect_port,
        ),
        Service(
            "mlflow",
            (*mlflow, "--host", HOST, "--port", str(mlflow_port), "--workers", "1"),
            mlflow_port,
        ),
        Service("worker", (*prefect, *work), prefect_port),
    )


def up(prefect_port: int = 4200, mlflow_port: int = 5000, runs_at_once: int = 1) -> list[str]:
    """Start what does not run yet, wait until each answers, register the deployments of prefect.yaml.

    Args:
        prefect_port: of the Prefect server.
        mlflow_port: of the MLflow UI.
        runs_at_once: how many flow runs the worker has under way; the others wait.

    Returns:
        Lines that say where everything is.

    Raises:
        ValueError: a port is taken by another program, or the services run on other ports.
        ServiceError: one of them did not start.
    """
    server, mlflow, worker = services(prefect_port, mlflow_port, runs_at_once)
    _check_ports(server, mlflow, worker)
    environment = environment_of(prefect_port)
    api, ui = environment["PREFECT_API_URL"], f"http://{HOST}:{mlflow_port}"
    for service in (server, mlflow):
        _start(service, environment)
    _wait(server, lambda: _get(f"{api}/health") == "true")
    since = time.time() - 60 * (running(worker) is not None)
    _start(worker, environment)
    _wait(mlflow, lambda: _get(f"{ui}/health") == "OK")
    _wait(worker, lambda: _polled_since(api, since))
    _register(environment)
    return [
        f"Prefect UI   http://{HOST}:{prefect_port}   (runs, logs, parameters)",
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


def environment_of(prefect_port: int) -> dict[str, str]:
    """What the services and the flow runs that they start are told."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_SERVER_")}
    return kept | {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_API_URL": f"http://{HOST}:{prefect_port}/api",
        "PREFECT_HOME": str(PROJECT / ".fscil" / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }


# ------------------------------------------------------------------------------------------ processes


def running(service: Service) -> tuple[int, int] | None:
    """The service's process id and port, if it lives: its file is locked for just as long."""
    try:
        with service.pid_file.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, port = file.read().split()
                return int(pid), int(port)
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
        lock.write(f"{process.pid} {service.port}")


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
        if found and found[1] != service.port:
            raise ValueError(
                f"the {service.name} already runs on port {found[1]}: `make down` first to move it to {service.port}"
            )
        if found is None and service.name != "worker" and _listens(service.port):
            setting = "PREFECT_PORT" if service.name == "server" else "MLFLOW_PORT"
            raise ValueError(
                f"port {service.port} is taken by another program; choose another: make up {setting}=<port>"
            )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


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
