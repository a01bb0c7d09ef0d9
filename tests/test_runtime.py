"""Threads and algorithms are set so that a run's bits do not depend on how busy the machine is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tasks.runtime import RuntimeSettings


@pytest.fixture
def as_before() -> Iterator[None]:
    """What torch was set to is restored."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def runtime(threads: int | None) -> RuntimeSettings:
    return RuntimeSettings(device="cpu", threads=threads, state=Path(), runs=Path())


@pytest.mark.parametrize("threads", [None, 1])
def test_threads_are_set_even_where_none_are_given(
    threads: int | None, monkeypatch: pytest.MonkeyPatch, as_before: None
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    runtime(threads).apply()
    assert given == [threads or torch.get_num_threads()]


def test_a_gradient_of_several_threads_is_the_same_each_time(as_before: None) -> None:
    """Without ``apply`` two threads add to one row in either order, and nearly each time is another."""
    runtime(2).apply()
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 3, 32, 32, generator=draws)
    owner, weights = (
        torch.randint(0, 8, (100,), generator=draws),
        torch.randn(100, 3, 32, 32, generator=draws),
    )

    def gradient() -> bytes:
        leaf = rows.clone().requires_grad_()
        (leaf[owner] * weights).sum().backward()
        assert leaf.grad is not None
        return leaf.grad.numpy().tobytes()

    assert len({gradient() for _ in range(100)}) == 1
