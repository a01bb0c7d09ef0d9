"""What ``fscil report`` writes: which files, the same bytes twice, the terminal's table; runs that are not finished."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from flows.__main__ import main
from flows.curves import draw, points
from flows.report import build, print_table
from flows.results import collect
from tests.flows.test_tables import two_methods
from tests.helpers import fabricate_run

FILES = [
    "curves.png", "curves.svg", "metrics.json", "report.html", "sessions.csv", "table.csv", "table.md", "table.tex",
]  # fmt: skip


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    places = (tmp_path / "runs", tmp_path / "out", tmp_path / "state")
    first = {path: path.read_bytes() for path in build(*places)}
    second = {path: path.read_bytes() for path in build(*places)}
    assert sorted(path.name for path in first) == FILES
    assert first == second


def test_no_runs_is_said_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"holds no run; start one with: fscil dataset=digits"):
        build(tmp_path / "runs", tmp_path / "out", tmp_path / "state")
    assert main(["report", str(tmp_path / "runs")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", "a", "b", "c", "d"]) == 2


def test_the_terminal_table_fits_eighty_columns(tmp_path: Path) -> None:
    made = [fabricate_run(tmp_path, method=method, seconds=5.8) for method in ("guided", "finetune")]
    console = Console(file=io.StringIO(), width=80)
    print_table(
        [one.experiment for one in made if one.experiment], tmp_path / "runs", tmp_path / "state", console
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    row = next(line for line in text.splitlines() if line.startswith("guided"))
    assert row.split() == ["guided", "1", "85.0", "66.7", "75.8", "50.0", "60.0", "20", "14", "168", "116"]
    assert max(len(line) for line in text.splitlines() if not line.startswith("digits")) <= 80
    assert "digits: guided: 2 VLM answers a run named no verdict or no class (unparsed)" in text
    assert "digits: finetune: " not in text
    assert "guided - finetune: A_last +0.0, novel +0.0 percentage points" in text


def test_curves_are_means_over_seeds(tmp_path: Path) -> None:
    two_methods(tmp_path)
    runs = [run for run in collect(tmp_path / "runs", tmp_path / "state") if run.method == "guided"]
    assert points(runs, lambda accuracy: accuracy.novel) == [
        (1, pytest.approx(70.0), pytest.approx(28.284, abs=1e-3))
    ]
    assert [session for session, _, _ in points(runs, lambda accuracy: accuracy.overall)] == [0, 1]
    assert b"<svg" in draw(runs, "svg")
