"""MLflow written again from the records holds what the run itself wrote."""

import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.__main__ import main
from flows.config import load_config
from flows.experiment import fscil
from flows.track import track
from tasks.store import Store
from tasks.tracking_runs import ERROR_TAG, TrackingSettings
from tests.conftest import Place


def settings_at(place: Path) -> TrackingSettings:
    overrides = [f"tracking.uri=sqlite:///{place}/mlflow.db", f"tracking.artifacts={place}/mlartifacts"]
    return load_config(overrides).tracking


def content(place: Path) -> dict[str, set[tuple[object, ...]]]:
    """Points with their times, statuses, tags but for who wrote them, and files with their sizes."""
    with sqlite3.connect(place / "mlflow.db") as database:
        points = database.execute(
            "select name, key, step, value, timestamp from metrics join runs using (run_uuid) "
            "where key not like 'result/%' and key not like 'budget/%' and key not like 'system/%'"
        ).fetchall()
        statuses = database.execute("select name, status from runs").fetchall()
        tags = database.execute(
            "select name, key, value from tags join runs using (run_uuid) "
            "where key not like 'mlflow.%' and key not like 'command'"
        ).fetchall()
        spans = database.execute(
            "select name, span_id, content ->> 'start_time_unix_nano' from spans"
        ).fetchall()
        models = database.execute("select name, version from model_versions").fetchall()
    files = [p for p in (place / "mlartifacts").rglob("*") if p.is_file()]
    named = {(*p.relative_to(place / "mlartifacts").parts[1:], p.stat().st_size) for p in files}
    return {
        "points": set(points), "statuses": set(statuses), "tags": set(tags), "models": set(models), "files": named,
        "spans": set(spans),
    }  # fmt: skip


def test_what_is_written_again_is_what_was_written(finished: Place, tmp_path: Path) -> None:
    (told,) = track(finished.root / "runs", finished.root / "state", settings_at(tmp_path))
    assert told.sentence() == "digits/guided/seed-0: 3 sessions, 6 epochs, finished"
    before, after = content(finished.root), content(tmp_path)
    for name in ("points", "statuses", "tags", "models", "files", "spans"):
        assert after[name] == before[name], name
    assert len(after["points"]) > 100
    assert len(after["spans"]) > 19, "the run asked the VLM 19 times"
    list(track(finished.root / "runs", finished.root / "state", settings_at(tmp_path)))
    assert content(tmp_path) == after, "a second time adds nothing"


def test_a_run_that_stopped_before_its_end_says_so(finished: Place, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished.root / "runs", runs)
    (runs / "digits" / "guided" / "seed-0" / "experiment.json").unlink()
    shutil.rmtree(runs / "digits" / "guided" / "seed-0" / "session-02" / "test")
    (runs / "digits" / "guided" / "seed-0" / "session-02" / "record.json").unlink()
    (told,) = track(runs, tmp_path / "no state", settings_at(tmp_path))
    assert told.status == "stopped before its end"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.run_name: run.info.status for run in found} == {
        "digits/guided/seed-0": "KILLED", "session-00": "FINISHED", "session-01": "FINISHED", "session-02": "KILLED",
    }  # fmt: skip


def test_a_run_that_failed_stays_so_when_it_is_told_again(finished: Place, tmp_path: Path) -> None:
    runs, settings = tmp_path / "runs", settings_at(tmp_path)
    shutil.copytree(finished.root / "runs", runs)
    run = runs / "digits" / "guided" / "seed-0"
    (run / "experiment.json").unlink()
    last = (run / "session-02").rename(tmp_path / "session-02")
    list(track(runs, finished.root / "state", settings))
    client = MlflowClient(settings.uri)
    (parent,) = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], "attributes.run_name = 'digits/guided/seed-0'"
    )
    client.set_terminated(parent.info.run_id, "FAILED")
    client.set_tag(parent.info.run_id, ERROR_TAG, "ValueError: session 1: diverged")
    (last / "record.json").unlink()
    last.rename(run / "session-02")  # it went on without MLflow
    list(track(runs, finished.root / "state", settings))
    again = client.get_run(parent.info.run_id)
    found = client.search_runs([parent.info.experiment_id])
    assert {one.info.status for one in found} == {"FAILED", "FINISHED"}, "none is left running"
    assert again.info.status == "FAILED"
    assert again.data.tags[ERROR_TAG] == "ValueError: session 1: diverged"


def test_a_run_in_the_hands_of_another_process_is_left_alone(
    finished: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.root / "state", tmp_path / "state")
    places = ["--runs", str(finished.root / "runs"), "--state", str(tmp_path / "state")]
    here = [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"tracking.artifacts={tmp_path / 'mlartifacts'}"]
    with Store(tmp_path / "state").track_lock("digits/guided/seed-0"):
        assert main(["track", *places, *here]) == 1
    assert "another process is at it" in capsys.readouterr().out
    assert not (tmp_path / "mlflow.db").exists()


def test_a_run_waits_until_it_has_been_tracked(
    finished: Place, tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds later, rather than being refused; what it has to write to MLflow is written once."""
    shutil.copytree(finished.root / "state", tmp_path / "state")
    shutil.copytree(finished.root / "runs", tmp_path / "runs")
    held, ended = threading.Event(), threading.Event()

    def tracks() -> None:
        with Store(tmp_path / "state").track_lock("digits/guided/seed-0"):
            held.set()
            time.sleep(2)
            ended.set()

    threading.Thread(target=tracks).start()
    held.wait()
    fscil("digits", "guided", 0, Place(tmp_path).overrides())
    assert ended.is_set()
    said = " ".join(capsys.readouterr().err.split())
    assert "waits until another process has tracked digits/guided/seed-0" in said


def test_a_run_that_is_not_there(finished: Place, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run digits/vlm/seed-9; it has digits/guided/seed-0"):
        list(track(finished.root / "runs", tmp_path, settings_at(tmp_path), ["digits/vlm/seed-9"]))
    with pytest.raises(ValueError, match="holds no run; start one with"):
        list(track(tmp_path / "empty", tmp_path, settings_at(tmp_path)))


def test_plain_diffusers_loads_a_registered_adapter(finished: Place, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from flows.config import PROJECT

    client = MlflowClient(f"sqlite:///{finished.root}/mlflow.db")
    version = client.search_model_versions("name = 'fscil-digits-guided'")[0]
    folder = Path(version.source.removeprefix("file://"))
    path = load_config([]).generator.path
    pipeline = StableDiffusionPipeline.from_pretrained(
        PROJECT / path, safety_checker=None, use_safetensors=True
    )
    pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    assert pipeline.get_active_adapters()
    assert any("lora_A" in name for name, _ in pipeline.unet.named_parameters())
