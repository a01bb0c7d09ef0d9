"""The tables as files, the published values beside them, and the plot data for DVC."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from flows.formats import (
    columns_of,
    comma_separated,
    latex,
    latex_escaped,
    markdown,
    metrics_json,
    sessions_csv,
)
from flows.published import COLUMNS_OF_THE_PAPER, PublishedRow, published, published_label, published_row
from flows.results import METHODS, collect
from flows.tables import table
from tests.flows.test_tables import row, two_methods
from tests.helpers import fabricate_run

PAPER = Path(__file__).resolve().parents[3] / "shared" / "reference" / "paper.txt"
DATASETS = {"CUB200": "cub200", "CUB 200": "cub200", "CIFAR-100": "cifar100", "miniImageNet": "miniimagenet"}


def test_markdown_marks_the_best_and_shows_the_papers_value() -> None:
    rows = [
        row("finetune", "cub200", A_base=80, A_last=4),
        row("guided", "cub200", A_base=80, A_last=70, novel=60),
    ]
    lines = markdown(rows, ["a - b"]).splitlines()
    assert lines[0] == "## cub200: Compared methods (the paper's Table 1)"
    assert {line.count("|") for line in lines[2:6]} == {len(columns_of(rows)) + 4}
    assert lines[4].startswith(
        "| finetune | 1 | **80.0** (paper 84.2) | <u>4.0</u> (paper 3.8) | – (paper 21.6) |"
    )
    assert lines[5].startswith(
        "| guided | 1 | **80.0** (paper 86.7) | **70.0** (paper 73.8) | – (paper 79.6) |"
    )
    assert lines[5].endswith("| Ours |")
    assert lines[-1] == "- a - b"


def test_digits_have_no_published_value(tmp_path: Path) -> None:
    text = markdown(table(collect(two_methods(tmp_path) / "runs", tmp_path / "state")), [])
    assert "| **92.5 ± 10.6** |" in text
    assert "(paper" not in text


def test_a_cost_is_printed_where_a_price_was_known() -> None:
    assert "cost" not in [column.name for column in columns_of([row("guided", images=100)])]
    text = markdown([row("guided", cost=123.4), row("finetune")], [])
    assert "| VLM tokens | cost |" in text
    assert "| 1.23 |" in text


def test_latex_is_escaped_and_marked() -> None:
    rows = [row("fixed_sd", "mini&net", n=2, A_last=48), row("guided", "mini&net", n=2, A_last=95)]
    text = latex(rows)
    assert r"\caption{mini\&net: " in text
    assert r"fixed\_sd & 2 & -- & \underline{48.0 $\pm$ 0.0} & --" in text
    assert r"guided & 2 & -- & \textbf{95.0 $\pm$ 0.0} & --" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 1
    widths = {line.count(" & ") for line in text.splitlines() if line.endswith(r" \\")}
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert columns is not None
    assert widths == {len(columns[1]) - 1}


def test_latex_shows_the_papers_value() -> None:
    assert r"\textbf{70.0} (paper 73.8)" in latex(
        [row("guided", "cub200", A_last=70), row("cec", "cub200", A_last=1)]
    )


def test_no_character_of_latex_stays_bare() -> None:
    assert latex_escaped("a_b%{}\\$") == r"a\_b\%\{\}\textbackslash{}\$"


def test_csv_keeps_mean_deviation_and_published_apart(tmp_path: Path) -> None:
    text = comma_separated(table(collect(two_methods(tmp_path) / "runs", tmp_path / "state")))
    finetune, guided = csv.DictReader(io.StringIO(text))
    assert (guided["A_last"], guided["A_last std"]) == ("78.3333", "16.4992")
    assert (guided["seconds"], finetune["seconds"], finetune["images"]) == ("50", "", "0")
    assert (guided["A_last paper"], guided["source"]) == ("", "")
    (printed,) = csv.DictReader(io.StringIO(comma_separated([row("guided", "cub200")])))
    assert (printed["A_last paper"], printed["A_last paper std"], printed["source"]) == (
        "73.82",
        "0.74",
        "Table 1",
    )


# ------------------------------------------------------------------------------------------ for DVC


def test_sessions_are_a_line_each_also_of_an_unfinished_run(tmp_path: Path) -> None:
    fabricate_run(tmp_path, seed=3)
    fabricate_run(tmp_path, seed=4, sealed_sessions=1)
    assert sessions_csv(collect(tmp_path / "runs", tmp_path / "state")).splitlines() == [
        "dataset,method,seed,session,accuracy,base,novel",
        "digits,guided,3,0,85,85,",
        "digits,guided,3,1,66.6667,75,50",
        "digits,guided,4,0,85,85,",
    ]


def test_the_plots_template_speaks_of_columns_that_are_there(tmp_path: Path) -> None:
    fabricate_run(tmp_path, sealed_sessions=1)
    head = sessions_csv(collect(tmp_path / "runs", tmp_path / "state")).splitlines()[0].split(",")
    text = (Path(__file__).resolve().parents[2] / ".dvc" / "plots" / "methods.json").read_text("utf-8")
    fields = set(re.findall(r'"field": "([^"]+)"', text))
    assert fields == {"dataset", "method", "rev", "<DVC_METRIC_X>", "<DVC_METRIC_Y>"}  # rev is DVC's own
    assert {"dataset", "method", "session", "accuracy", "base", "novel"} <= set(head)
    assert json.loads(text)["data"] == {"values": "<DVC_METRIC_DATA>"}


def test_metrics_are_means_in_percent(tmp_path: Path) -> None:
    two_methods(tmp_path)
    fabricate_run(tmp_path, method="cec", sealed_sessions=1)
    found = json.loads(metrics_json(table(collect(tmp_path / "runs", tmp_path / "state"))))
    assert list(found["digits"]) == ["finetune", "guided"]
    assert found["digits"]["guided"] == {
        "A_base": 92.5, "A_last": 78.3333, "A_avg": 85.4167, "novel": 70.0, "harmonic": 75.0,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ published values


def printed_tables(text: str) -> set[tuple[str, str, str, tuple[tuple[float, ...], ...]]]:
    """Rows of the paper's accuracy tables as ``(table, dataset, label, cells)``, read off its text."""
    lines = text.splitlines()
    found = set()
    for number, line in enumerate(lines):
        if not (caption := re.match(r"(Table [134]):", line)):
            continue
        start = max(n for n in range(number) if lines[n].startswith("Dataset\t"))
        rows = [re.sub(r"</?[bu]>", "", row).split("\t") for row in lines[start : number - 1]]
        datasets = [DATASETS[name] for name in rows[0][1:] if name]
        for label, *cells in rows[2:]:
            values = tuple(tuple(float(part) for part in cell.split("±")) for cell in cells)
            for place, dataset in enumerate(datasets):
                name = label.replace(r"$\psi$", "ψ")
                found.add((caption[1], dataset, name, values[3 * place : 3 * place + 3]))
    return found


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not at hand")
def test_published_values_are_those_in_the_papers_text() -> None:
    typed = {
        (one.table, one.dataset, one.label, tuple(one.value(column) for column in COLUMNS_OF_THE_PAPER))
        for one in published().rows
    }
    assert len(typed) == len(published().rows) == 34
    assert typed == printed_tables(PAPER.read_text("utf-8"))


def test_tables_that_print_a_row_twice_agree() -> None:
    seen: dict[tuple[str, str], PublishedRow] = {}
    for one in published().rows:
        first = seen.setdefault((one.dataset, one.method), one)
        assert [first.value(c) for c in COLUMNS_OF_THE_PAPER] == [one.value(c) for c in COLUMNS_OF_THE_PAPER]


def test_published_rows_are_of_presets() -> None:
    assert {one.method for one in published().rows} <= set(METHODS)
    assert published_label("sd_vlm") == "+SD+VLM"
    assert published_label("teen") is published_row("digits", "guided") is None
    assert published_row("cub200", "guided").value("novel") is None  # type: ignore[union-attr]
