"""docs/mlflow.md describes every metric that a run writes, and names none that cannot be."""

import re
import sqlite3

from tasks.tracked import STAGES
from tests.conftest import ROOT, Place

ROWS = re.findall(r"^\| `([a-z_]+/[^`]+)` \|", (ROOT / "docs" / "mlflow.md").read_text("utf-8"), re.MULTILINE)
NOT_IN_EVERY_RUN = {  # prices, an image service, a term of the loss, a GPU
    "budget/vlm_cost", "compare/cost", "budget/drawing_calls", "regenerate/calls", "gpu_memory_mib/<stage>",
}  # fmt: skip


def written(place: Place) -> set[str]:
    with sqlite3.connect(place.root / "mlflow.db") as database:
        return {name for (name,) in database.execute("select distinct key from metrics")}


def described(name: str) -> bool:
    group, rest = name.split("/", 1)
    return name in ROWS or f"{group}/*" in ROWS or (f"{group}/<stage>" in ROWS and rest in STAGES)


def test_every_metric_of_a_guided_run_is_described(finished: Place) -> None:
    names = written(finished)
    assert len(names) > 40
    assert not [name for name in sorted(names) if not described(name)]


def test_what_is_described_is_written(finished: Place) -> None:
    names = written(finished)
    groups = {f"{name.split('/')[0]}/{end}" for name in names for end in ("*", "<stage>")}
    assert set(ROWS) - names - groups - {"system/*"} == NOT_IN_EVERY_RUN
