"""The shape of a trace: what ``fscil trace --json`` prints. ``format`` numbers it; a field never changes its meaning.

``kind`` says which of the four it is: an ``image``, an ``adapter``, another ``artifact`` of a stage, or a ``cell`` of
a table. Digests are DVC's; paths are as they were given or found; accuracies are in [0, 1].
"""

from typing import Any, Literal

from tasks.records import Answer, Digest, Frozen, Level

TRACE_FORMAT = 1


class Origin(Frozen):
    """What made a run. All after ``settings`` are None where neither the run's state nor its pointer is at hand."""

    run: str
    config_digest: str
    settings: dict[str, Any]
    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: dict[str, str] | None = None
    data_digest: str | None = None
    weights_digests: dict[str, str] | None = None
    command: tuple[str, ...] | None = None
    device: str | None = None
    threads: int | None = None


# ------------------------------------------------------------------------------------------ a generated image


class Compared(Frozen):
    """One question of Eq. 2; ``target``: the rewriting aimed at this original."""

    original_id: str
    caption_original: str
    caption_augmented: str
    answer: Answer
    target: bool


class Judged(Frozen):
    """Eq. 1's verdict on an image; the comparisons are those of the centre that it was inherited from, if it was."""

    level: Level
    prompt_next: str
    target_id: str | None
    inherited_from: str | None
    comparisons: tuple[Compared, ...]


class Predicted(Frozen):
    """What the classifier of the epoch that used an image said of it."""

    predicted: int | None
    class_name: str | None
    correct: bool
    margin: float | None
    classifier: Digest


class Step(Frozen):
    """One image of a slot: as it was drawn for an epoch, then seen and judged there.

    ``intact``: whether the file has its recorded digest; ``adapter`` None is the base generator.
    """

    image_id: str
    epoch: int
    file: str
    digest: Digest
    intact: bool
    prompt: str
    seed: int
    adapter: Digest | None
    predicted: Predicted | None
    judged: Judged | None


# ------------------------------------------------------------------------------------------ an adapter


class Negative(Frozen):
    """A generated image that the tuner contrasted a failure with, and their SSIM."""

    image_id: str
    ssim: float


class Example(Frozen):
    """The prompt of a centre that was tuned towards a failure, and through which half of the steps."""

    centre: str
    prompt: str
    level: Level


class Failure(Frozen):
    """An original that was classified wrongly: a positive of the tuning."""

    original_id: str
    path: str
    digest: Digest
    label: int
    class_name: str
    predicted: int | None
    predicted_class: str | None
    examples: tuple[Example, ...]
    negatives: tuple[Negative, ...]


class Tuned(Frozen):
    """One tuning in short; ``steps_drawn`` are counts by denoising step, ``loss`` first and last of the updates.

    ``session_data``: of the list of the session's images with their digests.
    """

    adapter: Digest
    session: int
    epoch: int
    folder: str
    seed: int
    updates: int
    steps_drawn: dict[int, int]
    loss: tuple[float, float] | None
    failures: int
    negatives: int
    classifier: Digest
    generator: Digest
    session_data: Digest
    started_from: Digest | None


class AdapterTrace(Frozen):
    """An adapter: the tuning that made it, what it learned from, and the tunings before it, latest first."""

    format: int = TRACE_FORMAT
    kind: Literal["adapter"] = "adapter"
    tuning: Tuned
    settings: dict[str, Any]
    failures: tuple[Failure, ...]
    before: tuple[Tuned, ...]
    origin: Origin
    commands: tuple[str, ...] = ()
    also_in: tuple[str, ...] = ()


class ImageTrace(Frozen):
    """A generated image, drawn for an epoch of a session; ``steps`` are its slot's, the first one first.

    ``source_id`` is the training image whose place it doubles, None for replay of an earlier class.
    ``session_data``: of the list of the session's images with their digests, if an epoch has begun with it.
    ``first_prompt``: ``base``, or ``learned`` from the earlier session's images in ``learned_from``.
    """

    format: int = TRACE_FORMAT
    kind: Literal["image"] = "image"
    image_id: str
    run: str
    session: int
    epoch: int
    folder: str
    slot: str
    label: int
    class_name: str
    source_id: str | None
    steps: tuple[Step, ...]
    first_prompt: Literal["base", "learned"]
    learned_from: tuple[str, ...]
    generator: Digest
    session_data: Digest | None
    settings: dict[str, Any]
    batch_shape: tuple[int, ...]
    adapter: AdapterTrace | None
    origin: Origin
    commands: tuple[str, ...]
    also_in: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------ anything else


class ArtifactTrace(Frozen):
    """Another file or folder of a stage, and the stage that made it."""

    format: int = TRACE_FORMAT
    kind: Literal["artifact"] = "artifact"
    what: str
    digest: Digest
    session: int
    epoch: int | None
    folder: str
    stage: str
    version: int
    fingerprint: str
    seed: int
    inputs: dict[str, Digest | None]
    settings: dict[str, Any]
    origin: Origin
    commands: tuple[str, ...]
    also_in: tuple[str, ...] = ()


class Counted(Frozen):
    """One session's test images, from its record; those of base classes among them."""

    session: int
    correct: int
    total: int
    base_correct: int
    base_total: int
    record: str


class Seed(Frozen):
    """One seed's share of a cell, computed from its session records; ``agrees`` with its experiment.json."""

    seed: int
    value: float | None
    agrees: bool
    sessions: tuple[Counted, ...]
    origin: Origin
    commands: tuple[str, ...]


class CellTrace(Frozen):
    """A cell of the tables: a column over the seeds of a method on a data set; ``std`` is the sample's."""

    format: int = TRACE_FORMAT
    kind: Literal["cell"] = "cell"
    dataset: str
    method: str
    column: str
    mean: float | None
    std: float | None
    seeds: tuple[Seed, ...]
    unfinished: tuple[str, ...]


Trace = ImageTrace | AdapterTrace | ArtifactTrace | CellTrace
