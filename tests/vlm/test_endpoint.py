"""A request that is interrupted, and one whose error nobody awaits."""

import asyncio
import gc

import anyio
import pytest

from tasks.vlm.endpoint import _run_here


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What asyncio prints, with tracebacks, of errors that nobody has caught."""
    said: list[str] = []

    def default(loop: asyncio.BaseEventLoop, context: dict[str, str]) -> None:
        said.append(context["message"])

    monkeypatch.setattr(asyncio.BaseEventLoop, "default_exception_handler", default)
    return said


def test_an_interrupt_in_a_request_prints_no_traceback(printed: list[str]) -> None:
    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def connecting() -> None:
        async with anyio.create_task_group() as ways:  # as for an address of several
            ways.start_soon(interrupted)

    with pytest.raises(KeyboardInterrupt):
        _run_here(connecting)
    assert printed == []


def test_another_error_that_nobody_awaits_is_printed(printed: list[str]) -> None:
    async def fails() -> None:
        raise OSError("lost")

    async def forgets() -> None:
        task = asyncio.get_running_loop().create_task(fails())
        await asyncio.sleep(0)
        del task

    _run_here(forgets)
    gc.collect()
    assert printed == ["Task exception was never retrieved"]
