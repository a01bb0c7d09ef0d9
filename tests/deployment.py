"""A copy of the project with a Prefect server, a worker and an MLflow of its own, for tests of deployments."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows import services
from tests.canaries import CANARIES
from tests.conftest import ROOT
from tests.storm import made


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((services.HOST, 0))
        return int(probe.getsockname()[1])


class Clone:
    """A copy of the project with ports and a DVC repository of its own, and planted keys in its environment."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.mlflow = made(root), free_port(), free_port()
        for name in ("flows", "tasks", "configs"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "prefect.yaml"):
            shutil.copy2(ROOT / name, root / name)
        (root / "data").mkdir()
        (root / "data" / "digits").symlink_to(ROOT / "data" / "digits")
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        api = f"http://{services.HOST}:{self.port}/api"
        self.environment = kept | CANARIES | {"PREFECT_API_URL": api}

    def make(self, target: str, *more: str) -> subprocess.CompletedProcess[str]:
        settings = (
            f"PREFECT_PORT={self.port}",
            f"MLFLOW_PORT={self.mlflow}",
            f"BIN={Path(sys.executable).parent}",
        )
        return self.run("make", "--no-print-directory", target, *settings, "STAMP=pyproject.toml", *more)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=900
        )

    def start(
        self, deployment: str, *, watch: bool = True, **parameters: Any
    ) -> subprocess.CompletedProcess[str]:
        given = [
            part for key, value in parameters.items() for part in ("--param", f"{key}={json.dumps(value)}")
        ]
        command = [sys.executable, "-m", "prefect", "deployment", "run", deployment]
        return self.run(*command, *(["--watch"] if watch else []), *given)

    def runs(self, flow: str = "fscil") -> list[dict[str, Any]]:
        """The flow runs of a flow, newest first."""
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_DESC"}
        return json.loads(
            services._get(f"{self.environment['PREFECT_API_URL']}/flow_runs/filter", body) or "[]"
        )

    def logs(self, run: str) -> str:
        body = {"logs": {"flow_run_id": {"any_": [run]}}}
        found = json.loads(services._get(f"{self.environment['PREFECT_API_URL']}/logs/filter", body) or "[]")
        return "\n".join(line["message"] for line in found)

    def working(self) -> bool:
        """Whether a flow run's process is alive."""
        mine = f"PREFECT_HOME={self.root}/".encode()
        return any(
            mine in told and b"PREFECT__FLOW_RUN_ID=" in told
            for told in map(_environ, Path("/proc").glob("[0-9]*"))
        )

    def forget_runs(self) -> None:
        """Delete results and sealed stages; the services stay."""
        shutil.rmtree(self.root / "runs", ignore_errors=True)
        for folder in (self.root / ".fscil").iterdir():
            if folder.is_dir() and folder.name not in ("services", "prefect"):
                shutil.rmtree(folder)


def _environ(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""
