"""The peak that a piece of work held: it sees what is freed again, and starts anew."""

import numpy as np
import pytest

from tasks.memory import PeakMemory, resident_mib

MIB = 2**20

pytestmark = pytest.mark.skipif(
    PeakMemory().mib is None, reason="this system keeps no mark that can be reset"
)


def held(mib: int) -> None:
    """Hold so much memory for a moment."""
    np.ones(mib * MIB, dtype=np.uint8).sum()


def test_a_peak_is_seen_after_it_has_passed() -> None:
    before = resident_mib("VmRSS")
    memory = PeakMemory()
    held(200)
    assert before is not None
    assert memory.mib is not None
    assert 190 < memory.mib - before < 300


def test_each_starts_at_what_is_held_now() -> None:
    held(300)
    memory, now = PeakMemory(), resident_mib("VmRSS")
    held(50)
    assert now is not None
    assert memory.mib is not None
    assert memory.mib - now < 200


def test_without_a_gpu_in_use_nothing_is_said_of_it() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert PeakMemory().gpu_mib is None
