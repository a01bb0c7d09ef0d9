"""What a data set is read from and how it is cut: the settings, and the error that all readers raise."""

from pathlib import Path

from pydantic import Field

from tasks.records import Frozen

NAME = r"^\w(?:[\w .+-]*\w)?$"
"""A folder's name that no path, table, page or spreadsheet reads as anything else."""


class DatasetError(ValueError):
    """The data and the settings do not fit; the message names the value and the remedy."""


class DatasetSettings(Frozen):
    """What to read and how to cut it.

    Attributes:
        name: Of the data set; stands in records and in ``make data DATASET=<name>``. ``<name>_dev`` is cut from the
            training pictures of ``<name>`` alone, for choosing settings.
        root: Folder of the pictures.
        splits: Folder with the published session lists, for the data sets that have them; None cuts ``root`` by seed.
        n_base: Classes of the base session, at least 2.
        n_way: New classes of each later session.
        k_shot: Training pictures of each new class.
        n_sessions: How many sessions follow the base session; 0 is plain classification.
        base_shots: Pictures of each base class, held-out ones included, so at least 2 without val/; None takes all.
        test_per_class: Test pictures of each class; None takes all.
        holdout: Share of the base classes' pictures that validates, in (0, 1); at least one of each class.
        class_order: Folder names in the order in which classes come; None sorts them. Others are ignored.
        class_names: Word for prompts by folder name; None, or a folder not listed, takes the folder's name
            with blanks for underscores.
        size: Side in pixels at which pictures are loaded.
        split_seed: Decides which pictures are drawn; not the run's seed. Where ``splits`` decides, only which are
            held out.
    """

    name: str = Field(pattern=NAME)
    root: Path
    splits: Path | None = Field(default=None, exclude_if=lambda splits: splits is None)
    n_base: int
    n_way: int = Field(ge=1)
    k_shot: int = Field(ge=1)
    n_sessions: int = Field(ge=0)
    base_shots: int | None = Field(ge=1)
    test_per_class: int | None = Field(ge=1)
    holdout: float = Field(gt=0, lt=1)
    class_order: tuple[str, ...] | None
    class_names: dict[str, str] | None
    size: int = Field(ge=1)
    split_seed: int

    @property
    def n_classes(self) -> int:
        """Classes of all sessions together."""
        return self.n_base + self.n_way * self.n_sessions
