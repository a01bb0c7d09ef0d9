"""Reading back what long runs leave: the report, a trace and the list of stages, at ten, a hundred and a thousand epochs.

The runs are fabricated: three classes, two images a class and epoch, every kind of file that a real run leaves.
Promised is that an epoch costs no more in a long run than in a short one, within half of it: then nothing is read
again for each epoch that there is.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.garbage import garbage
from flows.report import build
from flows.trace import trace
from tests.benchmarks.measuring import Call, Plan, Row
from tests.helpers import fabricate_run

EPOCHS = (10, 100, 1000)
GROWTH = 1.5


def rows(plan: Plan) -> Iterator[Row]:
    """A row for each way of reading."""
    few = Plan(plan.clock, min(plan.rounds, 2), plan.device)
    with TemporaryDirectory() as name:
        places = {epochs: Path(name) / str(epochs) for epochs in EPOCHS}
        for epochs, place in places.items():
            fabricate_run(place, epochs=epochs // 2)  # of each of two sessions
        yield _row("the report on a run", few.race({n: _report(place) for n, place in places.items()}))
        yield _row("the trace of its last image", few.race({n: _trace(place) for n, place in places.items()}))
        yield _row(
            "the list of its sealed stages", few.race({n: _list(place) for n, place in places.items()})
        )


def _report(place: Path) -> Call:
    def call() -> None:
        shutil.rmtree(place / "reports", ignore_errors=True)
        build(place / "runs", place / "reports", place / "state")

    return call


def _trace(place: Path) -> Call:
    last = max(place.glob("runs/digits/guided/seed-0/session-01/epoch-*/images"))
    image = min(last.rglob("*.png"))
    return lambda: trace(str(image), place / "runs", place / "state")


def _list(place: Path) -> Call:
    """What `fscil gc` reads: every stage that a run names, beside every one that is there."""
    return lambda: garbage(place / "runs", place / "state", 0)


def _row(what: str, seconds: Mapping[int, float]) -> Row:
    told = ", ".join(f"{took:.2f} s" for took in seconds.values())
    (_, hundred), (_, thousand) = list(seconds.items())[-2:]
    growth = thousand / hundred / 10
    return Row(
        f"{what} of {', '.join(f'{n:,}' for n in seconds)} epochs",
        told,
        f"an epoch of the longest {growth:.2f} x one of the middle one",
        f"<= {GROWTH}",
        growth <= GROWTH,
    )
