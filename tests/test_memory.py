"""The peak that a piece of work held: it sees what is freed again, and starts anew. And where memory runs out."""

import numpy as np
import pytest
import torch

from tasks.memory import MemoryShortageError, PeakMemory, resident_mib, within_memory

MIB = 2**20

marked = pytest.mark.skipif(PeakMemory().mib is None, reason="this system keeps no mark that can be reset")


def held(mib: int) -> None:
    """Hold so much memory for a moment."""
    np.ones(mib * MIB, dtype=np.uint8).sum()


@marked
def test_a_peak_is_seen_after_it_has_passed() -> None:
    before = resident_mib("VmRSS")
    memory = PeakMemory()
    held(200)
    assert before is not None
    assert memory.mib is not None
    assert 190 < memory.mib - before < 300


@marked
def test_each_starts_at_what_is_held_now() -> None:
    held(300)
    memory, now = PeakMemory(), resident_mib("VmRSS")
    held(50)
    assert now is not None
    assert memory.mib is not None
    assert memory.mib - now < 200


def test_without_a_gpu_in_use_nothing_is_said_of_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert PeakMemory().gpu_mib is None


def ask_torch() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def ask_numpy() -> None:
    np.empty(2**62, dtype=np.uint8)


def ask_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("ask", [ask_torch, ask_numpy, ask_gpu])
def test_a_shortage_says_what_to_lower(ask) -> None:
    with pytest.raises(
        MemoryShortageError, match=r"^the memory does not suffice \(.+\); lower tuning\.batch$"
    ):
        within_memory("tuning.batch")(ask)()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), within_memory("tuning.batch"):
        raise RuntimeError("a bug")
