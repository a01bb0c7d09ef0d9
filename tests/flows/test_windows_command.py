"""What settles when: reading a measurement, what it says of the border, and one measured end to end."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flows.__main__ import main
from flows.config import ConfigError, choices, load_windows
from flows.reading import JUDGE, judged, named
from flows.windows import Settling, WindowsMeasure, advice, measure_windows, show_windows, windows_table
from tasks.diffusion.swaps import SwapSettings

BACKGROUND = Settling(
    what="background", images=20, same=0, kept=(0.0, 0.2, 0.6, 0.9, 1.0), read=(0.0, 0.6, 1, 1, 1)
)
CATEGORY = Settling(what="category", images=18, same=2, kept=(0.0, 0.0, 0.1, 0.5, 1.0), read=None)
STYLE = Settling(what="style", images=0, same=20, kept=(0.0,) * 5, read=None)
MEASURE = WindowsMeasure(generator="tiny", steps=4, settlings=(BACKGROUND, CATEGORY, STYLE))


def test_a_thing_is_settled_where_half_keep_it() -> None:
    assert (BACKGROUND.settled, BACKGROUND.settled_read) == (2, 1)
    assert (CATEGORY.settled, CATEGORY.settled_read) == (3, None)


def test_the_border_is_where_the_last_thing_is_settled() -> None:
    assert MEASURE.border == 3 / 4
    assert "tuning.border=0.75" in advice(MEASURE)
    assert "category last" in advice(MEASURE)


@pytest.mark.parametrize(
    ("kept", "border"),
    [((1.0, 1.0, 1.0), 1 / 2), ((0.0, 0.0, 1.0), 1 / 2), ((0.0, 0.0, 0.2), None)],
)
def test_both_levels_keep_a_step_and_what_never_settles_gives_no_border(
    kept: tuple[float, ...], border: float | None
) -> None:
    one = WindowsMeasure(
        generator="g", steps=2, settlings=(Settling(what="x", images=1, same=0, kept=kept, read=None),)
    )
    assert one.border == border
    assert ("0.5" in advice(one)) is True


def test_things_that_both_prompts_draw_alike_say_nothing() -> None:
    alone = MEASURE.model_copy(update={"settlings": (STYLE,)})
    assert alone.border is None
    assert "| style | 0 (20 alike) | – | – | – |" in windows_table(alone)


def test_the_terminal_table_fits_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    show_windows(MEASURE, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    row = next(line for line in text.splitlines() if "category" in line)
    assert row.split() == ["category", "18", "(2", "alike)", "3", "–"]


# ------------------------------------------------------------------------------------------ settings


def swaps(**changes: object) -> SwapSettings:
    given = {
        "subjects": ("cat", "dog"), "pairs": {"category": ("a {a}", "a {b}")}, "images": 1, "least_change": 0.05,
        "seed": 0, "judge": None,
    }  # fmt: skip
    return SwapSettings(**{**given, **changes})


def test_the_last_subject_is_followed_by_the_first() -> None:
    assert swaps().prompts("category") == [("a cat", "a dog"), ("a dog", "a cat")]


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ({"style": ("a {a}", "a {a}")}, r"windows\.pairs\.style has two equal prompts"),
        ({"style": ("a {a}", "a {c}")}, r"windows\.pairs\.style: KeyError\('c'\)"),
        ({"style": ("a {", "a {a}")}, r"windows\.pairs\.style: ValueError"),
    ],
)
def test_pairs_that_make_no_sense_are_named(pairs: dict[str, tuple[str, str]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        swaps(pairs=pairs)


@pytest.mark.parametrize("name", choices("windows"))
def test_every_yaml_composes_and_its_prompts_differ(name: str) -> None:
    windows = load_windows([f"windows={name}"]).windows
    assert all(first != second for what in windows.pairs for first, second in windows.prompts(what))


def test_wrong_overrides_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"did you mean windows\.images"):
        load_windows(["windows.imags=3"])
    assert main(["windows", "windows=nope"]) == 2
    assert "miniature, stable_diffusion" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------ measured


def test_the_judge_is_asked_only_for_what_prompts_name() -> None:
    prompts = [
        "A picture of a seven, white on a black background",
        "A picture of a two, red on a blue background",
    ]
    assert named(prompts, "background") == ["black", "blue"]
    assert named(["a photo of a dog on grass"], "background") is None
    assert named(prompts, "weather") is None


def test_the_judge_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"images of 32 px, got \[64, 64\]; set windows\.judge=null"):
        judged(JUDGE, torch.zeros(1, 3, 64, 64), "background")
    with pytest.raises(ValueError, match="not 'weather'"):
        judged(JUDGE, torch.zeros(1, 3, 32, 32), "weather")


def test_the_background_is_settled_on_the_way_and_measured_once(tmp_path: Path) -> None:
    background = load_windows([]).windows.pairs["background"]
    config = load_windows(
        [f"runtime.state={tmp_path}", "runtime.device=cpu", "generator.steps=6", "windows.images=1"]
    )
    config = config.model_copy(
        update={
            "windows": config.windows.model_copy(
                update={"subjects": ("two", "seven"), "pairs": {"background": background}}
            )
        }
    )
    measure = measure_windows(config)
    (settling,) = measure.settlings
    assert (settling.images, len(settling.kept)) == (2, 7)
    assert (settling.kept[0], settling.kept[-1]) == (0.0, 1.0)
    assert settling.read is None or (settling.read[0], settling.read[-1]) == (0.0, 1.0)
    assert 1 <= (settling.settled or 0) <= 6
    (sealed,) = (tmp_path / "stages" / "windows").iterdir()
    before = (sealed / "record.json").stat().st_mtime_ns
    assert measure_windows(config) == measure
    assert (sealed / "record.json").stat().st_mtime_ns == before
    assert json.loads((sealed / "record.json").read_text())["output"]["steps"] == 6
