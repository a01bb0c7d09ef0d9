"""Every row of the paper's Tables 3 and 4 runs from its preset to its end, and does what sets it apart.

All rows share one state folder, so what they have in common (A_0, the first classifier) is computed once.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.config import ConfigError, load_config
from flows.experiment import fscil, preflight
from tasks.diffusion.windows import step_window
from tasks.records import (
    AugmentedImage,
    EpochRecord,
    ExperimentRecord,
    Prediction,
    SessionRecord,
    Usage,
    Verdict,
)
from tasks.store import read_lines
from tests.conftest import Place

STEPS, BORDER = 4, 0.5  # of the chain, and the paper's half of it
TINY = (
    "dataset.base_shots=5",
    "dataset.n_sessions=1",
    "dataset.test_per_class=2",
    "augmenter.min_per_class=2",
    f"generator.steps={STEPS}",
    f"tuning.border={BORDER}",
    "tuning.updates=4",
    "tuning.batch=1",
)
BOTH = {"semantic", "detail"}


@dataclass(frozen=True)
class Row:
    """What a row's epochs do: stages, what becomes of the prompts, and which halves of the chain may be tuned."""

    stages: str
    rewrites: bool = False
    rule: str | None = None
    halves: frozenset[str] = frozenset()

    @property
    def asks(self) -> bool:
        return "compare" in self.stages


ROWS = {
    "finetune": Row("train evaluate"),
    "fixed_sd": Row("train evaluate regenerate"),
    "random": Row("train evaluate mine tune regenerate", rule="random", halves=frozenset(BOTH)),
    "first": Row("train evaluate mine tune regenerate", rule="first", halves=frozenset({"semantic"})),
    "sd_vlm": Row("train evaluate mine compare regenerate", rewrites=True),
    "vlm": Row(
        "train evaluate mine compare tune regenerate",
        rewrites=True,
        rule="first",
        halves=frozenset({"semantic"}),
    ),
    "guided": Row("train evaluate mine compare tune regenerate", rewrites=True, rule="guided"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, prefect_server: None, digits: Path) -> Place:
    return Place(tmp_path_factory.mktemp("presets"))


def run(place: Place, method: str) -> ExperimentRecord:
    overrides = place.overrides(*TINY)
    if method == "vlm_zero_shot":  # it has no learner to set
        overrides = [override for override in overrides if not override.startswith("learner.")]
    return fscil("digits", method, 0, overrides)


def first_epoch(place: Place, method: str) -> tuple[Path, EpochRecord]:
    folder = place.run(method) / "session-00" / "epoch-000"
    return folder, EpochRecord.model_validate_json((folder / "record.json").read_text())


def halves_of(steps: tuple[int, ...]) -> set[str]:
    return {"semantic" if step in step_window("semantic", STEPS, BORDER) else "detail" for step in steps}


@pytest.mark.parametrize(
    "method",
    [name if name in ("finetune", "guided") else pytest.param(name, marks=pytest.mark.slow) for name in ROWS],
)
def test_a_row_runs_the_stages_that_set_it_apart(place: Place, method: str) -> None:
    row, record = ROWS[method], run(place, method)
    assert [len(session.counts) for session in record.sessions] == [6, 8]
    folder, epoch = first_epoch(place, method)
    ran = [
        name
        for name in ("train", "evaluate", "mine", "compare", "tune", "regenerate")
        if getattr(epoch, name)
    ]
    assert ran == row.stages.split()
    assert (record.images_drawn > 0) == ("regenerate" in ran)
    assert (record.usage.calls > 0) == (record.usage.tokens > 0) == row.asks
    if epoch.regenerate:
        images = read_lines(folder / "manifest.jsonl", AugmentedImage)
        rewritten = [image for image in images if "," in image.prompt]
        assert bool(rewritten) == row.rewrites
        assert (epoch.regenerate.output.adapter is not None) == (row.rule is not None)
    if epoch.tune:
        assert epoch.tune.settings["rule"] == row.rule
        allowed = row.halves or {verdict.level for verdict in read_lines(folder / "verdicts.jsonl", Verdict)}
        assert halves_of(epoch.tune.output.steps_drawn) <= allowed
        assert method != "random" or halves_of(epoch.tune.output.steps_drawn) == BOTH


def test_the_vlm_alone_names_classes_trains_nothing_and_is_asked_once(place: Place) -> None:
    record = run(place, "vlm_zero_shot")
    assert [[(c.label, c.total) for c in s.counts] for s in record.sessions] == [
        [(label, 2) for label in range(6)],
        [(label, 2) for label in range(8)],
    ]
    assert (record.images_drawn, record.epochs, record.usage.calls) == (0, 0, 12 + 16)
    run_folder = place.run("vlm_zero_shot")
    assert not list(run_folder.rglob("classifier")) + list(run_folder.rglob("images"))
    unparsed, usage = 0, []
    for folder, accuracy in zip(sorted(run_folder.glob("session-*")), record.sessions, strict=True):
        session = SessionRecord.model_validate_json((folder / "record.json").read_text())
        rows = read_lines(folder / "test" / "test-predictions.jsonl", Prediction)
        assert session.end.classifier is None
        assert session.unparsed == sum(row.predicted is None for row in rows)
        assert sum(count.correct for count in accuracy.counts) == sum(row.correct for row in rows)
        unparsed, usage = unparsed + session.unparsed, [*usage, session.usage]
    assert (record.unparsed, record.usage) == (unparsed, Usage.total(usage))
    answers = {path: path.stat().st_mtime_ns for path in (place.root / "state" / "vlm").rglob("*.json")}
    for sealed in (place.root / "state" / "stages" / "evaluate_zero_shot").iterdir():
        sealed.rename(sealed.with_name(f"{sealed.name}.lost"))  # as if it had been killed just before sealing
    assert run(place, "vlm_zero_shot") == record
    assert {p: p.stat().st_mtime_ns for p in (place.root / "state" / "vlm").rglob("*.json")} == answers


# ------------------------------------------------------------------------------------------ refusals


def test_images_for_a_vlm_that_learns_nothing_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^Value error, learner=vlm_zero_shot learns nothing .* augmenter=none"
    ):
        load_config(["method=vlm_zero_shot", "augmenter=guided"])


def test_class_names_that_no_answer_can_tell_apart_are_refused_before_any_compute(
    tmp_path: Path, digits: Path
) -> None:
    where = [o for o in Place(tmp_path, digits).overrides() if o.startswith(("dataset.", "runtime."))]
    config = load_config(
        ["method=vlm_zero_shot", *where, "dataset.class_names={zero: sea gull, one: Sea-Gull}"]
    )
    with pytest.raises(ValueError, match="'sea gull' and 'Sea-Gull' cannot be told apart"):
        preflight(config)
