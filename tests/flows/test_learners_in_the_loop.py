"""Every learner through the whole loop: interrupted between two stages it ends as if it had not been; an epoch replays."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.__main__ import main
from flows.experiment import fscil
from tasks.learners.factory import LEARNERS, NAMED
from tasks.records import ExperimentRecord
from tasks.store import Store
from tests.conftest import Place

TINY = (
    "dataset.base_shots=6",
    "dataset.n_sessions=1",
    "dataset.test_per_class=4",
    "augmenter.min_per_class=2",
    "generator.steps=4",
    "tuning.updates=2",
)
SHORT = {"passes": ("base", "incremental"), "episodes": ("meta",), "steps": ("incremental",)}
STAGES_BEFORE = 13  # of 20: within the second session


class Interrupted(RuntimeError):
    """What stands for a kill."""


def overrides(place: Place, kind: str) -> list[str]:
    """A quick experiment with short trainings, where the learner has any."""
    from flows.config import load_config

    learner = load_config([f"method={kind}"]).learner
    short = [
        f"learner.{part}.{name}=1"
        for name, parts in SHORT.items()
        for part in parts
        if hasattr(getattr(learner, part, None), name)
    ]
    others = [override for override in place.overrides() if not override.startswith("learner.")]
    return [*others, *TINY, *short]


def stopping_after(stages: int) -> Callable[..., object]:
    """``Store.run`` that seals so many stages and then ends the process, as far as a test can."""
    run, begun = Store.run, 0

    def counted(store: Store, *given: object, **named: object) -> object:
        nonlocal begun
        begun += 1
        if begun > stages:
            raise Interrupted
        return run(store, *given, **named)  # type: ignore[arg-type]

    return counted


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "cec" else pytest.param(kind, marks=pytest.mark.slow)
        for kind in sorted({*LEARNERS, *NAMED} - {"finetune_proto"})
    ],
)
def test_interrupted_and_resumed_it_ends_alike_and_an_epoch_replays(
    kind: str, tmp_path: Path, prefect_server: None, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, whole, broken = f"{kind}_guided", Place(tmp_path / "whole"), Place(tmp_path / "broken")
    record = fscil("digits", method, 0, overrides(whole, kind))
    assert isinstance(record, ExperimentRecord)
    assert record.images_drawn > 0
    assert record.usage.calls > 0
    with monkeypatch.context() as patch:
        patch.setattr(Store, "run", stopping_after(STAGES_BEFORE))
        with pytest.raises(Interrupted):
            fscil("digits", method, 0, overrides(broken, kind))
    assert (broken.run(method) / "session-00" / "record.json").exists()
    assert not (broken.run(method) / "experiment.json").exists()
    assert fscil("digits", method, 0, overrides(broken, kind)) == record
    assert broken.files(method) == whole.files(method)
    epoch = whole.run(method) / "session-01" / "epoch-000"
    assert main(["replay", str(epoch), f"runtime.state={tmp_path / 'state'}"]) == 0
