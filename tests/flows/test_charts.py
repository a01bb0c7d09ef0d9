"""What the charts show: points, looks, and SVGs that fit a page of either theme."""

from pathlib import Path

import pytest

from flows.charts import (
    COLOURS,
    INK,
    LINE,
    POINTS,
    balance_panel,
    budget_panels,
    looks,
    methods_of,
    numbered,
    session_panels,
    thinned,
    tuning_panels,
)
from flows.results import METHODS, collect
from flows.tables import table
from tests.flows.test_tables import two_methods
from tests.helpers import fabricate_run


def test_no_two_methods_look_the_same() -> None:
    found = looks([*METHODS, "mine"])
    seen = {(look.colour, look.marker, look.dashed) for look in found.values()}
    assert len(seen) == len(found) == len({look.index for look in found.values()})
    assert found["cec"].colour == found["cec_guided"].colour
    assert (found["cec"].dashed, found["cec_guided"].dashed, found["guided"].dashed) == (False, True, False)


def test_a_learner_with_images_needs_not_be_there_without() -> None:
    found = looks(["cec_guided", "guided"])
    assert [look.dashed for look in found.values()] == [True, False]


def test_long_lines_are_averaged_in_parts() -> None:
    line = [(float(n), float(n % 2), 0.5) for n in range(1000)]
    short = thinned(line, POINTS)
    assert len(short) == POINTS
    assert sum(x for x, _, _ in short) / POINTS == pytest.approx(499.5, abs=1)
    assert all(0.4 < y < 0.6 for _, y, _ in short)
    assert thinned(line[:3], POINTS) == line[:3]


def test_panels_say_in_words_what_they_draw(tmp_path: Path) -> None:
    runs = collect(two_methods(tmp_path) / "runs", tmp_path / "state")
    rows, found = table(runs), looks(methods_of(runs))
    overall, base, novel = session_panels(runs, found)
    assert overall.alt.endswith("After the last one: guided 78.33, finetune 41.67.")
    assert novel.alt.endswith("After the last one: guided 70, finetune 0.")
    assert "base classes" in base.alt
    balance = balance_panel(rows, found)
    assert balance is not None
    assert "guided 82.5 and 70.0 %" in balance.alt
    images, tokens, seconds = budget_panels(rows, found)
    assert "guided 20 and 78.3 %" in images.alt
    assert "guided 168 and" in tokens.alt
    assert "finetune" not in seconds.alt  # nobody knows how long it took


def test_tuning_is_drawn_for_each_series_that_was_recorded(tmp_path: Path) -> None:
    runs = collect(two_methods(tmp_path) / "runs", tmp_path / "state")
    assert [(one.session, one.epoch, one.means) for one in runs[-1].tunings] == [
        (0, 0, {"ssim_positive": 0.5, "loss": 2.0}),
        (1, 0, {"ssim_positive": 0.5, "loss": 2.0}),
    ]
    panels = tuning_panels(runs, looks(methods_of(runs)))
    assert [panel.title for panel in panels] == ["SSIM to the failures (positives)", "Loss"]
    assert ">1.0</text>" in panels[0].svg  # the tick of session 1, epoch 0


def test_svgs_take_the_pages_colours_and_name_their_methods(tmp_path: Path) -> None:
    runs = collect(two_methods(tmp_path) / "runs", tmp_path / "state")
    first, second, _ = numbered(session_panels(runs, looks(methods_of(runs))))
    assert not [colour for colour in (*COLOURS, INK, LINE) if colour in first.svg]
    assert "var(--m0)" in first.svg
    assert "currentColor" in first.svg
    assert {f'data-method="{n}"' in first.svg for n in (0, 1)} == {True}
    assert "<text" in first.svg
    ids = [set(panel.svg.split('id="')[1:]) for panel in (first, second)]
    assert {text.split('"')[0] for text in ids[0]}.isdisjoint(text.split('"')[0] for text in ids[1])
    assert all(mark not in first.svg for mark in ("<style", "<metadata", "<?xml", "DejaVu"))


def test_nothing_finished_draws_no_empty_chart(tmp_path: Path) -> None:
    fabricate_run(tmp_path, method="finetune", sealed_sessions=0)
    runs = collect(tmp_path / "runs", tmp_path / "state")
    found = looks(methods_of(runs))
    assert (
        session_panels(runs, found) == tuning_panels(runs, found) == budget_panels(table(runs), found) == []
    )
    assert balance_panel(table(runs), found) is None
