"""Rows, marks, sections and differences against numbers worked out by hand."""

from pathlib import Path

import pytest

from flows.results import collect
from flows.tables import (
    COLUMN,
    COLUMNS,
    HEADINGS,
    Row,
    Statistic,
    comparisons,
    difference,
    marks,
    sections,
    table,
)
from tests.helpers import fabricate_run

TWO_SEEDS = (((9, 8), (8, 7, 5)), ((10, 10), (9, 9, 9)))


def two_methods(root: Path) -> Path:
    """Guided with two seeds: A_last 20/30 and 27/30, novel 0.5 and 0.9. Finetune with the first: 12/30, 0."""
    for seed, correct in enumerate(TWO_SEEDS):
        fabricate_run(root, seed=seed, correct=correct, seconds=2.0 + seed, mib=300.0 + 100 * seed)
        bare = fabricate_run(root, method="finetune", seed=seed, correct=((9, 8), (6 + seed, 6, 0)))
        lost = bare.epochs[0].train
        (bare.store.root / "stages" / lost.stage / lost.fingerprint / "timing.json").unlink()
    return root


def cells(row: Row) -> dict[str, str]:
    return dict(zip(HEADINGS, row.texts, strict=True))


def test_rows_are_means_and_deviations_by_hand(tmp_path: Path) -> None:
    runs = collect(two_methods(tmp_path) / "runs", tmp_path / "state")
    finetune, guided = table(runs)
    shown = cells(guided)
    assert (shown["dataset"], shown["method"], shown["seeds"]) == ("digits", "guided", "2")
    assert shown["A_base"] == "92.5 ± 10.6"  # 85 and 100
    assert shown["A_last"] == "78.3 ± 16.5"  # 66.67 and 90
    assert shown["A_avg"] == "85.4 ± 13.6"  # 75.83 and 95
    assert shown["PD"] == "14.2 ± 5.9"  # 18.33 and 10
    assert shown["base"] == "82.5 ± 10.6"  # 75 and 90
    assert shown["novel"] == "70.0 ± 28.3"  # 50 and 90
    assert shown["harmonic"] == "75.0 ± 21.2"  # 60 and 90
    names = ("images", "VLM calls", "VLM tokens", "unparsed", "epochs", "seconds", "MiB")
    budget = [
        "20",
        "14",
        "168",
        "2",
        "4",
        "50",
        "700",
    ]  # 20 stages of 2 and of 3 seconds, 600 and 800 MiB at most
    assert [shown[name] for name in names] == budget
    assert cells(finetune)["images"] == "0"
    assert cells(finetune)["seconds"] == cells(finetune)["MiB"] == "–"
    assert cells(finetune)["harmonic"] == "0.0 ± 0.0"


def test_large_counts_are_short() -> None:
    tokens = COLUMN["VLM tokens"]
    texts = [tokens.text(Statistic.of([mean])) for mean in (0, 1728, 99_999.4, 99_999.5, 1_234_567)]
    assert texts == ["0", "1,728", "99,999", "100k", "1,235k"]


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    (row,) = table(collect(tmp_path / "runs", tmp_path / "state"))
    assert cells(row)["A_last"] == "66.7"


def test_rows_stand_in_the_papers_order_and_strangers_last(tmp_path: Path) -> None:
    for method in ("mine", "guided", "fixed_sd", "finetune"):
        fabricate_run(tmp_path, method=method)
    rows = table(collect(tmp_path / "runs", tmp_path / "state"))
    assert [row.method for row in rows] == ["finetune", "fixed_sd", "guided", "mine"]


def test_seeds_are_ordered_as_numbers(tmp_path: Path) -> None:
    for seed in (10, 2):
        fabricate_run(tmp_path, method="finetune", seed=seed)
    assert [run.seed for run in collect(tmp_path / "runs", tmp_path / "state")] == [2, 10]


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    runs = collect(two_methods(tmp_path) / "runs", tmp_path / "state")
    found = difference(runs, "guided", "finetune", "digits", COLUMN["A_last"])
    assert found is not None
    assert found.n == 2
    assert found.mean == pytest.approx((8 / 30 + 14 / 30) / 2)
    assert found.std == pytest.approx(6 / 30 / 2**0.5)
    assert comparisons(runs) == [
        "digits: guided - finetune: A_last +36.7 ± 10.0, novel +70.0 ± 20.0 percentage points "
        "(mean ± standard error over 2 seeds)"
    ]


def test_only_common_finished_seeds_are_compared(tmp_path: Path) -> None:
    fabricate_run(tmp_path, seed=0)
    fabricate_run(tmp_path, seed=1, sealed_sessions=1)
    fabricate_run(tmp_path, method="fixed_sd", seed=0, correct=((9, 8), (8, 7, 2)))
    fabricate_run(tmp_path, method="fixed_sd", seed=1)
    fabricate_run(tmp_path, method="finetune", seed=7)
    runs = collect(tmp_path / "runs", tmp_path / "state")
    assert comparisons(runs) == [
        "digits: guided - fixed_sd: A_last +10.0, novel +30.0 percentage points "
        "(1 seed, so no standard error)"
    ]


