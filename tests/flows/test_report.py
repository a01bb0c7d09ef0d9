"""Tables against numbers worked out by hand; the page against hostile text; runs that are not finished."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from flows.curves import draw, points
from flows.gallery import (
    CARDS_PER_STRIP,
    drawn_sets,
    embedded,
    fitting,
    lead_slots,
    page,
    pick_classes,
    shown_classes,
)
from flows.report import (
    COLUMNS,
    HEADINGS,
    Row,
    Statistic,
    build,
    collect,
    comma_separated,
    comparisons,
    difference,
    markdown,
    print_table,
    table,
)
from tests.helpers import fabricate_run

CHARTS = dict.fromkeys(("wide_light", "wide_dark", "narrow_light", "narrow_dark"), b"<svg/>")
COLUMN = {column.name: column for column in COLUMNS}
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


def test_csv_keeps_mean_and_deviation_apart(tmp_path: Path) -> None:
    text = comma_separated(table(collect(two_methods(tmp_path) / "runs", tmp_path / "state")))
    finetune, guided = csv.DictReader(io.StringIO(text))
    assert (guided["A_last"], guided["A_last std"]) == ("78.3333", "16.4992")
    assert (guided["seconds"], finetune["seconds"], finetune["images"]) == ("50", "", "0")


def test_markdown_has_a_row_for_each_method(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    text = markdown(table(collect(tmp_path / "runs", tmp_path / "state")), ["a - b"])
    lines = text.splitlines()
    assert {line.count("|") for line in lines[:3]} == {len(HEADINGS) + 1}
    assert lines[2].startswith("| digits | guided | 1 | 85.0 | 66.7 |")
    assert lines[-1] == "- a - b"


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    first = {
        path: path.read_bytes() for path in build(tmp_path / "runs", tmp_path / "out", tmp_path / "state")
    }
    second = {
        path: path.read_bytes() for path in build(tmp_path / "runs", tmp_path / "out", tmp_path / "state")
    }
    assert sorted(path.name for path in first) == [
        "curves.png",
        "curves.svg",
        "gallery.html",
        "table.csv",
        "table.md",
    ]
    assert first == second


def test_no_runs_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run; start one with: fscil dataset=digits"):
        build(tmp_path / "runs", tmp_path / "out", tmp_path / "state")


def test_a_record_of_another_version_is_named(tmp_path: Path) -> None:
    made = fabricate_run(tmp_path)
    (made.folder / "experiment.json").write_text("{}")
    with pytest.raises(ValueError, match=r"experiment\.json is not a ExperimentRecord of this version"):
        collect(tmp_path / "runs", tmp_path / "state")


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
    assert b"<svg" in draw(runs, "svg", dark=True)


# ------------------------------------------------------------------------------------------ the gallery page


class Page(HTMLParser):
    """What a browser would make of the page: tags, attributes and the text of each prompt."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.prompts: list[str] = []
        self._in_prompt = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_prompt = tag == "p" and (dict(attrs).get("class") or "").startswith("prompt")

    def handle_data(self, data: str) -> None:
        if self._in_prompt:
            self.prompts.append(data)
            self._in_prompt = False


def page_of(root: Path) -> str:
    runs = collect(root / "runs", root / "state")
    return page(runs, table(runs), comparisons(runs), CHARTS)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script>" onerror="x'
    fabricate_run(tmp_path, prompt=lambda name, epoch: f"{name} {epoch} {hostile}")
    text = page_of(tmp_path)
    parsed = Page(text)
    assert f"one 0 {hostile}" in parsed.prompts
    assert not [tag for tag, _ in parsed.tags if tag == "script"]
    assert not [attributes for _, attributes in parsed.tags if "onerror" in attributes]


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    text = page_of(tmp_path)
    parsed = Page(text)
    sources = [a.get("src") or a.get("srcset") or a.get("href") for _, a in parsed.tags]
    assert all(source.startswith("data:") for source in sources if source)
    assert not re.findall(r"url\(|@import", text)
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")
    assert ("html", {"lang": "en"}) in parsed.tags


def test_cards_follow_epochs_and_say_what_changed(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    runs = collect(tmp_path / "runs", tmp_path / "state")
    shown = {one.name: one for one in shown_classes(runs)}
    assert {name: one.session for name, one in shown.items()} == {"zero": 0, "one": 0, "two": 1}
    (strip,) = shown["two"].strips
    assert [(card.session, card.epoch, card.level, card.rewritten) for card in strip.cards] == [
        (1, 0, "semantic", False),
        (1, 1, "none", True),
    ]
    assert [card.prompt for card in strip.cards] == ["A picture of a two", "A picture of a two, handwritten"]
    assert strip.cards[0].caption_original == "a handwritten one"
    assert [len(card.pictures) for card in strip.cards] == [2, 2]
    assert shown["zero"].strips[0].cards[0].level == "detail"


def test_methods_without_images_have_no_strip_and_seeds_are_the_lowest(tmp_path: Path) -> None:
    fabricate_run(tmp_path, method="finetune")
    fabricate_run(tmp_path, method="fixed_sd", seed=1)
    fabricate_run(tmp_path, seed=3)
    fabricate_run(tmp_path, seed=2, sealed_sessions=1)
    runs = collect(tmp_path / "runs", tmp_path / "state")
    shown = {one.name: one for one in shown_classes(runs)}
    assert [(s.method, s.seed, s.finished) for s in shown["one"].strips] == [
        ("fixed_sd", 1, True),
        ("guided", 2, False),
    ]
    assert "(unfinished)" in page(runs, table(runs), [], CHARTS)


def test_a_page_without_any_image_still_has_its_table(tmp_path: Path) -> None:
    fabricate_run(tmp_path, method="finetune")
    assert "Prompts and images" not in page_of(tmp_path)


def test_long_strips_keep_the_first_session_and_each_later_ones_last_set(tmp_path: Path) -> None:
    one = drawn_sets(fabricate_run(tmp_path).folder)[0]
    sets = [one.model_copy(update={"session": s, "epoch": e}) for s in range(3) for e in range(10)]
    kept = [*((0, epoch) for epoch in range(10)), (1, 9), (2, 9)]
    assert [(shown.session, shown.epoch) for shown in fitting(sets)] == kept
    assert fitting(sets[:CARDS_PER_STRIP]) == sets[:CARDS_PER_STRIP]


def test_slots_that_were_rewritten_lead(tmp_path: Path) -> None:
    made = fabricate_run(tmp_path)
    sets = drawn_sets(made.folder)
    rows = tuple(
        row.model_copy(update={"prompt": "other"}) if row.slot == "two-1" else row for row in sets[-1].rows
    )
    changed = [*sets[2:-1], sets[-1].model_copy(update={"rows": rows})]
    assert lead_slots(sets[2:], "two") == ["two-0", "two-1"]  # both rewritten, the judged one first
    same = [
        one.model_copy(update={"rows": tuple(r for r in one.rows if r.slot != "two-0")}) for one in changed
    ]
    assert lead_slots(same, "two") == ["two-1"]
    assert [name for name, _ in pick_classes([sets])] == ["zero", "one", "two"]


def test_large_images_are_embedded_small(tmp_path: Path) -> None:
    from PIL import Image

    Image.effect_noise((512, 256), 60).save(tmp_path / "large.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    large, small = embedded(tmp_path / "large.png"), embedded(tmp_path / "small.png")
    assert large.startswith("data:image/webp;base64,")
    assert len(large) < 20_000
    assert small.startswith("data:image/png;base64,")
