"""Run one sealed stage again, from what its record says it read, in a scratch store of its own.

Each stage is given the recorded files of the stages before it, never what their rerun made: so a difference stays in
the stage that makes it. The scratch store holds links to those files and nothing else. The VLM answers from the
recorded transcript. The session is the one in the state, or is cut from the data again; its digest must be the
recorded one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flows.config import ExperimentConfig
from flows.experiment import Split, seal_split
from flows.lineage import INITIAL, Drawn, RunFolder, read_record, stages_by_name
from tasks.context import EpochContext
from tasks.datasets.benchmark import build_benchmark
from tasks.evaluate import evaluate, evaluate_test, evaluate_zero_shot
from tasks.loading import generator_for
from tasks.mine_failures import mine_failures
from tasks.records import (
    ArtifactRef,
    Comparing,
    Digest,
    Evaluation,
    Frozen,
    LoopState,
    Mining,
    StageRecord,
    TestEvaluation,
    Training,
    Tuning,
)
from tasks.regenerate import regenerate
from tasks.store import Store, artifacts_of, digest_of, read_json
from tasks.train_classifier import train_classifier
from tasks.tune_lora import tune_lora
from tasks.vlm.client import VlmSettings
from tasks.vlm_compare import vlm_compare

TEST = "test"

Output = TypeVar("Output", bound=Frozen)


class ReplayError(RuntimeError):
    """The folder cannot be replayed; the message says what is missing."""


# ------------------------------------------------------------------------------------------ what was recorded


@dataclass(frozen=True)
class Recorded:
    """What a results folder says of itself: an epoch, a session's ``initial`` set or its ``test``.

    ``stages`` by name, those alone that ran; ``start`` is what they started from.
    """

    folder: Path
    run: RunFolder
    session: int
    epoch: int
    start: LoopState
    stages: dict[str, StageRecord]

    def output(self, name: str, kind: type[Output]) -> Output:
        """What a stage that ran returned."""
        output = self.stages[name].output
        assert isinstance(output, kind), f"{name} returns {kind.__name__}"
        return output


def read_recorded(folder: Path) -> Recorded:
    """Read an epoch's, an ``initial`` or a ``test`` folder.

    Raises:
        ReplayError: it is none of these.
        LineageError: a record is missing or of another version.
    """
    file, folder = folder / "record.json", folder.resolve()
    if not file.is_file():
        raise ReplayError(
            f"{file.parent} holds no record.json; give an epoch folder such as runs/.../session-00/epoch-000"
        )
    run, content = RunFolder.containing(folder), read_json(file)
    if content.get("stage") == "regenerate":
        session, _ = run.place(folder)
        start = run.session(session - 1).end if session else LoopState()
        return Recorded(folder, run, session, INITIAL, start, {"regenerate": read_record(file, Drawn)})
    if "stage" in content:
        session = int(folder.parent.name.removeprefix("session-"))
        last = max((epoch for at, epoch in run.places() if at == session), default=INITIAL)
        sealed = read_record(file, StageRecord[TestEvaluation])
        return Recorded(folder, run, session, last, LoopState(), {TEST: sealed})
    session, epoch = run.place(folder)
    record = run.epoch(session, epoch)
    return Recorded(folder, run, session, epoch, record.start, stages_by_name(record))


# ------------------------------------------------------------------------------------------ the rerun


class Rerun:
    """Runs the stages of one recorded folder again."""

    def __init__(self, recorded: Recorded, config: ExperimentConfig, scratch: Path) -> None:
        """Find the session.

        Args:
            recorded: what is run again.
            config: the run's settings, with today's places; of its state only the digests of pictures are read and kept.
            scratch: an empty folder; every stage gets one of its own below it.

        Raises:
            ReplayError: the data are not those of the record.
            DatasetError: the data are not there.
        """
        self._recorded, self._config, self._scratch = recorded, config, scratch
        self._store, self._split = self._sessions()
        self._verbs: dict[str, Callable[[EpochContext], StageRecord]] = {
            "train": self._train,
            "evaluate": self._evaluate,
            "mine": self._mine,
            "compare": self._compare,
            "tune": self._tune,
            "regenerate": self._regenerate,
            TEST: self._test,
        }

    def stage(self, name: str) -> tuple[StageRecord, Store]:
        """Run a stage again.

        Returns:
            Its record now, and the store that holds its files.

        Raises:
            LineageError: a file that it reads is missing.
            StoreError, VlmError: it could not be run; a question without a recorded answer among them.
        """
        root = self._scratch / name
        context = self._context(root)
        _link(root, context.session_ref, self._store.locate(context.session_ref))
        for ref, file in self.inputs(name):
            _link(root, ref, file)
        return self._verbs[name](context), Store(root)

    def inputs(self, name: str) -> Iterator[tuple[ArtifactRef, Path]]:
        """The recorded files that a stage reads, the session aside. Raises LineageError for a missing one."""
        recorded = self._recorded
        for ref in self._read_by(name):
            yield ref, recorded.run.file_of(ref, recorded.session, recorded.epoch)

    def changed_inputs(self, name: str) -> list[str]:
        """Inputs that are not any more what the record names, in words."""
        return [
            f"input {file} has digest {found}, its record says {ref.digest}"
            for ref, file in self.inputs(name)
            if (found := digest_of(file)) != ref.digest
        ]

    def _read_by(self, name: str) -> list[ArtifactRef]:
        start, stages = self._recorded.start, self._recorded.stages
        images = list(artifacts_of(start.augmentation))
        adapter = [start.adapter] if start.adapter else []
        mined = list(artifacts_of(stages["mine"].output)) if "mine" in stages else []
        judged = list(artifacts_of(stages["compare"].output))[:1] if "compare" in stages else []
        tuned = list(artifacts_of(stages["tune"].output)) if "tune" in stages else []
        read = {
            "train": [*([start.classifier] if start.classifier else []), *images],
            "evaluate": [*self._judge(), *images],
            "mine": [*images, *self._predictions()],
            "compare": [*images, *mined, *adapter],
            "tune": [*images, *mined, *judged, *adapter],
            "regenerate": [*images, *judged, *(tuned or adapter)],
            TEST: self._judge(),
        }
        return read[name]

    # -------------------------------------------------------------------------------------- the verbs

    def _train(self, context: EpochContext) -> StageRecord:
        return train_classifier(context, self._config.trained)

    def _evaluate(self, context: EpochContext) -> StageRecord:
        classifier = self._recorded.output("train", Training).classifier
        return evaluate(context, classifier, self._config.trained)

    def _mine(self, context: EpochContext) -> StageRecord:
        predictions = self._recorded.output("evaluate", Evaluation).predictions
        return mine_failures(context, predictions, self._config.mining)

    def _compare(self, context: EpochContext) -> StageRecord:
        config, mined = self._config, self._recorded.output("mine", Mining)
        vlm = _answering(config.vlm, self._recorded.folder / "transcript.jsonl")
        return vlm_compare(context, mined, config.augmenter, vlm, config.generator, None)

    def _tune(self, context: EpochContext) -> StageRecord:
        config, mined = self._config, self._recorded.output("mine", Mining)
        return tune_lora(context, mined, self._verdicts(), config.augmenter, config.generator, config.tuning)

    def _regenerate(self, context: EpochContext) -> StageRecord:
        config, recorded, adapter = self._config, self._recorded, self._recorded.start.adapter
        if "tune" in recorded.stages:
            adapter = recorded.output("tune", Tuning).adapter or adapter
        with self._same_batch(context):
            epoch = recorded.epoch + 1
            return regenerate(context, epoch, config.augmenter, config.drawer, adapter, self._verdicts())

    def _test(self, context: EpochContext) -> StageRecord:
        config, wanted = self._config, self._recorded.stages[TEST].inputs["test"]
        ref = self._split.test[self._recorded.session]
        if ref.digest != wanted:
            raise ReplayError(self._other_data(wanted, ref.digest))
        _link(context.runtime.state, ref, self._store.locate(ref))
        if config.zero_shot:
            vlm = _answering(config.vlm, self._recorded.folder / "test-transcript.jsonl")
            return evaluate_zero_shot(context, ref, vlm, None)
        (classifier,) = self._judge()
        return evaluate_test(context, ref, classifier, config.trained)

    # -------------------------------------------------------------------------------------- what they read

    def _judge(self) -> list[ArtifactRef]:
        """The classifier that predicts: of this epoch, or for the test images of the session's last; or none."""
        recorded = self._recorded
        if "train" in recorded.stages:
            return [recorded.output("train", Training).classifier]
        if TEST in recorded.stages and not self._config.zero_shot:
            return [recorded.run.epoch(recorded.session, recorded.epoch).train.output.classifier]
        return []

    def _predictions(self) -> list[ArtifactRef]:
        stages = self._recorded.stages
        return [self._recorded.output("evaluate", Evaluation).predictions] if "evaluate" in stages else []

    def _verdicts(self) -> ArtifactRef | None:
        stages = self._recorded.stages
        return self._recorded.output("compare", Comparing).verdicts if "compare" in stages else None

    @contextmanager
    def _same_batch(self, context: EpochContext) -> Iterator[None]:
        """Draw as many images at once as the recorded set ended with, where that was fewer than asked for."""
        batch = self._recorded.stages["regenerate"].output.batch_shape[0]
        if batch == self._config.generator.batch:
            yield
            return
        generator = generator_for(context, self._config.generator, None)
        usual, generator.batch = generator.batch, batch
        try:
            yield
        finally:
            generator.batch = usual

    def _context(self, root: Path) -> EpochContext:
        config, recorded = self._config, self._recorded
        return EpochContext(
            run=config.run_key,
            seed=config.seed,
            session=recorded.session,
            epoch=max(recorded.epoch, 0),
            session_ref=self._split.train[recorded.session],
            start=recorded.start,
            class_names=self._split.class_names,
            n_base=config.dataset.n_base,
            dataset=config.dataset,
            runtime=config.runtime.model_copy(update={"state": root}),
        )

    def _sessions(self) -> tuple[Store, Split]:
        """The split of the record, cut anew: of those in a state several may have the record's session in common."""
        recorded, config = self._recorded, self._config
        wanted = next((s.inputs["session"] for s in recorded.stages.values() if "session" in s.inputs), None)
        store, cache = Store(self._scratch / "split"), config.runtime.state / "datasets"
        split = seal_split(store, config, build_benchmark(config.dataset, cache=cache)).output
        if wanted not in (None, cut := split.train[recorded.session].digest):
            raise ReplayError(self._other_data(wanted, cut))
        return store, split

    def _other_data(self, wanted: Digest | None, found: Digest) -> str:
        return (
            f"the data in {self._config.dataset.root} are not those of {self._recorded.folder}: session "
            f"{self._recorded.session} has digest {found}, its record says {wanted}; restore them, or say where they "
            f"are with dataset.root="
        )


def _answering(vlm: VlmSettings, transcript: Path) -> VlmSettings:
    """The same VLM, answering from a recording alone."""
    return vlm.model_copy(update={"kind": "cassette", "transcript": transcript})


def _link(root: Path, ref: ArtifactRef, file: Path) -> None:
    target = root / "stages" / ref.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_symlink():
        target.symlink_to(file.resolve())
