"""What a run has paid, kept across kills, and the limit that stops it before it pays more.

The ledger is JSON lines of :class:`~tasks.records.Usage`, one for each answer that was paid for, appended
after the answer was kept. A kill between the two leaves one answer out of the count; none is paid twice.
"""

import logging
import os
from pathlib import Path
from typing import BinaryIO

from tasks.records import Usage
from tasks.vlm.transport import BudgetError, TransportSettings

log = logging.getLogger("fscil.vlm")


class Budget:
    """Counts what is paid and what the requests under way may yet cost."""

    def __init__(self, settings: TransportSettings, ledger: Path | None) -> None:
        """Args: settings: prices and limit; ledger: file of what was paid before; None forgets it at the end."""
        self._settings = settings
        self._ledger = ledger
        self._paid = Usage.total(_read(ledger) if ledger else [])
        self._reserved = 0.0

    @property
    def paid(self) -> Usage:
        """What was paid so far, by all processes of the run."""
        return self._paid

    def reserve(self, worst: Usage) -> None:
        """Set aside what a request may cost at most, before it is sent.

        Raises:
            BudgetError: the limit does not allow it.
        """
        limit, more = self._settings.max_cost, self._cost(worst)
        if limit is not None and (self._paid.cost or 0.0) + self._reserved + more > limit:
            raise self.used_up()
        self._reserved += more

    def used_up(self) -> BudgetError:
        """The error that says what was spent until now, and what to do."""
        group, limit, paid = self._settings.group, self._settings.max_cost, self._paid
        return BudgetError(
            f"{group}.max_cost={limit:g} leaves no room for another answer: this run has spent {paid.cost or 0:.4g} "
            f"on {paid.calls:,} answers, which are kept; raise {group}.max_cost and give the same command again "
            "to go on from there"
        )

    def release(self, worst: Usage) -> None:
        """The request was not answered."""
        self._reserved -= self._cost(worst)

    def settle(self, worst: Usage, paid: Usage) -> None:
        """The request was answered, and this is what it cost; the most it can, where a limit waits for what is untold."""
        self.release(worst)
        if self._settings.max_cost is not None and paid.cost == 0.0 and paid.tokens == 0:
            paid = self._settings.priced(worst)
        self._paid = Usage.total([self._paid, paid])
        if self._ledger is not None:
            self._ledger.parent.mkdir(parents=True, exist_ok=True)
            with self._ledger.open("ab+") as lines:
                begin = b"" if _ends_whole(lines) else b"\n"
                lines.write(begin + paid.model_dump_json().encode() + b"\n")

    def _cost(self, usage: Usage) -> float:
        return self._settings.cost(usage) or 0.0


def _ends_whole(lines: BinaryIO) -> bool:
    """Whether the last line does; a kill may have cut it."""
    if lines.seek(0, os.SEEK_END) == 0:
        return True
    lines.seek(-1, os.SEEK_END)
    return lines.read(1) == b"\n"


def _read(ledger: Path) -> list[Usage]:
    paid = []
    for line in ledger.read_bytes().splitlines() if ledger.is_file() else ():
        try:
            paid.append(Usage.model_validate_json(line))
        except ValueError:
            log.warning("%s has a damaged line, of a run that was killed; it is not counted", ledger)
    return paid
