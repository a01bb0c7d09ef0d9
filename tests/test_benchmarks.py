"""The benchmarks' own arithmetic: turns, the best round, memory, the table. None of them is run here."""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.benchmarks import full_size, measuring, tuning
from tests.benchmarks.__main__ import PARTS, main
from tests.benchmarks.measuring import Call, Plan, Row, at_least

CPU = torch.device("cpu")


def test_contenders_take_turns_and_count_with_their_best_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    now = [0.0]
    waits = {"a": iter([9.0, 3.0, 2.0, 4.0]), "b": iter([9.0, 5.0, 6.0, 7.0])}

    def contender(name: str) -> Call:
        def call() -> None:
            calls.append(name)
            now[0] += next(waits[name])

        return call

    monkeypatch.setitem(measuring.CLOCKS, "wall", lambda: now[0])
    best = Plan("wall", 3, CPU).race({name: contender(name) for name in waits})
    assert calls == ["a", "b"] * 4
    assert best == {"a": 2.0, "b": 5.0}


def large(mib: int) -> Call:
    return lambda: torch.ones(mib * 2**18).sum()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_that_a_call_gives_back_is_seen() -> None:
    assert 94 <= measuring._peak(torch.get_num_threads(), large, (96,)) < 128


def test_a_promise_holds_or_is_missed() -> None:
    assert at_least("x", "1 s", 5.0, 5).holds is True
    assert at_least("x", "1 s", 4.99, 5).holds is False


def test_the_table_is_written_and_a_missed_promise_is_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = import_module("tests.benchmarks.similarity")
    for ratio, status, mark in ((6.0, 0, "met"), (4.0, 1, "MISSED")):
        monkeypatch.setattr(
            module, "rows", lambda plan, r=ratio: [at_least("pairs", "1 us", r, 5), Row("-", "2")]
        )
        assert main(["similarity", "--out", str(tmp_path / "new" / "bench.md")]) == status
        text = (tmp_path / "new" / "bench.md").read_text()
        assert f"| pairs | 1 us | {ratio:.2f} x | >= 5 x | {mark} |" in text
        assert "one run" in text
        assert f"torch {version('torch')}" in text


@pytest.mark.parametrize("part", sorted({part for parts in PARTS.values() for part in parts}))
def test_every_part_has_rows(part: str) -> None:
    assert callable(import_module(f"tests.benchmarks.{part}").rows)


def test_undecorated_functions_are_plain_and_come_back() -> None:
    import flows.epoch
    from tests.benchmarks.orchestration import undecorated

    decorated = flows.epoch.mine_failures
    with undecorated():
        assert flows.epoch.mine_failures is decorated.fn
    assert flows.epoch.mine_failures is decorated


@pytest.mark.slow
def test_the_full_size_rows_on_a_small_copy() -> None:
    """Where there is no GPU, at least the code that measures one runs."""
    small = list(full_size.rows(Plan("wall", 1, CPU), full_size.SMALL))
    assert [row.what.split(",")[0] for row in small] == [
        "regenerate", "tune_lora", "- batch 1", "tune_lora", "- batch 2",
    ]  # fmt: skip
    assert all("out of memory" not in row.figure for row in small)


def test_a_whole_chain_sees_the_loss_that_one_step_sees() -> None:
    generator = full_size.model(CPU, full_size.SMALL, 1)
    generator.begin_tuning(rank=2, alpha=2, seed=0)
    losses = [
        tuning.one_step_update(generator, 1)(),
        *(tuning.whole_chain_update(generator, 1, checkpoints=on)() for on in (True, False)),
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
