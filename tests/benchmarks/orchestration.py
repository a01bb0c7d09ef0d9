"""An experiment as Prefect flows and tasks, against the same functions called directly.

Prefect's own work is the difference between two runs of an experiment whose stages are all sealed, so that nothing
is left to compute: one through flows and tasks with a server that already runs, one through the functions that
they decorate. It is set against the seconds that the stages took when they were computed. It is the same for each
stage, whatever the stage does: so a quick experiment shows a larger share than one of the size that people run.
The server's start is paid once a command, and not at all where PREFECT_API_URL names one that runs.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import Flow, Task
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_API_URL, temporary_settings

import flows.epoch
import flows.experiment
import flows.session
from flows.config import load_config
from flows.own_server import prefect_server
from tasks.datasets.digits import write_digits
from tests.benchmarks.measuring import Plan, Row
from tests.conftest import QUICK, ROOT

METHOD = "guided"
MODULES = (flows.epoch, flows.session, flows.experiment)
EXPERIMENTS = {
    "quick": QUICK,
    "middling": (
        "dataset.base_shots=30",
        "augmenter.old_classes=10",
        "stopping.max_epochs=2",
        "runtime.device=cpu",
    ),
}
"""By size; the middling one is about a third of the demo's."""


def rows(plan: Plan) -> Iterator[Row]:
    """Prefect's seconds and their share; the promise is for an experiment of the size that people run."""
    write_digits(ROOT / "data" / "digits")
    with TemporaryDirectory() as name, _own_server(Path(name)) as started:
        for size, overrides in EXPERIMENTS.items():
            added, stages, computed, share = _share(plan, Path(name) / size, overrides)
            promised = size == "middling"
            yield Row(
                f"a {size} experiment under Prefect ({METHOD}, 3 sessions, {stages} stages, {computed:.0f} s of computing)",
                f"{added:.2f} s more, {1000 * added / stages:.0f} ms a stage",
                f"{share:.1f} % more",
                "<= 5 %" if promised else "",
                share <= 5 if promised else None,
            )
        yield Row("- Prefect's server, once a command", f"{started:.1f} s to start")


def _share(plan: Plan, place: Path, overrides: tuple[str, ...]) -> tuple[float, int, float, float]:
    """Seconds that Prefect adds, stages, seconds of computing, and per cent."""
    given = [
        *overrides, f"dataset.root={ROOT / 'data' / 'digits'}", f"runtime.state={place / 'state'}",
        f"runtime.runs={place / 'runs'}", "tracking=off",
    ]  # fmt: skip
    config = load_config([f"method={METHOD}", *given])

    def direct() -> None:
        with undecorated():
            flows.experiment.run_experiment(config)

    direct()
    timings = [json.loads(path.read_text())["seconds"] for path in place.rglob("timing.json")]
    few = Plan(plan.clock, min(plan.rounds, 3), plan.device)
    best = few.race({"prefect": lambda: flows.experiment.fscil("digits", METHOD, 0, given), "direct": direct})
    added = best["prefect"] - best["direct"]
    return added, len(timings), sum(timings), 100 * added / (sum(timings) + best["direct"])


@contextmanager
def _own_server(folder: Path) -> Iterator[float]:
    """A server as a command starts it, on a database of its own; yields the seconds that starting it took."""
    database = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: database, PREFECT_API_URL: None}):
        with prefect_server():
            pass  # makes the tables, which only a first command does
        before = time.perf_counter()
        with prefect_server():
            yield time.perf_counter() - before


@contextmanager
def undecorated() -> Iterator[None]:
    """Flows call plain functions for a while."""
    kept = [(module, name, found) for module in MODULES for name, found in vars(module).items()]
    kept = [(module, name, found) for module, name, found in kept if isinstance(found, (Task, Flow))]
    for module, name, decorated in kept:
        setattr(module, name, decorated.fn)
    try:
        yield
    finally:
        for module, name, decorated in kept:
            setattr(module, name, decorated)
