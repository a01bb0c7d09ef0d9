"""A quick experiment as Prefect flows and tasks, against the same functions called directly.

Prefect's own work is the difference between two runs of an experiment whose stages are all sealed, so that nothing
is left to compute: one through flows and tasks with a server that already runs, one through the functions that
they decorate. It is set against the seconds that the stages took when they were computed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect import Flow, Task
from prefect.testing.utilities import prefect_test_harness

import flows.epoch
import flows.experiment
import flows.session
from flows.config import load_config
from tasks.datasets.digits import write_digits
from tests.benchmarks.measuring import Plan, Row
from tests.conftest import ROOT, Place

METHOD = "guided"
MODULES = (flows.epoch, flows.session, flows.experiment)


def rows(plan: Plan) -> Iterator[Row]:
    """Prefect's seconds and their share."""
    write_digits(ROOT / "data" / "digits")
    with TemporaryDirectory() as folder, prefect_test_harness(server_startup_timeout=180):
        place = Place(Path(folder))
        config = load_config([f"method={METHOD}", *place.overrides()])

        def direct() -> None:
            with undecorated():
                flows.experiment.run_experiment(config)

        direct()
        timings = (place.root / "state").rglob("timing.json")
        computed = sum(json.loads(path.read_text())["seconds"] for path in timings)
        best = plan.race(
            {
                "prefect": lambda: flows.experiment.fscil("digits", METHOD, 0, place.overrides()),
                "direct": direct,
            }
        )
    added = best["prefect"] - best["direct"]
    share = 100 * added / (computed + best["direct"])
    name = f"an experiment under Prefect ({METHOD}, 3 sessions, {computed:.0f} s of computing)"
    yield Row(name, f"{added:.2f} s more", f"{share:.1f} % more", "<= 5 %", share <= 5)


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
