"""MLflow unreachable at the start, in the middle, at the end: one warning or one error, and it catches up later."""

import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.tracking import Tracker, TrackingError
from tasks.tracking_runs import TrackingSettings, open_client
from tasks.vlm.transport import VlmError
from tests.helpers import PROVENANCE, FabricatedRun, fabricate_run
from tests.strangers import nobody, silent, somebody_else
from tests.test_tracking import Seen, settings_at, tell

PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, made once: that costs seconds."""
    root = tmp_path_factory.mktemp("mlflow")
    MlflowClient(settings_at(root).uri).search_experiments()
    return root / "mlflow.db"


def settings_of(root: Path, empty_database: Path, **changes: object) -> TrackingSettings:
    root.mkdir(exist_ok=True)
    shutil.copy(empty_database, root / "mlflow.db")
    return settings_at(root, **changes)


def shown(settings: TrackingSettings) -> object:
    """All that MLflow holds, without its own ids and the time at which the summary was written."""
    plain = []
    for name, status, points, tags, params, files in Seen(settings).everything():  # type: ignore[attr-defined]
        timed = {
            key: [
                (step, value, "result" if key.startswith(("result/", "budget/")) else at)
                for step, value, at in told
            ]
            for key, told in points.items()
        }
        plain.append((name, status, timed, {k: v for k, v in tags.items() if k != PARENT}, params, files))
    versions = Seen(settings).client.search_model_versions("")
    return plain, sorted((one.name, one.tags["fscil.session"]) for one in versions)


class Dying:
    """MLflow's client until so many calls were made; the last one is carried out, but its answer is lost."""

    def __init__(self, client: MlflowClient, calls: int) -> None:
        self._client, self.left = client, calls

    def __getattr__(self, name: str) -> Callable[..., object]:
        real = getattr(self._client, name)

        def call(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left < 0:
                raise ConnectionError("refused")
            answer = real(*args, **kwargs)
            if self.left == 0:
                raise ConnectionResetError("the answer was lost")
            return answer

        return call


def dying_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Dying]:
    """Let the next tracker's MLflow die; gives what counts its calls."""
    made: list[Dying] = []

    def opened(settings: TrackingSettings) -> Dying:
        made.append(Dying(open_client(settings), calls))
        return made[-1]

    monkeypatch.setattr("tasks.tracking_runs.open_client", opened)
    return lambda: made[-1]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 0.99])
def test_wherever_mlflow_dies_it_catches_up_to_the_very_same(
    share: float,
    tmp_path: Path,
    empty_database: Path,
    calm: tuple[FabricatedRun, object, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, undisturbed, calls = calm
    settings = settings_of(tmp_path, empty_database, strict=False)
    with monkeypatch.context() as patched:
        dying_after(1 + int(share * calls), patched)
        tracker = tell(settings, made)
    assert not tracker.usable
    said = [record.message for record in caplog.records if record.name == "fscil.tracking"]
    assert len(said) == 1
    assert "the run goes on without it: `fscil track`" in said[0]
    tell(settings, made)
    assert shown(settings) == undisturbed


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[FabricatedRun, object, int]:
    """A run, what MLflow shows of it when nothing disturbs, and how many calls that takes."""
    root = tmp_path_factory.mktemp("calm")
    made, settings = fabricate_run(root), settings_of(root, empty_database)
    with pytest.MonkeyPatch.context() as patched:
        counter = dying_after(10**6, patched)
        tell(settings, made)
    return made, shown(settings), 10**6 - counter().left


# ------------------------------------------------------------------------------------------ ways to be unreachable


@contextmanager
def locked(root: Path) -> Iterator[str]:
    other = sqlite3.connect(root / "mlflow.db", isolation_level=None)
    other.execute("begin exclusive")
    yield f"sqlite:///{root}/mlflow.db?timeout=0.2"
    other.close()


@contextmanager
def read_only(root: Path) -> Iterator[str]:
    with chdir(root):  # MLflow makes a folder of the address's first part
        yield f"sqlite:///file:{root}/mlflow.db?mode=ro&uri=true"


@contextmanager
def cut_in_half(root: Path) -> Iterator[str]:
    data = (root / "mlflow.db").read_bytes()
    (root / "mlflow.db").write_bytes(data[: len(data) // 2])
    yield f"sqlite:///{root}/mlflow.db"


@pytest.mark.parametrize("way", [nobody, silent, somebody_else, locked, read_only, cut_in_half])
def test_an_mlflow_that_cannot_be_written_is_one_warning_or_stops_the_run_as_the_settings_say(
    way: Callable[[Path], object],
    tmp_path: Path,
    empty_database: Path,
    calm: tuple[FabricatedRun, object, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    settings = settings_of(tmp_path, empty_database, strict=False)
    with way(tmp_path) as uri:  # type: ignore[attr-defined]
        tracker = tell(settings.model_copy(update={"uri": uri}), calm[0])
        assert not tracker.usable
        strict = Tracker(settings.model_copy(update={"uri": uri, "strict": True}), calm[0].store, calm[0].run)
        with pytest.raises(TrackingError, match=r"MLflow at .* failed in start .*tracking\.strict=false"):
            strict.start(calm[0].config, PROVENANCE)
    said = [record.message for record in caplog.records if record.name == "fscil.tracking"]
    assert len(said) == 1
    assert "\n" not in said[0]
    assert len(said[0]) < 800


def test_an_error_of_the_run_is_not_hidden_by_mlflows(
    tmp_path: Path, empty_database: Path, calm: tuple[FabricatedRun, object, int], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings = settings_of(tmp_path, empty_database, strict=True)
    dies = dying_after(10**6, monkeypatch)

    def failing() -> None:
        with Tracker.of(settings, calm[0].store, calm[0].run) as tracker:
            tracker.start(calm[0].config, PROVENANCE)
            dies().left = 0
            raise VlmError("the VLM takes no more requests")

    with (
        caplog.at_level(logging.WARNING, "fscil.tracking"),
        pytest.raises(VlmError, match="no more requests"),
    ):
        failing()
    assert "failed in fail" in caplog.text
