"""Threads are always set, never left to what MKL thinks of the machine's load."""

from pathlib import Path

import pytest
import torch

from tasks.runtime import RuntimeSettings


@pytest.mark.parametrize("threads", [None, 1])
def test_threads_are_set_even_where_none_are_given(
    threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    RuntimeSettings(device="cpu", threads=threads, state=Path(), runs=Path()).apply()
    assert given == [threads or torch.get_num_threads()]
