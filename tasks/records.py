"""Every type that crosses a stage: frozen, closed to unknown keys, made of references and digests.

No tensor, no clock, no host and no absolute path stands in a record, so equal work has equal bytes.
Large lists (images, predictions, verdicts) are JSON-lines files of these types, and the record holds
their :class:`ArtifactRef`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Generic, Literal, NewType, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

RECORD_FORMAT = 1

Digest = NewType("Digest", str)
"""Content id, DVC's own: md5 of a file, or md5 of a folder's listing followed by ``.dir``."""


class Frozen(BaseModel):
    """Base of all records and settings: immutable; unknown keys, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ----------------------------------------------------------------------------------------- artifacts


def _inside(path: str) -> str:
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("a path in a record is relative and stays inside of its folder")
    return path


InsidePath = Annotated[str, AfterValidator(_inside)]
"""A file's path relative to some folder, with slashes, which leads nowhere else whoever wrote the record."""

ArtifactKind = Literal[
    "session", "classifier", "predictions", "pairs", "triplets", "clusters", "verdicts", "transcript",
    "adapter", "images", "manifest",
]  # fmt: skip


class ArtifactRef(Frozen):
    """A sealed file or folder.

    ``path`` is ``<stage>/<fingerprint>/<name>``, relative to the store's stages folder.
    """

    path: Annotated[str, StringConstraints(pattern=r"^[^/]+/[^/]+/[^/]"), AfterValidator(_inside)]
    digest: Digest
    kind: ArtifactKind

    @property
    def name(self) -> str:
        """Path inside its stage folder, which is also its path inside an exported epoch folder."""
        return self.path.split("/", 2)[2]


class ImageRef(Frozen):
    """One original image. ``path`` is relative to the dataset's root; ``id`` is unique in the dataset."""

    id: str
    path: InsidePath
    digest: Digest
    label: int


# ----------------------------------------------------------------------------------------- the benchmark


class Session(Frozen):
    """One FSCIL session: which classes are new, which images train, validate and test it.

    Few-shot sessions hold no images back: with ``val_rule="leave_one_out"`` each training image is
    predicted with its own contribution to the prototype removed, and ``val`` is empty.
    ``published`` lists of well-known data sets hold some pictures twice, and the protocol keeps them: there, equal
    content of a training and a test image is no error. Not written where it is False.

    Raises:
        ValueError: an image stands in two of train, val and test (by id, path or content).
    """

    index: int = Field(ge=0)
    new_classes: tuple[int, ...]
    seen_classes: tuple[int, ...]
    train: tuple[ImageRef, ...]
    val: tuple[ImageRef, ...]
    test: tuple[ImageRef, ...]
    val_rule: Literal["holdout", "leave_one_out"]
    published: bool = Field(default=False, exclude_if=lambda published: not published)

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        for (name_a, a), (name_b, b) in (
            (("train", self.train), ("val", self.val)),
            (("train", self.train), ("test", self.test)),
            (("val", self.val), ("test", self.test)),
        ):
            told = self.published and (name_a, name_b) == ("train", "test")
            keys = ("id", "path") if told else ("id", "path", "digest")
            _refuse_overlap(self.index, keys, name_a, a, name_b, b)
        return self

    @property
    def validation(self) -> tuple[ImageRef, ...]:
        """The images whose errors may be mined: held-out ones, or the shots under leave-one-out."""
        return self.train if self.val_rule == "leave_one_out" else self.val


def _refuse_overlap(
    index: int,
    keys: tuple[str, ...],
    name_a: str,
    a: tuple[ImageRef, ...],
    name_b: str,
    b: tuple[ImageRef, ...],
) -> None:
    for key in keys:
        known = {getattr(image, key): image for image in a}
        for image in b:
            if (twin := known.get(getattr(image, key))) is not None:
                raise ValueError(
                    f"session {index}: {name_b} image {image.path!r} is also in {name_a} as {twin.path!r} "
                    f"(same {key}); remove one of the two"
                )


