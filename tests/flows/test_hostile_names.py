"""Captions, prompts and names that mean to do harm, wherever people see them: each shows them as text, in bounds."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from flows.cli import fail
from flows.config import load_config
from flows.formats import comma_separated, latex, markdown, sessions_csv
from flows.gallery import shown_classes
from flows.measures import LOOKS, SetMeasure
from flows.own_server import prefect_url
from flows.report_page import page
from flows.results import collect
from flows.session_page import escaped
from flows.study_page import Place, SetRow, Study
from flows.study_page import page as study_page
from flows.tables import table
from flows.trace_text import LINE_CHARS, node
from tasks.confusion import draw_confusion
from tasks.datasets import benchmark
from tasks.datasets.settings import DatasetError
from tasks.records import Comparison, Verdict
from tasks.tracked import CAPTION_CHARS, distinct, plain, verdict_table
from tests.helpers import fabricate_run

CAPTION = "</script><script>alert(1)</script>]]>\x1b[2J\u202e|[red]" + "a digit\n" * 1000
DATASET = "<img src=x>|=1+1"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs as a stranger may pass them on: what the settings refuse stands in their folders and lines all the same."""
    root = tmp_path_factory.mktemp("hostile")
    run = fabricate_run(root, dataset=DATASET, prompt=lambda name, epoch: f"{name} {epoch} {CAPTION}"[:3000])
    for path in run.folder.rglob("verdicts.jsonl"):
        verdicts = [json.loads(line) for line in path.read_text().splitlines()]
        for verdict in verdicts:
            for comparison in verdict["comparisons"]:
                comparison |= {"caption_augmented": CAPTION, "caption_original": CAPTION}
        path.unlink()  # one with the state by a hard link
        path.write_text("\n".join(map(json.dumps, verdicts)) + "\n")
    return root


class Tags(HTMLParser):
    """The tags of a page and what its scripts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_the_report_page_shows_them_as_text(made: Path, tmp_path: Path) -> None:
    runs = collect(made / "runs", made / "state")
    shown = page(runs, table(runs), [f"{DATASET}: guided - finetune"])
    found = Tags()
    found.feed(shown)
    assert found.tags.count("script") == 2
    assert "alert(1)" in shown, "it is there to be read"
    assert "<script>alert" not in shown
    assert "<img src=x>" not in shown
    assert not any(mark in shown for mark in "\x1b\u202e")
    assert shown.count("a digit\n") < 200 * len(shown_classes(runs)) * 40
    assert all(
        len(text) <= CAPTION_CHARS
        for one in shown_classes(runs)
        for strip in one.strips
        for card in strip.cards
        for text in (card.prompt, card.caption_generated, *(picture.alt for picture in card.pictures))
    )


def test_the_study_shows_them_as_text(made: Path) -> None:
    runs = collect(made / "runs", made / "state")
    at = Place(dataset=DATASET, method="guided|<b>", seed=0, session=0, epoch=0)
    looks = SetMeasure(images=2, shares=dict.fromkeys((*LOOKS, "all", "category"), 0.5), distance=None)
    study = Study(
        sets=(SetRow(place=at, found=looks),), tunings=(), real=(), windows={}, skipped=(f"{DATASET} <b>",)
    )
    shown = study_page(study, table(runs))
    assert "<img" not in shown
    assert "<b>" not in shown
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6, 11}
    assert "](study-%3Cimg" in shown


def test_tables_keep_their_cells(made: Path) -> None:
    runs = collect(made / "runs", made / "state")
    rows = [row.model_copy(update={"method": "=cmd|'/c calc'\n\n\\end{x}"}) for row in table(runs)]
    lines = [line for line in markdown(rows, [f"{DATASET}\n# x"]).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<img" not in markdown(rows, [])
    assert "\n\n\\end" not in latex(rows)
    assert r"\textbackslash{}end\{x\}" in latex(rows)
    (line,) = csv.DictReader(io.StringIO(comma_separated(rows)))
    assert line["method"].startswith("'=cmd")
    assert not any(
        text.startswith(("=", "+", "@")) for text in csv.reader(io.StringIO(sessions_csv(runs))).__next__()
    )


def test_prefects_page_shows_one_line_of_plain_text() -> None:
    shown = escaped(CAPTION[:200])
    assert "\n" not in shown
    assert not any(mark in shown for mark in "\x1b\u202e")
    assert not re.search(r"(?<!\\)[<\[|`*_#]", shown)


def test_mlflows_tables_are_bounded_and_are_text() -> None:
    comparison = Comparison(
        augmented_id="a",
        original_id="o",
        answer="different",
        caption_augmented=CAPTION,
        caption_original="x\x1b",
    )
    verdict = Verdict(
        augmented_id="a", label=0, level="semantic", prompt_next="p", comparisons=(comparison,), target_id="o"
    )
    (cells,) = verdict_table([verdict], {0: "zero"})["data"]  # type: ignore[misc]
    assert len(cells[-2]) == CAPTION_CHARS
    assert "\x1b" not in json.dumps(cells, ensure_ascii=False)


def test_two_classes_that_mlflow_cannot_write_keep_two_names() -> None:
    assert plain("é") == plain("ü"), "why distinct is wanted"
    assert len({distinct(name) for name in ("é", "ü", "a/b", "a-b")}) == 4
    assert distinct("seven of nine") == "seven of nine"
    long = {distinct("é" * 120), distinct("x" * 255), distinct("x" * 254)}
    assert len(long) == 3
    assert max(map(len, long)) < 110, "MLflow puts 80 characters around it, and a file's name ends at 255"


def test_a_trace_prints_lines_of_bounded_length() -> None:
    text = node(CAPTION).text
    assert len(text) == LINE_CHARS
    assert text.isprintable()


def test_an_error_reaches_the_terminal_as_text(capfd: pytest.CaptureFixture[str]) -> None:
    fail(ValueError(f"the provider said [bold]{CAPTION}"), 1)
    said = capfd.readouterr().err
    assert "[bold]" in said, "markup is not obeyed"
    assert not any(mark in said for mark in "\x1b\u202e")
    assert len(said) < 9000


@pytest.mark.parametrize("name", ["a $b$ c", r"$\frac{$", "$$", "x" * 5000, "_^{", "鳥"])
def test_a_class_may_be_called_anything_in_a_picture(name: str) -> None:
    counts = torch.tensor([[1, 0, 0], [1, 1, 0]])
    assert draw_confusion(counts, [name, "other"], f"{name} of the test").startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "a\\b", "a\nb", "a\x1b[2Jb", "a\u202eb", "caf\udce9"])
def test_class_names_that_are_no_names_are_refused(name: str) -> None:
    settings = load_config([]).dataset.model_copy(update={"class_names": {"folder": name}})
    with pytest.raises(DatasetError, match=r"give it another in dataset\.class_names"):
        benchmark._prompt_names(settings, ["folder"])


@pytest.mark.parametrize("url", ["http://me:word@host/api", "http://host/api?token=x"])
def test_an_address_of_prefect_with_a_password_is_refused_and_not_repeated(url: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(ValueError, match="PREFECT_API_AUTH_STRING") as told,
    ):
        prefect_url()
    assert url not in str(told.value)
