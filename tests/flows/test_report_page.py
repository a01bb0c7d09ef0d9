"""The report page: hostile text, what it is made of, and a real browser that opens it and clicks through it."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest

from flows.report import build
from flows.report_page import FOLDER, chips, first_shown, page
from flows.results import METHODS, collect
from flows.tables import comparisons, table
from tests.browser import Browser, find_browser, running_browser
from tests.flows.test_tables import row
from tests.helpers import fabricate_run

HOSTILE = '"><script>alert(1)<script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """What a browser would make of the page: tags and attributes, and the text of each prompt."""

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

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(root: Path) -> str:
    runs = collect(root / "runs", root / "state")
    return page(runs, table(runs), comparisons(runs))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    fabricate_run(
        tmp_path, dataset=HOSTILE, method=HOSTILE, prompt=lambda name, epoch: f"{name} {epoch} {HOSTILE}"
    )
    fabricate_run(tmp_path, dataset=HOSTILE)
    text = page_of(tmp_path)
    parsed = Page(text)
    assert f"one 0 {HOSTILE}" in parsed.prompts
    assert len(parsed.all("script")) == 2  # the values and our own code
    assert not [attributes for _, attributes in parsed.tags if "onerror" in attributes]
    assert text.lower().count("<script") == text.lower().count("</script") == 2


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    text = page_of(tmp_path)
    parsed = Page(text)
    sources = [
        a.get("src") or a.get("srcset") or a.get("href") or a.get("xlink:href") for _, a in parsed.tags
    ]
    assert {source.split(":")[0] for source in sources if source and not source.startswith("#")} == {"data"}
    assert not re.findall(r"url\((?!#)|@import", text)
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv")) or ""
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[^']+'", policy)


def test_the_page_tells_its_structure(tmp_path: Path) -> None:
    fabricate_run(tmp_path)
    fabricate_run(tmp_path, method="finetune")
    parsed = Page(page_of(tmp_path))
    assert parsed.all("html") == [{"lang": "en"}]
    assert all(attributes.get("alt") for attributes in parsed.all("img"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in parsed.all("th"))
    assert all(a.get("aria-label") for _, a in parsed.tags if a.get("role") == "img")
    assert [len(parsed.all(name)) for name in ("main", "header", "nav", "h1")] == [1, 1, 1, 1]
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [a["aria-labelledby"] for _, a in parsed.tags if "aria-labelledby" in a]
    assert set(named) <= set(ids)


def test_a_page_without_any_image_or_finished_run_says_so(tmp_path: Path) -> None:
    fabricate_run(tmp_path, method="finetune", sealed_sessions=1)
    text = page_of(tmp_path)
    assert "No run here drew an image." in text
    assert "No run here tuned the generator." in text
    assert "<p>1 run of 1 method on" in text
    assert "1 of them unfinished" in text


def test_of_many_methods_few_are_drawn_at_first() -> None:
    rows = [row(method, A_last=n) for n, method in enumerate(METHODS)] + [row("guided", "cub200", A_last=1)]
    assert first_shown(rows) == {"finetune", "guided", *METHODS[-6:]}


def test_the_legend_shows_a_sign_of_its_own_for_each_method(tmp_path: Path) -> None:
    for method in ("finetune", "cec", "cec_guided", "guided"):
        fabricate_run(tmp_path, method=method, sealed_sessions=1)
    runs = collect(tmp_path / "runs", tmp_path / "state")
    found = chips(runs, table(runs))
    assert len({(chip.sign, chip.look.colour) for chip in found}) == 4
    assert [chip.groups for chip in found] == [
        "compared ablation",
        "compared",
        "compared ablation guided",
        "guided",
    ]


# ------------------------------------------------------------------------------------------ contrast


def palettes() -> list[dict[str, str]]:
    """The variables of the light page and of the dark one."""
    blocks = re.findall(r":root \{(.*?)\}", (FOLDER / "report.css").read_text("utf-8"), flags=re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks]


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_can_be_told_from_what_is_behind_them() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    light, dark = palettes()
    for theme in (light, dark):
        pairs = [(text, back) for text in ("ink", "soft", "accent") for back in ("page", "card")]
        pairs += [
            ("semantic", "semantic-back"),
            ("detail", "detail-back"),
            ("ink", "best-back"),
            ("on-accent", "accent"),
        ]
        assert [pair for pair in pairs if contrast(theme[pair[0]], theme[pair[1]]) < 4.5] == []
        drawn = [theme[f"m{n}"] for n in range(10)]
        assert [colour for colour in drawn if contrast(colour, theme["card"]) < 3] == []
        assert len(set(drawn)) == 10
        assert not [pair for pair in combinations(drawn, 2) if pair[0] == pair[1]]


# ------------------------------------------------------------------------------------------ in a browser

PROGRAM = find_browser()
in_browser = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium or Chrome on this machine (see tests/browser.py)"
)
ENTER, SPACE, TAB, LEFT, RIGHT, END = (
    ("Enter", 13), (" ", 32), ("Tab", 9), ("ArrowLeft", 37), ("ArrowRight", 39), ("End", 35),
)  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two datasets, four methods and two seeds, with hostile prompts."""
    root = tmp_path_factory.mktemp("report")
    for dataset in ("cub200", "digits"):
        for method in ("finetune", "cec", "cec_guided", "guided"):
            for seed in (0, 1):
                correct = ((9, 8), (8, 7, 5 - seed if method == "guided" else seed))
                hostile = lambda name, epoch: f"{name} {epoch} {HOSTILE} " + "long" * 60  # noqa: E731
                fabricate_run(
                    root, dataset=dataset, method=method, seed=seed, correct=correct, prompt=hostile
                )
    build(root / "runs", root / "out", root / "state")
    return root / "out" / "report.html"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with running_browser(PROGRAM, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(running: Browser, report: Path) -> Browser:
    """The page, opened afresh on a laptop."""
    running.show(1280)
    running.open(report)
    return running


def complaints(browser: Browser) -> list[object]:
    """What the page wrote to the console, threw, or asked of anything but its own file."""
    loud = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    found: list[object] = [event for event in browser.events if event[0] in loud]
    urls = [
        event["request"]["url"] for method, event in browser.events if method == "Network.requestWillBeSent"
    ]
    return found + [url for url in urls if not url.startswith(("file:", "data:"))]


def shown_methods(browser: Browser) -> list[str]:
    """The methods whose shapes are drawn somewhere, by their place in the legend."""
    seen = browser.value(
        "[...new Set([...document.querySelectorAll('[data-method]')]"
        ".filter((shape) => shape.style.display !== 'none').map((shape) => shape.dataset.method))].sort()"
    )
    assert isinstance(seen, list)
    return seen


def open_tabs(browser: Browser, group: str) -> set[str]:
    """Names of the panels of a group that are not hidden."""
    panels = f"[...document.querySelectorAll('[data-tabs=\"{group}\"] > [data-tab]')]"
    return set(browser.value(f"{panels}.filter((panel) => !panel.hidden).map((panel) => panel.dataset.tab)"))


@in_browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_quietly_and_never_scrolls_sideways(
    running: Browser, report: Path, width: int, dark: bool
) -> None:
    running.show(width, dark=dark)
    running.open(report)
    assert running.value("document.title") == "Report: cub200, digits"
    assert running.value("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    assert running.value("document.querySelectorAll('.panel svg').length") > 10
    assert running.value("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert running.value("document.documentElement.scrollWidth <= innerWidth")
    assert running.value(
        "[...document.querySelectorAll('svg, img')].some((e) => e.getBoundingClientRect().width > 0)"
    )
    assert complaints(running) == []


@in_browser
def test_a_complaint_would_be_heard(browser: Browser) -> None:
    browser.value("console.error('heard')")
    browser.value("fetch('data:,').catch(() => 0)")  # which the page's policy forbids
    assert {event[0] for event in complaints(browser)} == {"Runtime.consoleAPICalled", "Log.entryAdded"}  # type: ignore[index]


@in_browser
def test_methods_are_chosen_for_all_charts_at_once(browser: Browser) -> None:
    assert shown_methods(browser) == ["0", "1", "2", "3"]
    browser.click("[data-group=none]")
    assert shown_methods(browser) == []
    browser.click(".chips input[value='1']")
    assert shown_methods(browser) == ["1"]
    browser.click("[data-group=ablation]")
    assert shown_methods(browser) == ["0", "2"]
    browser.value("document.querySelector('.chips input[value=\"3\"]').focus()")
    browser.press(*SPACE, text=" ")
    assert shown_methods(browser) == ["0", "2", "3"]
    assert complaints(browser) == []


@in_browser
def test_a_dataset_is_chosen_everywhere_by_mouse_and_by_keyboard(browser: Browser) -> None:
    assert open_tabs(browser, "dataset") == {"cub200"}
    browser.click("[role=tab][aria-selected=false]")
    assert open_tabs(browser, "dataset") == {"digits"}
    browser.value("document.querySelector('[role=tab][aria-selected=true]').focus()")
    for key, dataset in ((LEFT, "cub200"), (LEFT, "digits"), (RIGHT, "cub200"), (END, "digits")):
        browser.press(*key)
        assert open_tabs(browser, "dataset") == {dataset}
        assert browser.value("document.activeElement.textContent") == dataset
    assert browser.value("document.querySelector('select[name=dataset]').value") == "digits"
    assert browser.value("document.querySelectorAll('[role=tab][tabindex=\"0\"]').length") == browser.value(
        "document.querySelectorAll('[role=tablist]').length"
    )


@in_browser
def test_classes_have_tabs_of_their_own(browser: Browser) -> None:
    assert len(open_tabs(browser, "class-1")) == len(open_tabs(browser, "class-2")) == 1
    browser.click("[data-tabs='class-1'] [role=tab]:nth-child(2)")
    assert open_tabs(browser, "class-1") == {
        browser.value("document.querySelector(\"[data-tabs='class-1'] [role=tab]:nth-child(2)\").textContent")
    }
    assert open_tabs(browser, "dataset") == {"cub200"}


@in_browser
def test_two_methods_are_compared_seed_by_seed(browser: Browser, report: Path) -> None:
    verdict = "document.querySelector('.verdict').textContent"
    words = report.with_name("table.md").read_text("utf-8")
    told = re.search(r"cub200: guided - finetune: A_last (\S+ ± \S+),", words)
    assert told is not None
    assert browser.value(verdict) == (
        f"A_last of guided \N{MINUS SIGN} finetune: {told[1]} percentage points (mean ± standard error over 2 seeds)"
    )
    assert browser.value("document.querySelectorAll('.plot .seed').length") == 2
    drawn = "document.querySelector('.plot svg').getBoundingClientRect()"
    inside = f"[...document.querySelectorAll('.plot circle')].every((c) => c.getBoundingClientRect().x >= {drawn}.x)"
    assert browser.value(inside)
    browser.value("document.querySelector('select[name=first]').focus()")
    browser.press("f", 70, text="f")  # typing chooses: finetune
    assert "A_last of finetune \N{MINUS SIGN} finetune: +0.0 ± 0.0" in browser.value(verdict)
    browser.value("document.querySelector('select[name=dataset]').focus()")
    browser.press("d", 68, text="d")
    assert open_tabs(browser, "dataset") == {"digits"}
    rows = "[...document.querySelectorAll('#difference tbody tr')].map((row) => row.children[0].textContent)"
    assert browser.value(rows) == ["0", "1"]
    assert browser.value("[...document.querySelectorAll('.plot text')].map((text) => text.textContent)") == [
        "+0.0"
    ]
    assert complaints(browser) == []


@in_browser
def test_the_keyboard_reaches_every_control_and_shows_where_it_is(browser: Browser) -> None:
    wanted = browser.value(
        "[...document.querySelectorAll('a[href], button, input, select, summary, [tabindex]')]"
        ".filter((e) => e.tabIndex >= 0 && e.checkVisibility()).length"
    )
    state = "[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
    seen = []
    for _ in range(wanted + 1):
        browser.press(*TAB)
        seen.append(browser.value(state))
        if seen[-1][0] == "BODY":
            break
    stops = [stop for stop in seen if stop[0] != "BODY"]
    assert len(stops) == wanted
    assert [stop for stop in stops if stop[1] == "none"] == []


@in_browser
def test_every_picture_and_control_has_a_name(browser: Browser) -> None:
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("image", "button", "tab", "checkbox", "combobox", "region", "link", "tabpanel", "navigation")
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    assert {"main", "navigation", "banner"} <= {
        node["role"]["value"] for node in nodes if not node["ignored"]
    }


@in_browser
def test_without_scripts_everything_but_the_choices_is_there(running: Browser, report: Path) -> None:
    running.show(390, scripts=False)
    running.open(report)
    try:
        assert open_tabs(running, "dataset") == {"cub200", "digits"}
        assert len(open_tabs(running, "class-1")) > 1
        assert shown_methods(running) == ["0", "1", "2", "3"]
        assert running.value("document.getElementById('comparison').checkVisibility()") is False
        assert running.value("document.querySelector('.chips input').checkVisibility()") is False
        assert running.value("document.documentElement.scrollWidth <= innerWidth")
    finally:
        running.show(1280)
