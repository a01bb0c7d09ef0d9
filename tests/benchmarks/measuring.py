"""How the benchmarks measure: contenders in turn, the best of some rounds; memory in a process of its own.

Contenders take turns (A B A B), so that what else the machine does falls on all of them, and each counts with its
best round: noise only ever adds. ``wall`` is what a user waits; ``cpu`` is processor time, for a machine that is
busy with other work (set OMP_NUM_THREADS=1 with it, since threads add up).

Peak memory is the growth of the process's resident high-water mark over its size when the call begins, after one
call of warming up. tracemalloc does not see torch's memory, and ``ru_maxrss`` never falls again after loading a
model; Linux resets its mark through ``/proc/self/clear_refs``. Elsewhere no memory is measured.
"""

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from tasks.memory import PeakMemory, resident_mib

Call = Callable[[], object]
Key = TypeVar("Key")
Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Plan:
    """What was asked for: which clock, how many rounds, which device."""

    clock: Clock
    rounds: int
    device: torch.device

    def seconds(self, call: Call) -> float:
        """How long one call takes, until the device has finished."""
        start = CLOCKS[self.clock]()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return CLOCKS[self.clock]() - start

    def race(self, contenders: Mapping[Key, Call]) -> dict[Key, float]:
        """The best seconds of each contender; every one is called once more beforehand, unmeasured."""
        for call in contenders.values():
            call()
        best = dict.fromkeys(contenders, float("inf"))
        for _ in range(self.rounds):
            for name, call in contenders.items():
                best[name] = min(best[name], self.seconds(call))
        return best


@dataclass(frozen=True)
class Row:
    """One line of the table. ``holds`` is None where nothing was promised."""

    what: str
    figure: str
    ratio: str = ""
    goal: str = ""
    holds: bool | None = None


def at_least(what: str, figure: str, ratio: float, goal: float) -> Row:
    """A row that promises a ratio."""
    return Row(what, figure, f"{ratio:.2f} x", f">= {goal:g} x", ratio >= goal)


def peak_mib(make: Callable[..., Call], *args: object) -> float:
    """Peak memory, in MiB, that a call needs beyond what stands when it begins.

    Args:
        make: a function of a module; run in the new process, it builds the call.
        args: of ``make``.

    Returns:
        NaN where the system keeps no mark that can be reset.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (torch.get_num_threads(), make, args))


def _peak(threads: int, make: Callable[..., Call], args: tuple[object, ...]) -> float:
    torch.set_num_threads(threads)
    call = make(*args)
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed blocks that the allocator keeps would hide the growth
    memory, before = PeakMemory(), resident_mib("VmRSS")
    call()
    most = memory.mib
    return float("nan") if most is None or before is None else most - before
