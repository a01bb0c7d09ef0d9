"""Who can reach what this project starts: programs on this machine, and nobody else."""

import ast
import re
from pathlib import Path

from flows.services import HOST, services
from tasks.miniature.vlm_server import VlmServer

ROOT = Path(__file__).resolve().parent.parent


def test_prefect_and_mlflow_are_started_on_this_machine_alone() -> None:
    assert HOST == "127.0.0.1"
    server, mlflow, worker = services(4200, 5000, 1)
    for service in (server, mlflow):
        assert service.command[service.command.index("--host") + 1] == HOST
    assert "--host" not in worker.command, "it asks, and answers nobody"


def test_the_vlm_server_binds_this_machine_alone() -> None:
    server = VlmServer(reader=None, port=0, model="m")  # type: ignore[arg-type]
    try:
        assert server.socket.getsockname()[0] == "127.0.0.1"
    finally:
        server.server_close()
        server.reader.close()


def test_no_file_names_an_address_that_all_can_reach() -> None:
    anyone = re.compile(r"0\.0\.0\.0|--host[= ]+(?!127\.0\.0\.1)[\"']?[\d*]")
    files = [
        *(ROOT / "flows").rglob("*.py"),
        *(ROOT / "tasks").rglob("*.py"),
        ROOT / "Makefile",
        ROOT / "prefect.yaml",
    ]
    assert [file.name for file in files if anyone.search(file.read_text("utf-8"))] == []
    bound = [
        node.args[0].elts[0]
        for file in files[:-2]
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(".bind")
        and node.args
        and isinstance(node.args[0], ast.Tuple)
    ]
    assert {ast.unparse(host) for host in bound} <= {"HOST", "'127.0.0.1'"}
