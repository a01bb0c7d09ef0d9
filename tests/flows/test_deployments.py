"""prefect.yaml's deployments are the flow with settings that compose; `make up` serves them, `make down` ends that."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows import services
from flows.config import load_config
from flows.experiment import all_overrides, fscil, preflight
from flows.services import Service
from tests.canaries import CANARIES, holding
from tests.conftest import QUICK, ROOT, Place
from tests.deployment import Clone, free_port
from tests.storm import not_kept

FILE = yaml.safe_load((ROOT / "prefect.yaml").read_text())
ALL = {entry["name"]: entry for entry in FILE["deployments"]}
DEPLOYMENTS = {name: entry for name, entry in ALL.items() if name != "epoch"}
SLEEP = (sys.executable, "-c", "import time; time.sleep(120)")


def overrides_of(name: str, *more: str) -> list[str]:
    parameters = DEPLOYMENTS[name]["parameters"]
    return all_overrides(**{**parameters, "overrides": [*parameters["overrides"], *more]})


def test_there_is_one_for_each_dataset() -> None:
    assert set(DEPLOYMENTS) == {"digits", "cub200", "cifar100", "miniimagenet", "imagefolder"}
    assert {entry["work_pool"]["name"] for entry in ALL.values()} == {services.POOL}


@pytest.mark.parametrize("name", sorted(DEPLOYMENTS))
def test_its_entrypoint_imports_and_its_parameters_compose(name: str) -> None:
    module, _, attribute = DEPLOYMENTS[name]["entrypoint"].rpartition(".")
    assert getattr(import_module(module), attribute) is fscil
    assert fscil.validate_parameters(DEPLOYMENTS[name]["parameters"])
    config = load_config(overrides_of(name))
    assert config.dataset.name == name
    assert ("vit_b16" in str(DEPLOYMENTS[name])) == (config.generator.size == 512)


def test_an_epoch_is_replayed_by_one_of_them(finished: Place) -> None:
    module, _, attribute = ALL["epoch"]["entrypoint"].rpartition(".")
    flow = getattr(import_module(module), attribute)
    given = ALL["epoch"]["parameters"]
    assert flow.name == "replay"
    assert flow.validate_parameters(given)
    folder = finished.run("guided") / "session-01" / "epoch-000"
    chosen = {
        "folder": str(folder),
        "stages": "mine",
        "overrides": [f"runtime.state={finished.root / 'state'}"],
    }
    state = flow(**given | chosen, return_state=True)
    assert state.result().equal
    assert state.message == f"identical: 1 of 1 stages of {folder}"
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(state.state_details.flow_run_id)
        shown = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        )
    assert run.name == "replay · digits/guided/seed-0 · session 1 · epoch 0"
    assert [json.loads(one.data)[0]["outcome"] for one in shown if one.key == "replay"] == ["identical"]
    assert "identical: 1 of 1 stages" in shown[0].description


def test_overrides_win_over_the_other_parameters() -> None:
    said = overrides_of("cub200", "seed=2", "method=vlm", "generator=miniature")
    config = load_config(said)
    assert (config.seed, config.method, config.generator.size) == (2, "vlm", 32)
    assert len({one.partition("=")[0] for one in said}) == len(said)


@pytest.mark.parametrize("name", ["cub200", "cifar100", "miniimagenet"])
def test_without_its_data_it_ends_before_any_compute(name: str, tmp_path: Path) -> None:
    places = ("root", "splits")
    missing = [f"dataset.{place}={tmp_path / name / place}" for place in places]
    folders = [f"runtime.{place}={tmp_path / place}" for place in ("state", "runs")]
    with pytest.raises(ValueError, match=f"make data DATASET={name}|dataset.root"):
        preflight(load_config(overrides_of(name, *missing, *folders)))
    assert not list(tmp_path.rglob("stages"))


# ------------------------------------------------------------------------------------------ services


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(services, "FOLDER", tmp_path)
    yield tmp_path
    services.down()


def test_a_service_is_known_by_its_lock_and_ended_alone(folder: Path) -> None:
    bystander = subprocess.Popen(SLEEP)
    service = Service("worker", SLEEP, 4999)
    services._start(service, os.environ)
    found = services.running(service)
    assert found is not None
    assert found[1] == 4999
    services._start(service, os.environ)
    assert services.running(service) == found, "a service that runs is not started twice"
    assert services.down() == ["worker"]
    assert services.running(service) is None
    assert services.down() == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_file_left_by_a_crash_names_no_service(folder: Path) -> None:
    service = Service("server", SLEEP, 4200)
    service.pid_file.write_text(f"{os.getpid()} 4200")
    assert services.running(service) is None
    assert services.down() == [], "the number is another program's by now: this test's own"


def test_a_taken_port_is_one_sentence(folder: Path) -> None:
    with socket.socket() as other:
        other.bind((services.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is taken .* make up PREFECT_PORT="):
            services.up(port, 1)
    assert list(folder.iterdir()) == []


def test_a_service_that_dies_is_named_with_the_end_of_its_log(folder: Path) -> None:
    service = Service("mlflow", (sys.executable, "-c", "print('no room')"), 5999)
    services._start(service, os.environ)
    with pytest.raises(services.ServiceError, match=r"(?s)mlflow ended .*no room"):
        services._wait(service, lambda: False)


# ------------------------------------------------------------------------------------------ end to end


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_up_runs_deployments_and_down_ends_all_of_it(tmp_path: Path, digits: Path) -> None:
    clone = Clone(tmp_path / "clone")
    try:
        for _ in range(2):  # the second finds everything running
            done = clone.make("up")
            assert done.returncode == 0, done.stderr + done.stdout
            assert f"http://127.0.0.1:{clone.port}" in done.stdout
            assert f"http://127.0.0.1:{clone.mlflow}" in done.stdout
        assert "make up" in clone.make("up", f"PREFECT_PORT={free_port()}").stderr.replace(
            "make down", "make up"
        )

        worker = (clone.root / ".fscil" / "services" / "worker.pid").read_text().split()[0]
        given = Path("/proc", worker, "environ").read_bytes()
        assert all(key.encode() in given for key in CANARIES.values()), "what follows was done with the keys"

        began = time.monotonic()
        done = clone.start("fscil/cub200")
        assert done.returncode == 1, done.stdout
        (failed,) = clone.runs()
        assert failed["name"] == "cub200 · guided · seed 0"
        assert "make data DATASET=cub200" in failed["state"]["message"]
        assert "make data DATASET=cub200" in clone.logs(failed["id"])
        assert not (clone.root / ".fscil" / "stages").exists()
        assert time.monotonic() - began < 240, "seconds on a machine of its own"

        done = clone.start("fscil/digits", overrides=["tuning.updats=3"])
        assert done.returncode == 1
        assert "did you mean tuning.updates?" in clone.runs()[0]["state"]["message"]

        quick = [*QUICK, "dataset.n_sessions=0", "seed=2", "method=finetune", "stopping.max_epochs=1"]
        done = clone.start("fscil/digits", overrides=quick)
        assert done.returncode == 0, done.stdout + done.stderr
        assert clone.runs()[0]["name"] == "digits · finetune · seed 2"
        assert clone.runs()[0]["parameters"]["overrides"] == quick
        run = clone.root / "runs" / "digits" / "finetune" / "seed-2"
        assert (run / "experiment.json").is_file()
        assert not_kept(run) == []
        assert (clone.root / "mlflow.db").is_file()

        epoch = "runs/digits/finetune/seed-2/session-00/epoch-000"
        done = clone.start("replay/epoch", folder=epoch)
        assert done.returncode == 0, done.stdout + done.stderr
        (replayed,) = clone.runs("replay")
        assert replayed["name"] == "replay · digits/finetune/seed-2 · session 0 · epoch 0"
        assert replayed["state"]["type"] == "COMPLETED"
        assert replayed["state"]["message"] == f"identical: 2 of 2 stages of {epoch}"
    finally:
        done = clone.make("down")
    assert done.stdout.strip() == "ended: worker, mlflow, server"
    assert services._get(f"{clone.environment['PREFECT_API_URL']}/health") is None
    assert "nothing was running" in clone.make("down").stdout
    for searched in (".fscil/services/worker.log", ".fscil/prefect/prefect.db", "mlflow.db"):
        assert (clone.root / searched).is_file()
    assert list(holding(clone.root)) == []
