"""The pages of MLflow and Prefect with a finished experiment in them, as a real browser shows them.

With ``SCREENSHOTS=<folder>`` each page is saved as a picture, to be looked at.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.settings import get_current_settings

from flows import services
from flows.config import load_config
from tasks.tracking_runs import Runs
from tests.browser import TEXT, Browser, find_browser, running_browser
from tests.conftest import Place
from tests.deployment import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome is installed"),
]

SEEN = "[...document.images].some(i => i.complete && i.naturalWidth > 0 && {})"
"""Whether a picture is shown that fits a condition."""
TAB = 'a[href$="/model-metrics"]'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    with running_browser(program, tmp_path_factory.mktemp("browser")) as page:
        page.show(1280, 1000)
        yield page


@contextmanager
def served(
    command: Sequence[str], port: int, health: str, well: str, log: Path, **more: str
) -> Iterator[str]:
    """A service as `make up` starts it, for as long as the block lasts; its address."""
    environment = services.environment_of(port) | {"PREFECT_HOME": str(log.parent / "prefect")} | more
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=out, stderr=out)
    address = f"http://{services.HOST}:{port}"
    try:
        until = time.monotonic() + 120
        while services._get(address + health) != well:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def mlflow_ui(finished: Place, tmp_path: Path) -> Iterator[str]:
    """MLflow's UI on the experiment's database."""
    port = free_port()
    _, service, _ = services.services(0, port, 1)
    ours = f"sqlite:///{finished.root}/mlflow.db"
    command = [ours if part.startswith("sqlite:") else part for part in service.command]
    with served(command, port, "/health", "OK", tmp_path / "log") as address:
        yield address


@pytest.fixture
def prefect_ui(finished: Place, tmp_path: Path) -> Iterator[str]:
    """A server with a UI on the database of the tests' own server, which has none."""
    port = free_port()
    database = get_current_settings().server.database.connection_url
    assert database is not None
    same = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database.get_secret_value()}
    server, _, _ = services.services(port, 0, 1)
    with served(server.command, port, "/api/health", "true", tmp_path / "log", **same) as address:
        yield address


def artifact(key: str) -> Artifact:
    found = get_client(sync_client=True).read_artifacts(
        artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    )
    return found[0]


def kept(browser: Browser, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        browser.screenshot(Path(folder, f"{name}.png"))


def test_mlflow_shows_each_epochs_images_metrics_and_prompts(
    finished: Place, browser: Browser, mlflow_ui: str
) -> None:
    runs = Runs(load_config(finished.overrides(tracking=True)).tracking)
    (session,) = runs.search("tags.`fscil.session` = '0'")
    page = f"{mlflow_ui}/#/experiments/{runs.experiment_id}/runs/{session.info.run_id}"
    browser.open(page)
    browser.wait_for(f"{TEXT}.includes('session-00')")
    kept(browser, "mlflow-run")
    browser.wait_for(f"!!document.querySelector({json.dumps(TAB)})")
    browser.click(TAB)
    browser.wait_for(f"{TEXT}.includes('class/zero')")
    browser.wait_for(SEEN.format("i.src.includes('images')"))
    kept(browser, "mlflow-images")


def test_prefect_shows_the_sessions_page_with_its_pictures(
    finished: Place, browser: Browser, prefect_ui: str
) -> None:
    page = artifact("digits-guided-seed-0-session-0")
    browser.open(f"{prefect_ui}/runs/flow-run/{page.flow_run_id}")
    browser.wait_for(f"{TEXT}.includes('digits · guided · seed 0 · session 0')")
    kept(browser, "prefect-run")
    browser.open(f"{prefect_ui}/artifacts/artifact/{page.id}")
    browser.wait_for(SEEN.format("i.src.startsWith('data:image')"))
    kept(browser, "prefect-session")
