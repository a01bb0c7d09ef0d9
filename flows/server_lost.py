"""A Prefect server that does not answer any more, and what becomes of the run.

Prefect's client tries again for about a minute (PREFECT_CLIENT_MAX_RETRIES), so a server may be started again under a
run; where one hangs, each try takes PREFECT_API_REQUEST_TIMEOUT besides. After that a flow has nobody to tell its state,
and the command ends with one sentence. Nothing of a run lives in Prefect alone: what was sealed is sealed, and the same
command goes on, on a server of its own where none answers.
Pages, tags and progress are extras: one that Prefect does not take is a warning. So are events: Prefect tries each for
seconds, before the process may end, so those that a lost server has not got are dropped.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from socket import gaierror

import httpx

NO_WAY = (ConnectionError, TimeoutError, gaierror)
"""Beneath httpx's errors, of the same lost server."""

FULL = 16 * 2**20
"""Bytes on a disk below which a database may fail."""

log = logging.getLogger("fscil.prefect")


class _Once(logging.Filter):
    """Lets one line through in all."""

    def __init__(self) -> None:
        super().__init__()
        self._left = 1

    def filter(self, record: logging.LogRecord) -> bool:
        self._left -= 1
        return self._left >= 0


_ONCE = _Once()


class ServerLostError(OSError):
    """The Prefect server does not answer any more."""


@contextmanager
def told_if_lost(url: str, known: Callable[[], tuple[type[Exception], ...]]) -> Iterator[None]:
    """Put a lost server into one sentence, with the error that could not be reported to it, if there was one.

    Args:
        url: of the server.
        known: gives the errors that are for the user.

    Raises:
        ServerLostError: the server does not answer.
    """
    _say_it_once()
    try:
        yield
    except (httpx.HTTPError, RuntimeError) as error:
        if not is_lost(error):
            raise
        _drop_events()
        first = _before(error, known())
        also = f"{first}; besides, " if first else ""
        broken = isinstance(error, httpx.HTTPStatusError)
        raise ServerLostError(
            f"{also}the Prefect server at {url} {'fails' if broken else 'does not answer any more'} "
            f"({type(error).__name__}: {error}){_full_disk()}; nothing sealed is lost - the same command goes on from here"
        ) from error


@contextmanager
def extra(what: str) -> Iterator[None]:
    """Something that Prefect shows and no run needs: where the server takes it not, a warning says so."""
    try:
        yield
    except httpx.HTTPError as error:
        log.warning("Prefect takes no %s (%s: %s)", what, type(error).__name__, error)


def is_lost(error: Exception) -> bool:
    """Whether Prefect does not answer: its client raises httpx's errors, and a RuntimeError where it greets in vain."""
    return isinstance(error, httpx.HTTPError) or (
        type(error) is RuntimeError and "Failed to reach API" in str(error)  # a provider may say so too
    )


def _full_disk() -> str:
    """What to do where the disk of this machine's Prefect database is full, which a server tells nobody."""
    from prefect.settings import PREFECT_HOME

    home = PREFECT_HOME.value()
    with suppress(OSError):
        if (free := shutil.disk_usage(home).free) < FULL:
            return (
                f"; the disk of Prefect's database, {home}, has {free / 2**20:.0f} MiB left: make room there, "
                "or set PREFECT_HOME to a folder on another one"
            )
    return ""


def _before(error: BaseException, known: tuple[type[Exception], ...]) -> BaseException | None:
    """The error for the user that was under way when the server was found lost."""
    context = error.__context__
    while context is not None and (not isinstance(context, known) or isinstance(context, NO_WAY)):
        context = context.__context__
    return context


def _say_it_once() -> None:
    """Of the events that Prefect cannot send, the first one's warning is enough."""
    for name in ("prefect._internal.concurrency", "EventsWorker"):
        logging.getLogger(name).addFilter(_no_event)  # not a level, which Prefect sets anew
    logging.getLogger("prefect.events.clients").addFilter(_ONCE)


def _no_event(record: logging.LogRecord) -> bool:
    """Whether a line is none of those that print an event whole, or how many are left."""
    return not str(record.msg).startswith(("Service %r failed to process item", "Still processing items"))


def _drop_events() -> None:
    from prefect.events.worker import EventsWorker

    workers = [one for one in EventsWorker._instances.values() if isinstance(one, EventsWorker)]  # type: ignore[misc]
    for worker in workers:
        with suppress(Empty):
            while True:
                worker._queue.get_nowait()
                worker._queue.task_done()