class Benchmark(Frozen):
    """A dataset cut into sessions. ``class_names[label]`` is the word that prompts use."""

    dataset: str
    class_names: tuple[str, ...]
    n_base: int
    n_way: int
    k_shot: int
    split_rule: str
    sessions: tuple[Session, ...]

    @property
    def digest(self) -> Digest:
        """Of every image's content, place and label, and of how they are cut."""
        text = self.model_dump_json()
        return Digest(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest())


# ----------------------------------------------------------------------------------------- what was asked for


class Usage(Frozen):
    """What a provider was asked for: logical calls of the epoch, whether answered now or from the cache.

    ``cost`` is what the answers cost when they were bought, in the currency of the prices that were set then;
    None, and not written, where no price was known.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = Field(default=None, exclude_if=lambda cost: cost is None)

    @classmethod
    def total(cls, parts: Iterable["Usage"]) -> Self:
        """The sum of several; the cost is that of the parts whose cost is known."""
        listed = tuple(parts)
        costs = [part.cost for part in listed if part.cost is not None]
        return cls(
            calls=sum(part.calls for part in listed),
            prompt_tokens=sum(part.prompt_tokens for part in listed),
            completion_tokens=sum(part.completion_tokens for part in listed),
            cost=sum(costs) if costs else None,
        )

    @property
    def tokens(self) -> int:
        """Read and written together."""
        return self.prompt_tokens + self.completion_tokens


# ----------------------------------------------------------------------------------------- generated images


class AugmentedImage(Frozen):
    """One generated image.

    ``id`` names the slot and the epoch; ``slot`` carries the prompt through the epochs; ``source_id``
    is the training image whose place it doubles, or None for replay of an earlier class; ``parent_id``
    is the same slot's image of the epoch before. ``path`` is relative to the set's images folder.
    """

    id: str
    slot: str
    source_id: str | None
    label: int
    prompt: str
    seed: int
    path: InsidePath
    digest: Digest
    parent_id: str | None


class AugmentationSet(Frozen):
    """A_k: the generated images of one epoch. ``manifest`` lists them as :class:`AugmentedImage` lines.

    ``usage`` is what a provider was asked for, where one drew them; else it is not written.
    """

    epoch: int
    adapter: Digest | None
    images: ArtifactRef
    manifest: ArtifactRef
    count: int
    batch_shape: tuple[int, ...]
    usage: Usage = Field(default=Usage(), exclude_if=lambda usage: not usage.calls)


# ----------------------------------------------------------------------------------------- predictions and accuracy


class Prediction(Frozen):
    """What the classifier said of one image. ``margin`` = logit of the label minus the best other one.

    A VLM that names classes has no margin; ``predicted`` is None where its answer named none of them.
    """

    image_id: str
    label: int
    predicted: int | None
    margin: float | None

    @property
    def correct(self) -> bool:
        """Whether the predicted class is the label."""
        return self.predicted == self.label


class ClassCount(Frozen):
    """Integer counts of one class."""

    label: int
    correct: int
    total: int


class SessionAccuracy(Frozen):
    """Counts per class after one session; every accuracy is a function of these integers (in [0, 1])."""

    session: int
    n_base: int
    counts: tuple[ClassCount, ...]

    @classmethod
    def of(cls, session: int, n_base: int, predictions: Iterable[Prediction]) -> Self:
        """Count predictions by class."""
        total: Counter[int] = Counter()
        correct: Counter[int] = Counter()
        for prediction in predictions:
            total[prediction.label] += 1
            correct[prediction.label] += prediction.correct
        counts = tuple(ClassCount(label=c, correct=correct[c], total=total[c]) for c in sorted(total))
        return cls(session=session, n_base=n_base, counts=counts)

    @property
    def overall(self) -> float:
        """A_t: correct over all test images of all classes seen (micro average)."""
        return _share(self.counts)

    @property
    def base(self) -> float:
        """Accuracy over the base classes alone, all seen classes competing."""
        return _share(c for c in self.counts if c.label < self.n_base)

    @property
    def novel(self) -> float | None:
        """Accuracy over all classes that came after the base session; None before there are any."""
        novel = [c for c in self.counts if c.label >= self.n_base]
        return _share(novel) if novel else None

    @property
    def harmonic(self) -> float | None:
        """Harmonic mean of base and novel accuracy; None before there are novel classes."""
        base, novel = self.base, self.novel
        if novel is None:
            return None
        return 2 * base * novel / (base + novel) if base + novel else 0.0


def _share(counts: Iterable[ClassCount]) -> float:
    listed = tuple(counts)
    total = sum(c.total for c in listed)
    return sum(c.correct for c in listed) / total if total else 0.0


# ----------------------------------------------------------------------------------------- mining and verdicts


class FailurePair(Frozen):
    """What the VLM looks at: an original classified wrongly and a generated image classified rightly."""

    label: int
    original: ImageRef
    augmented_id: str
    ssim: float


class Triplet(Frozen):
    """What the tuner learns from: a positive (wrong original) and its hardest negatives (right generations)."""

    label: int
    positive: ImageRef
    negatives: tuple[str, ...] = Field(max_length=8)
    ssims: tuple[float, ...]


class Cluster(Frozen):
    """A farthest-point centre and the generated images nearest to it, which inherit its verdict."""

    label: int
    centre: str
    members: tuple[str, ...]


Answer = Literal["similar", "different", "unparsed"]


class Comparison(Frozen):
    """Phi of Eq. 2 for one pair. ``unparsed`` is not a verdict; it counts as similar and is counted."""

    augmented_id: str
    original_id: str
    caption_augmented: str
    caption_original: str
    answer: Answer


Level = Literal["semantic", "detail"]


class Verdict(Frozen):
    """Eq. 1 for one generated image: semantic if any comparison says different, then with a new prompt.

    ``target_id`` is the original whose caption steered the rewriting; None where the prompt stays.
    """

    augmented_id: str
    label: int
    level: Level
    prompt_next: str
    comparisons: tuple[Comparison, ...]
    target_id: str | None = None
    inherited_from: str | None = None


# ----------------------------------------------------------------------------------------- stage outputs


class Training(Frozen):
    """Output of train_classifier. ``losses``: mean cross entropy of each pass over the data."""

    classifier: ArtifactRef
    losses: tuple[float, ...]
    originals: int
    generated: int


class Evaluation(Frozen):
    """Output of evaluate: validation and augmentation predictions. Test images are not among them."""

    predictions: ArtifactRef
    validation: SessionAccuracy
    augmented: SessionAccuracy


class TestEvaluation(Frozen):
    """Output of the sealing evaluation: counts over the test images of all classes seen.

    The last three are of a VLM that classifies: ``unparsed`` answers named no class and count as wrong.
    """

    __test__ = False  # not a pytest class

    predictions: ArtifactRef
    accuracy: SessionAccuracy
    unparsed: int = 0
    usage: Usage = Usage()
    transcript: ArtifactRef | None = None


class Mining(Frozen):
    """Output of mine_failures. ``filtered``: near-constant images left out before selection."""

    pairs: ArtifactRef
    triplets: ArtifactRef
    clusters: ArtifactRef
    failures: dict[int, int]
    candidates: dict[int, int]
    filtered: int


class Comparing(Frozen):
    """Output of vlm_compare."""

    verdicts: ArtifactRef
    transcript: ArtifactRef
    semantic: int
    detail: int
    unparsed: int
    rewritten: int
    usage: Usage


class Tuning(Frozen):
    """Output of tune_lora. Statistics by name, one value an update; ``adapter`` is None if none was tuned."""

    adapter: ArtifactRef | None
    updates: int
    series: dict[str, tuple[float, ...]]
    steps_drawn: tuple[int, ...]
    skipped_because: str | None = None


# ----------------------------------------------------------------------------------------- records

Output = TypeVar("Output", bound=Frozen)


class StageRecord(Frozen, Generic[Output]):
    """A sealed stage. Its fingerprint covers stage, version, the settings it reads, inputs and seed."""

    stage: str
    version: int
    fingerprint: str
    settings: Mapping[str, object]
    inputs: Mapping[str, Digest | None]
    seed: int
    output: Output


class LoopState(Frozen):
    """All that crosses an epoch. None stands for the pre-trained weights, the base generator, no images."""

    classifier: ArtifactRef | None = None
    adapter: ArtifactRef | None = None
    augmentation: AugmentationSet | None = None


class EpochRecord(Frozen):
    """One epoch of one session. Stages that the augmenter does not use are None."""

    format: int = RECORD_FORMAT
    run: str
    session: int
    epoch: int
    status: Literal["complete"] = "complete"
    start: LoopState
    train: StageRecord[Training]
    evaluate: StageRecord[Evaluation]
    mine: StageRecord[Mining] | None = None
    compare: StageRecord[Comparing] | None = None
    tune: StageRecord[Tuning] | None = None
    regenerate: StageRecord[AugmentationSet] | None = None

    @property
    def next(self) -> LoopState:
        """The state that the next epoch starts from."""
        adapter = self.tune.output.adapter if self.tune else None
        augmentation = self.regenerate.output if self.regenerate else self.start.augmentation
        return LoopState(
            classifier=self.train.output.classifier,
            adapter=adapter or self.start.adapter,
            augmentation=augmentation,
        )


class SessionRecord(Frozen):
    """One sealed session: its start, how many epochs it took and why it stopped, and its test counts.

    ``unparsed``: answers of the VLM in which no verdict or no class could be read. ``drawing``: what a provider
    was asked for to draw images.
    """

    format: int = RECORD_FORMAT
    run: str
    session: int
    initial: StageRecord[AugmentationSet] | None
    epochs: int
    converged_because: str
    end: LoopState
    test: StageRecord[TestEvaluation]
    images_drawn: int
    usage: Usage
    drawing: Usage = Field(default=Usage(), exclude_if=lambda usage: not usage.calls)
    unparsed: int = 0


class ExperimentRecord(Frozen):
    """One dataset, method and seed: all sessions' counts, and the whole budget."""

    format: int = RECORD_FORMAT
    run: str
    dataset: str
    method: str
    seed: int
    class_names: tuple[str, ...]
    n_base: int
    sessions: tuple[SessionAccuracy, ...]
    images_drawn: int
    usage: Usage
    drawing: Usage = Field(default=Usage(), exclude_if=lambda usage: not usage.calls)
    unparsed: int = 0
    epochs: int

    @property
    def a_base(self) -> float:
        """Accuracy after the base session, in [0, 1]."""
        return self.sessions[0].overall

    @property
    def a_last(self) -> float:
        """Accuracy over all classes after the last session, in [0, 1]."""
        return self.sessions[-1].overall

    @property
    def a_avg(self) -> float:
        """Mean accuracy over the sessions, in [0, 1]."""
        return sum(s.overall for s in self.sessions) / len(self.sessions)

    @property
    def pd(self) -> float:
        """Performance drop A_base - A_last."""
        return self.a_base - self.a_last


class Provenance(Frozen):
    """Who and what made a run. Its own file beside the record, so that equal work has equal records.

    Bits follow from ``device`` and ``threads`` too; they are None in files of before they were written.
    """

    git_commit: str | None
    git_dirty: bool | None
    packages: dict[str, str]
    config_digest: str
    data_digest: str
    weights_digests: dict[str, str]
    command: tuple[str, ...]
    device: str | None = None
    threads: int | None = None
