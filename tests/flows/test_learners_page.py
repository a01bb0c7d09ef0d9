"""docs/learners.md is what the code, the settings and the tests say now."""

from flows.learners_page import learners_page
from tasks.learners.factory import LEARNERS, NAMED
from tests.conftest import ROOT


def test_the_page_in_docs_is_the_one_that_the_command_prints() -> None:
    said = (ROOT / "docs" / "learners.md").read_text(encoding="utf-8")
    assert said == learners_page(), "write it again: fscil learners > docs/learners.md"


def test_every_learner_has_a_row_with_source_memory_and_own_tests() -> None:
    rows = [line.split(" | ") for line in learners_page().splitlines() if line.startswith("| [")]
    assert [row[0].split("]")[0].removeprefix("| [") for row in rows] == [*LEARNERS, *NAMED]
    for name, source, memory, trains, tests in rows:
        assert source
        assert memory in ("prototypes", "features", "none"), name
        assert trains
        assert int(tests.split(" + ")[0]) > 1, f"{name} has no tests of its own"
