"""A request that is interrupted, and one whose error nobody awaits."""

import asyncio
import gc
import logging
from collections.abc import Iterator

import anyio
import pytest

from tasks.vlm.endpoint import _run_here


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What asyncio says, though another test's library may have switched its logger off."""
    logger = logging.getLogger("asyncio")
    monkeypatch.setattr(logger, "disabled", False)
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        yield
    logger.removeHandler(caplog.handler)


def test_an_interrupt_in_a_request_prints_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def connecting() -> None:
        async with anyio.create_task_group() as ways:  # as for an address of several
            ways.start_soon(interrupted)

    with pytest.raises(KeyboardInterrupt):
        _run_here(connecting)
    assert caplog.records == []


def test_another_error_that_nobody_awaits_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise OSError("lost")

    async def forgets() -> None:
        task = asyncio.get_running_loop().create_task(fails())
        await asyncio.sleep(0)
        del task

    _run_here(forgets)
    gc.collect()
    assert "Task exception was never retrieved" in caplog.text
