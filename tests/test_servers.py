"""Who can reach what this project starts: programs on this machine, and nobody else."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows import services as services_module
from flows.__main__ import main
from flows.services import HOST, environment_of, services, warning_of
from tasks.miniature.vlm_server import VlmServer

ROOT = Path(__file__).resolve().parent.parent


def test_prefect_and_mlflow_are_started_on_this_machine_alone() -> None:
    assert HOST == "127.0.0.1"
    server, mlflow, worker = services(4200, 5000, 1)
    for service in (server, mlflow):
        assert service.command[service.command.index("--host") + 1] == HOST
    assert "--host" not in worker.command, "it asks, and answers nobody"


@pytest.mark.parametrize(
    ("host", "api"),
    [
        ("0.0.0.0", "http://127.0.0.1:4200/api"),
        ("::", "http://127.0.0.1:4200/api"),
        ("192.0.2.7", "http://192.0.2.7:4200/api"),
        ("fd00::7", "http://[fd00::7]:4200/api"),
    ],
)
def test_another_address_is_one_s_own_wish_and_comes_with_a_warning(host: str, api: str) -> None:
    server, mlflow, _ = services(4200, 5000, 1, host)
    for service in (server, mlflow):
        assert service.command[service.command.index("--host") + 1] == host
    assert environment_of(4200, host)["PREFECT_API_URL"] == api
    (warning,) = warning_of(host)
    assert host in warning
    assert "no login" in warning
    assert warning_of(HOST) == []


def test_usage_reports_are_off_in_all_that_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ui = re.search(r"^ui:.*\n\t@(.+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert ui
    assert "MLFLOW_DISABLE_TELEMETRY=true" in ui[1].split()
    for name in ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    for environment in (environment_of(4200), _quiet()):
        assert environment["DO_NOT_TRACK"] in ("1", "true")
        assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


@pytest.mark.parametrize("own", [None, "7"])
def test_waiting_threads_of_torch_leave_the_cores_to_other_runs(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if own:
        monkeypatch.setenv("GOMP_SPINCOUNT", own)
    assert environment_of(4200)["GOMP_SPINCOUNT"] == (own or "5000")
    assert _quiet()["GOMP_SPINCOUNT"] == (own or "5000")


@pytest.mark.parametrize("own", [None, "7"])
def test_a_prefect_server_that_hangs_is_not_waited_for_a_minute_each_time(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_REQUEST_TIMEOUT", raising=False)
    if own:
        monkeypatch.setenv("PREFECT_API_REQUEST_TIMEOUT", own)
    assert environment_of(4200)["PREFECT_API_REQUEST_TIMEOUT"] == (own or "10")
    assert _quiet()["PREFECT_API_REQUEST_TIMEOUT"] == (own or "10")


def _quiet() -> dict[str, str]:
    """The environment after :func:`quieten`, in a process of its own, for libraries read it once."""
    code = "import json, os; from flows.cli import quieten; quieten(); print(json.dumps(dict(os.environ)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_an_address_of_another_machine_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services_module, "FOLDER", tmp_path)  # where those of this checkout may be running
    assert main(["up", "--host", "192.0.2.7"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "nothing can listen on port 4200 of '192.0.2.7'" in said
    assert "give an address of this machine" in said


def test_the_vlm_server_binds_this_machine_alone() -> None:
    server = VlmServer(reader=None, port=0, model="m")  # type: ignore[arg-type]
    try:
        assert server.socket.getsockname()[0] == "127.0.0.1"
    finally:
        server.server_close()
        server.reader.close()


def test_no_file_names_an_address_that_all_can_reach() -> None:
    anyone = re.compile(r"0\.0\.0\.0|--host[= ]+(?!127\.0\.0\.1)[\"']?[\d*]")
    files = [  # but flows/services.py, which is told the address and warns
        *(ROOT / "flows").rglob("*.py"),
        *(ROOT / "tasks").rglob("*.py"),
        ROOT / "Makefile",
        ROOT / "prefect.yaml",
    ]
    assert [file.name for file in files if anyone.search(file.read_text("utf-8"))] == ["services.py"]
    bound = [
        node.args[0].elts[0]
        for file in files[:-2]
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith((".bind", "create_server"))
        and node.args
        and isinstance(node.args[0], ast.Tuple)
    ]
    assert {ast.unparse(host) for host in bound} == {"HOST", "host"}, (
        "host: of the probe whether a port is free"
    )