def test_an_unfinished_run_is_counted_but_not_averaged(tmp_path: Path) -> None:
    fabricate_run(tmp_path, seed=0)
    fabricate_run(tmp_path, seed=1, correct=((1, 1), (1, 1, 1)), sealed_sessions=1)
    fabricate_run(tmp_path, method="finetune", sealed_sessions=0)
    finetune, guided = table(collect(tmp_path / "runs", tmp_path / "state"))
    assert (cells(guided)["seeds"], cells(guided)["A_base"]) == ("1 (+1 unfinished)", "85.0")
    assert (cells(finetune)["seeds"], cells(finetune)["A_last"]) == ("0 (+1 unfinished)", "–")


def test_a_record_of_another_version_is_named(tmp_path: Path) -> None:
    made = fabricate_run(tmp_path)
    (made.folder / "experiment.json").write_text("{}")
    with pytest.raises(ValueError, match=r"experiment\.json is not a ExperimentRecord of this version"):
        collect(tmp_path / "runs", tmp_path / "state")


# ------------------------------------------------------------------------------------------ marks and sections


def row(method: str, dataset: str = "digits", n: int = 1, **means: float) -> Row:
    """A row whose named columns have these means, in percent; the other cells are empty."""
    cells = tuple(Statistic.of([means[c.name] / 100] * n if c.name in means else []) for c in COLUMNS)
    return Row(dataset=dataset, method=method, seeds=n, unfinished=0, cells=cells)


def test_best_and_second_are_marked_in_each_column_of_each_dataset() -> None:
    rows = [
        row("a", A_last=50, novel=9),
        row("b", A_last=70, novel=8),
        row("c", A_last=60),
        row("a", "cub200", A_last=1),
    ]
    assert marks(rows) == {
        ("digits", "b", "A_last"): "best",
        ("digits", "c", "A_last"): "second",
        ("digits", "a", "novel"): "best",
        ("digits", "b", "novel"): "second",
    }


def test_what_prints_the_same_shares_its_mark() -> None:
    rows = [
        row("a", A_last=70.02),
        row("b", A_last=69.98),
        row("c", A_last=60),
        row("d", A_last=60.04),
        row("e", A_last=1),
    ]
    found = {method: mark for (_, method, _), mark in marks(rows).items()}
    assert found == {"a": "best", "b": "best", "c": "second", "d": "second"}


def test_a_vlm_that_classifies_by_itself_is_not_ranked() -> None:
    found = marks([row("vlm_zero_shot", A_last=99), row("a", A_last=50), row("b", A_last=40)])
    assert found == {("digits", "a", "A_last"): "best", ("digits", "b", "A_last"): "second"}


def test_budgets_are_not_ranked() -> None:
    assert marks([row("a", images=100, PD=1), row("b", images=200, PD=2)]) == {}


def titles(*methods: str) -> dict[str, list[str]]:
    found = sections([row(method) for method in methods])
    return {section.title: [member.method for member in section.rows] for section in found}


def test_sections_are_the_papers_tables() -> None:
    present = (
        "vlm_zero_shot",
        "finetune",
        "cec",
        "fixed_sd",
        "sd_vlm",
        "first",
        "guided",
        "cec_guided",
        "mine",
    )
    assert titles(*present) == {
        "Compared methods (the paper's Table 1)": ["finetune", "cec", "guided"],
        "Ablation (the paper's Tables 3 and 4)": [
            "vlm_zero_shot",
            "finetune",
            "fixed_sd",
            "first",
            "sd_vlm",
            "guided",
        ],
        "Compared methods with guided's images": ["cec_guided"],
        "Other methods": ["mine"],
    }


def test_a_section_that_another_one_contains_is_left_out() -> None:
    assert list(titles("finetune", "fixed_sd", "guided")) == ["Ablation (the paper's Tables 3 and 4)"]
    assert list(titles("finetune", "guided")) == ["Compared methods (the paper's Table 1)"]
    assert list(titles("finetune", "cec", "guided")) == ["Compared methods (the paper's Table 1)"]


def test_every_row_stands_in_some_section() -> None:
    from flows.results import METHODS

    found = titles(*METHODS, "stranger")
    assert {method for members in found.values() for method in members} == {*METHODS, "stranger"}


def test_a_run_without_novel_classes_has_empty_cells(tmp_path: Path) -> None:
    fabricate_run(tmp_path, correct=((9, 8),))
    fabricate_run(tmp_path, method="finetune", correct=((9, 9),))
    rows = table(collect(tmp_path / "runs", tmp_path / "state"))
    assert [cells(one)["novel"] for one in rows] == ["–", "–"]
    assert ("digits", "finetune", "A_last") in marks(rows)
    assert comparisons(collect(tmp_path / "runs", tmp_path / "state")) == [
        "digits: guided - finetune: A_last -5.0 percentage points (1 seed, so no standard error)"
    ]
