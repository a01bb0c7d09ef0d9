"""A whole run whose MLflow is not there: it goes on or stops as a setting says, and `fscil track` catches up."""

import shutil
from pathlib import Path

import pytest

from flows.experiment import fscil
from flows.track import track
from tasks.tracking import TrackingError
from tests.conftest import Place
from tests.flows.test_track import content, settings_at


def test_a_run_without_its_mlflow_goes_on_and_is_tracked_later(
    finished: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    place = Place(tmp_path)
    shutil.copytree(finished.root / "state", tmp_path / "state")
    told = place.overrides(tracking=True)
    dead = [*told, "tracking.uri=http://127.0.0.1:9"]
    with pytest.raises(TrackingError, match=r"nothing sealed is lost.*tracking\.strict=false"):
        fscil("digits", "guided", 0, [*dead, "tracking.strict=true"])
    assert not list(place.run("guided").glob("session-*"))
    fscil("digits", "guided", 0, dead)
    assert place.files("guided") == finished.files("guided")
    assert [record.name for record in caplog.records].count("fscil.tracking") == 1
    (caught_up,) = track(tmp_path / "runs", tmp_path / "state", settings_at(tmp_path))
    assert caught_up.status == "finished"
    before, after = content(finished.root), content(tmp_path)
    for name in ("points", "statuses", "tags", "models", "files", "spans"):
        assert after[name] == before[name], name
