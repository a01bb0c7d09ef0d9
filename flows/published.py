"""What the paper prints in Tables 1, 3 and 4: data in ``published.yaml``, to stand beside what was measured here."""

from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from tasks.records import Frozen

DATA = Path(__file__).with_name("published.yaml")


class PublishedRow(Frozen):
    """One row of one table on one dataset.

    Attributes:
        table: ``Table 1``, ``Table 3`` or ``Table 4``.
        dataset: as in ``configs/dataset``.
        method: the preset of ``configs/method`` that does the same here.
        label: the paper's name of the row.
        A_base: mean and standard deviation over seeds, in percent; so are ``A_last`` and ``A_avg``.
    """

    table: str
    dataset: str
    method: str
    label: str
    A_base: tuple[float, float]
    A_last: tuple[float, float]
    A_avg: tuple[float, float]

    def value(self, column: str) -> tuple[float, float] | None:
        """Mean and standard deviation of a column, in percent; None for one that the paper does not have."""
        return getattr(self, column) if column in COLUMNS_OF_THE_PAPER else None


COLUMNS_OF_THE_PAPER = ("A_base", "A_last", "A_avg")


class Published(Frozen):
    """All rows, and where they were printed."""

    source: str
    rows: tuple[PublishedRow, ...]


@cache
def published() -> Published:
    """Read the data file, once."""
    return Published.model_validate(OmegaConf.to_container(OmegaConf.load(DATA)))


def published_row(dataset: str, method: str) -> PublishedRow | None:
    """The first table's row of a method on a dataset; None where the paper has none."""
    found = (row for row in published().rows if (row.dataset, row.method) == (dataset, method))
    return next(found, None)


def published_label(method: str) -> str | None:
    """The paper's name of a method, whatever the dataset: Table 1's where it is there; None if it has none."""
    return next((row.label for row in published().rows if row.method == method), None)
