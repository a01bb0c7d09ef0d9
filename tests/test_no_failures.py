"""Classes without failures, and failures without a right generation: nothing is compared nor tuned, and the record says so."""

from pathlib import Path

import pytest

from flows.config import load_config
from tasks.records import FailurePair, Mining, Triplet, Verdict
from tasks.store import read_lines
from tasks.tune_lora import tune_lora
from tasks.vlm_compare import vlm_compare
from tests import test_mine_failures as mining_tests

ORIGINALS, CLASSES = mining_tests.ORIGINALS, mining_tests.CLASSES


@pytest.mark.parametrize("all_right", [True, False])
def test_no_failures_and_all_failures_leave_the_adapter_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_right: bool
) -> None:
    monkeypatch.setattr(mining_tests, "right", lambda n: all_right)
    (tmp_path / "data").mkdir()
    (tmp_path / "state" / "stages" / "before" / "0" / "images").mkdir(parents=True)
    mined, context = mining_tests.World(tmp_path).mine()
    assert mined.failures == ({} if all_right else dict.fromkeys(range(CLASSES), ORIGINALS))
    assert mined.candidates == ({} if all_right else dict.fromkeys(range(CLASSES), 0))
    config = load_config(["method=guided", "augmenter.prompts=fixed", "vlm=openai", "vlm.api_key_env=null"])
    compared = vlm_compare.fn(context, mined, config.augmenter, config.vlm, config.generator, None).output
    assert read_lines(context.store.locate(compared.verdicts), Verdict) == []
    assert (compared.semantic, compared.detail, compared.usage.calls) == (0, 0, 0)
    tuned = tune_lora.fn(
        context, mined, compared.verdicts, config.augmenter, config.generator, config.tuning
    ).output
    assert (tuned.adapter, tuned.updates, tuned.skipped_because) == (None, 0, "no failure to learn from")


def test_a_class_without_failures_is_left_out_and_the_others_are_mined_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mined_of(folder: Path) -> tuple[Mining, list[Triplet], list[FailurePair]]:
        (folder / "data").mkdir(parents=True)
        (folder / "state" / "stages" / "before" / "0" / "images").mkdir(parents=True)
        mined, context = mining_tests.World(folder).mine()
        return (
            mined,
            read_lines(context.store.locate(mined.triplets), Triplet),
            read_lines(context.store.locate(mined.pairs), FailurePair),
        )

    usual = mining_tests.right
    before, triplets, pairs = mined_of(tmp_path / "usual")
    monkeypatch.setattr(mining_tests, "right", lambda n: n % CLASSES == 0 or usual(n))
    mined, other_triplets, other_pairs = mined_of(tmp_path / "class 0 is right")
    assert before.failures[0] > 0
    assert mined.failures == {1: before.failures[1]}
    assert other_triplets == [triplet for triplet in triplets if triplet.label == 1] != []
    assert other_pairs == [pair for pair in pairs if pair.label == 1] != []
