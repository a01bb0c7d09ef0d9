"""docs/learners.md: what each learner is, kept in step with its code, its settings and its tests.

Source, idea, trained parts and deviations are the paragraphs of the learner's module; memory is what the built
learner declares; the settings as published are the difference of two configurations; the tests are those of the
modules that import the learner, beside the contract that all learners pass.
"""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

from flows.config import load_config
from tasks.learners.factory import LEARNERS, NAMED, make_learner

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "learners"
CONTRACT = "test_contract.py"
TRAINS, DEVIATIONS = "Trains: ", "Deviations"

HEAD = """# The learners

Written by `fscil learners > docs/learners.md`; a test compares. Results on digits are in the README.

Each is `method=<name>`, with the images of guided `method=<name>_guided`, and `learner=<name>_as_published` has the
publication's settings; finetune_proto is `method=finetune` and `method=guided`, and has none as published.
*Memory* is all that a learner keeps of earlier sessions' data: one vector a class (prototypes: to compare with;
features: to train on) or nothing; no learner keeps a picture, which a test checks.
*Verified by* counts the tests of the modules that test a learner, some of which test two, and those of the contract,
which runs for every one.
"""


def learners_page() -> str:
    """The page as Markdown: a table, then a section for each learner."""
    kinds = [*LEARNERS, *NAMED]
    lines = ["| learner | source | memory | trains | verified by |", "|---|---|---|---|---|"]
    for kind in kinds:
        parts = _paragraphs(kind)
        trains = _beginning(parts, TRAINS).removeprefix(TRAINS).rstrip(".")
        own, contract = len(list(_own_tests(kind))), len(list(_tests(TESTS / CONTRACT)))
        cells = (f"[{kind}](#{kind})", _source(parts), _memory(kind), trains, f"{own} + {contract} tests")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([HEAD, *lines, *(_section(kind) for kind in kinds)]) + "\n"


def _section(kind: str) -> str:
    parts = _paragraphs(kind)
    told = [part for part in parts if not part.startswith(TRAINS)]
    text = "\n\n".join(_code(part) for part in told)
    tests = "; ".join(_own_tests(kind))
    return f"\n## {kind}\n\n{text}\n\nAs published: {_published(kind)}.\n\nVerified: {tests}."


def _paragraphs(kind: str) -> list[str]:
    """The paragraphs of the learner's module, as written but for cross-references."""
    written = inspect.getdoc(import_module(f"tasks.learners.{kind}")) or ""
    return [part.replace(":mod:", "").replace("``", "`") for part in written.split("\n\n")]


def _code(paragraph: str) -> str:
    """A paragraph that is indented is a formula."""
    return f"```\n{inspect.cleandoc(paragraph)}\n```" if paragraph.startswith("    ") else paragraph


def _beginning(parts: list[str], word: str) -> str:
    return next(part for part in parts if part.startswith(word)).replace("\n", " ")


def _source(parts: list[str]) -> str:
    return parts[0].replace("\n", " ").rstrip(".")


def _memory(kind: str) -> str:
    config = load_config([f"method={_method(kind)}"])
    names = [f"class {label}" for label in range(10)]
    return make_learner(config.trained, len(names), torch.device("cpu"), names).memory


def _method(kind: str) -> str:
    return "finetune" if kind == "finetune_proto" else kind


def _published(kind: str) -> str:
    """What the published settings are where they differ from the recommended ones."""
    if kind == "finetune_proto":
        return "the paper's baseline gives no settings but its learning rate, see the README"
    ours = _flat(load_config([f"method={kind}"]).trained.model_dump())
    theirs = _flat(load_config([f"method={kind}", f"learner={kind}_as_published"]).trained.model_dump())
    return ", ".join(f"`{name}` {value}" for name, value in theirs.items() if ours.get(name) != value)


def _flat(settings: dict[str, object], before: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found


def _own_tests(kind: str) -> Iterator[str]:
    """The tests, as sentences, of the modules that import something of the learner's module."""
    for file in sorted(TESTS.glob("test_*.py")):
        if f"from tasks.learners.{kind} import" in file.read_text("utf-8"):
            yield from _tests(file)


def _tests(file: Path) -> Iterator[str]:
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name.removeprefix("test_").replace("_", " ")
