"""Progress of long stages in Prefect: an artifact of the task's run with a bar, for stages that take a while only."""

import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.progress import Told

AFTER_S, EVERY_S = 5.0, 3.0
"""A stage that ends sooner makes no artifact; between two updates there is at least so much time."""

log = logging.getLogger("fscil.progress")


def stage_progress(stage: str, place: str, clock: Callable[[], float] = time.monotonic) -> Told:
    """The watcher of one stage, for :func:`tasks.progress.watched_by`."""
    return _StageProgress(stage, place, clock).tell


class _StageProgress:
    """Costs a clock's reading a call; each few seconds one request. A server that fails ends it, not the stage.

    Nor does one that hangs hold it up, in whose loop paid answers may be on their way: a thread of its own asks, for the
    latest that it was told.
    """

    def __init__(self, stage: str, place: str, clock: Callable[[], float]) -> None:
        self._stage, self._place, self._clock = stage, place, clock
        self._due = clock() + AFTER_S
        self._context = copy_context()  # the task's run, for threads that know of none
        self._lock = threading.Lock()
        self._next: tuple[str, int, int] | None = None
        self._sending = self._begun = False
        self._artifact: UUID | None = None

    def tell(self, phase: str, done: int, total: int) -> None:
        """Show it if it is time to, and where a shown stage or phase is complete."""
        complete = self._begun and done >= total
        if self._clock() < self._due and not complete:
            return
        with self._lock:
            self._next, sending, self._sending = (phase, done, total), self._sending, True
        if not sending:
            self._begun = True
            try:
                threading.Thread(target=self._send, daemon=True).start()
            except RuntimeError as error:  # no more threads
                self._end(error)

    def _send(self) -> None:
        while True:
            with self._lock:
                told, self._next = self._next, None
                self._sending = told is not None
            if told is None:
                return
            try:
                self._context.run(self._show, *told)
                self._due = self._clock() + EVERY_S
            except (
                Exception
            ) as error:  # whatever a server or the way to it may raise: the stage is worth more
                return self._end(error)

    def _end(self, error: Exception) -> None:
        log.warning("Prefect takes no progress of %s (%s: %s)", self._stage, type(error).__name__, error)
        self._due, self._begun = float("inf"), False

    def _show(self, phase: str, done: int, total: int) -> None:
        said = f"{self._place}: {self._stage}{f', {phase}' if phase else ''} {done:,}/{total:,}"
        percent = 100 * done / max(1, total)
        if self._artifact is None:
            made = create_progress_artifact(percent, f"progress-{self._stage}", said)
            assert isinstance(made, UUID), "the stages run in threads without an event loop"
            self._artifact = made
        else:
            update_progress_artifact(self._artifact, percent, said)
