"""Shared fixtures: a Prefect server of the session's own, and one small experiment that many tests look at."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")

ROOT = Path(__file__).resolve().parent.parent

# A guided experiment in seconds: every stage runs, on few images.
QUICK = (
    "dataset.base_shots=8",
    "dataset.test_per_class=6",
    "augmenter.images_per_original=1",
    "augmenter.min_per_class=3",
    "augmenter.old_classes=1",
    "stopping.max_epochs=2",
    "learner.base.passes=1",
    "learner.incremental.passes=1",
    "mining.centres=2",
    "tuning.updates=2",
    "generator.batch=16",
    "runtime.device=cpu",
)


@dataclass(frozen=True)
class Place:
    """Where a test's experiment keeps its things."""

    root: Path
    data: Path = ROOT / "data" / "digits"

    def overrides(self, *more: str, tracking: bool = False) -> list[str]:
        """Hydra overrides of a quick experiment below this place."""
        chosen = [
            *QUICK,
            f"dataset.root={self.data}",
            f"runtime.state={self.root / 'state'}",
            f"runtime.runs={self.root / 'runs'}",
        ]
        if tracking:
            chosen += [
                f"tracking.uri=sqlite:///{self.root}/mlflow.db",
                f"tracking.artifacts={self.root / 'mlartifacts'}",
            ]
        else:
            chosen.append("tracking=off")
        return [*chosen, *more]

    def run(self, method: str) -> Path:
        """The results folder of seed 0."""
        return self.root / "runs" / "digits" / method / "seed-0"

    def files(self, method: str) -> dict[str, str]:
        """Digest of every file of seed 0's results, config.json aside, which names where things are."""
        from tasks.store import digest_of

        return {
            path.relative_to(self.run(method)).as_posix(): digest_of(path)
            for path in sorted(self.run(method).rglob("*"))
            if path.is_file() and path.name != "config.json"
        }


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="session")
def digits() -> Path:
    from tasks.datasets.digits import write_digits

    write_digits(ROOT / "data" / "digits")
    return ROOT / "data" / "digits"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_server: None, digits: Path) -> Place:
    """A quick guided experiment on real digits that ran to its end, tracked in an MLflow of its own."""
    from flows.experiment import fscil

    place = Place(tmp_path_factory.mktemp("finished"))
    fscil("digits", "guided", 0, place.overrides(tracking=True))
    return place
