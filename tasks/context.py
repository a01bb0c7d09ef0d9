"""What every verb is told: whose epoch this is, and where things are. References only, so it stays small."""

from pathlib import Path

from tasks.datasets.benchmark import DatasetSettings
from tasks.records import ArtifactRef, Frozen, LoopState
from tasks.runtime import RuntimeSettings
from tasks.store import Store


class EpochContext(Frozen):
    """One epoch's place in the run.

    ``session_ref`` is the session without its test images: no verb but the sealing evaluation is ever
    handed a reference to those.
    """

    run: str
    seed: int
    session: int
    epoch: int
    session_ref: ArtifactRef
    start: LoopState
    class_names: tuple[str, ...]
    n_base: int
    dataset: DatasetSettings
    runtime: RuntimeSettings

    @property
    def store(self) -> Store:
        """The store that stages are sealed in."""
        return Store(self.runtime.state)

    @property
    def data_root(self) -> Path:
        """Where the dataset's images are."""
        return self.dataset.root
