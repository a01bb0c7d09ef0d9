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

    Nor does one that hangs hold it up: who tells may be a loop to which paid answers are on their way. Only what is
    complete is shown before the stage goes on.
    """

    def __init__(self, stage: str, place: str, clock: Callable[[], float]) -> None:
        self._stage, self._place, self._clock = stage, place, clock
        self._due = clock() + AFTER_S
        self._context = copy_context()  # the task's run, for threads that know of none
        self._lock = threading.Lock()
        self._artifact: UUID | None = None
        self._begun = False

    def tell(self, phase: str, done: int, total: int) -> None:
        """Show it if it is time to, and where a shown stage or phase is complete."""
        complete = self._begun and done >= total
        if (self._clock() < self._due and not complete) or not self._lock.acquire(blocking=complete):
            return
        self._due = max(self._due, self._clock() + EVERY_S)
        if complete:
            self._send(phase, done, total)
        else:
            self._begun = True
            threading.Thread(target=self._send, args=(phase, done, total), daemon=True).start()

    def _send(self, phase: str, done: int, total: int) -> None:
        """Show it and release the lock, which who calls has taken."""
        try:
            if self._begun:
                self._context.run(self._show, phase, done, total)
        except Exception as error:  # whatever a server or the way to it may raise: the stage is worth more
            self._due, self._begun = float("inf"), False
            log.warning("Prefect takes no progress of %s (%s: %s)", self._stage, type(error).__name__, error)
        finally:
            self._lock.release()

    def _show(self, phase: str, done: int, total: int) -> None:
        said = f"{self._place}: {self._stage}{f', {phase}' if phase else ''} {done:,}/{total:,}"
        percent = 100 * done / max(1, total)
        if self._artifact is None:
            made = create_progress_artifact(percent, f"progress-{self._stage}", said)
            assert isinstance(made, UUID), "the stages run in threads without an event loop"
            self._artifact = made
        else:
            update_progress_artifact(self._artifact, percent, said)
