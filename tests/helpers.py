"""A run made by hand through the real store: no model, tiny images, every kind of file a real run leaves.

Three classes, ``zero`` and ``one`` (base) and ``two`` (new in session 1), two generated images a class and
two epochs a session. ``finetune`` draws nothing, ``fixed_sd`` only draws, anything else does all six stages.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from tasks.records import (
    AugmentationSet,
    AugmentedImage,
    ClassCount,
    Comparing,
    Comparison,
    Digest,
    EpochRecord,
    Evaluation,
    ExperimentRecord,
    LoopState,
    Mining,
    Prediction,
    Provenance,
    SessionAccuracy,
    SessionRecord,
    StageRecord,
    TestEvaluation,
    Training,
    Tuning,
    Usage,
    Verdict,
)
from tasks.store import StageFolder, Store, artifacts_of, export, write_json, write_lines
from tasks.tracked import STAGES

CLASSES = ("zero", "one", "two")
N_BASE = 2
TESTED = 10  # test images a class
CORRECT = ((9, 8), (8, 7, 5))  # per session and class, of TESTED
PROVENANCE = Provenance(
    git_commit="0" * 40,
    git_dirty=False,
    packages={"torch": "2"},
    config_digest="c",
    data_digest="d",
    weights_digests={"generator": "g"},
    command=("fscil", "dataset=digits"),
)

Prompt = Callable[[str, int], str]


@contextmanager
def without_sync() -> Iterator[None]:
    """Do not wait for the disk: a fabricated run need not survive a power cut."""
    real = os.fsync
    os.fsync = lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = real


def plain_prompt(name: str, epoch: int) -> str:
    """The prompt of a class at an epoch: rewritten once, after the first."""
    return f"A picture of a {name}" + (", handwritten" if epoch else "")


@dataclass
class FabricatedRun:
    """What a run leaves: records in the order they were sealed, and where their files are."""

    store: Store
    runs: Path
    run: str
    method: str
    seed: int
    prompt: Prompt
    config: dict[str, object]
    initials: list[StageRecord[AugmentationSet] | None] = field(default_factory=list)
    epochs: list[EpochRecord] = field(default_factory=list)
    sessions: list[SessionRecord] = field(default_factory=list)
    experiment: ExperimentRecord | None = None

    @property
    def folder(self) -> Path:
        return self.runs / self.run

    def session_folder(self, session: int) -> Path:
        return self.folder / f"session-{session:02d}"

    def epoch_folder(self, record: EpochRecord) -> Path:
        return self.session_folder(record.session) / f"epoch-{record.epoch:03d}"


def fabricate_run(
    root: Path,
    *,
    method: str = "guided",
    seed: int = 0,
    dataset: str = "digits",
    correct: tuple[tuple[int, ...], ...] = CORRECT,
    epochs: int = 2,
    prompt: Prompt = plain_prompt,
    sealed_sessions: int | None = None,
    seconds: float = 10.0,
    mib: float = 100.0,
) -> FabricatedRun:
    """Seal and export a run below ``root/state`` and ``root/runs``.

    Args:
        root: an empty folder, or one that holds other fabricated runs.
        method: ``finetune``, ``fixed_sd`` or any other name for all six stages.
        seed: the run's seed.
        dataset: the dataset's name.
        correct: right answers per session and class, of ten.
        epochs: epochs of each session.
        prompt: what is asked of the generator, by class name and epoch.
        sealed_sessions: stop after so many sessions, as a killed run does; None runs to the end.
        seconds: what the state says each stage took.
        mib: what the state says each stage held at most; the last one held twice as much.
    """
    name = f"{dataset}/{method}/seed-{seed}"
    learner = {"lr": 2e-4, "layers": [1, 2]}
    config = {
        "dataset": {"name": dataset}, "method": method, "seed": seed, "learner": learner, "vlm": {"base_url": None},
        "augmenter": {"base_prompt": "A picture of a {category}"},
    }  # fmt: skip
    made = FabricatedRun(Store(root / "state"), root / "runs", name, method, seed, prompt, config)
    with without_sync():
        write_json(made.folder / "config.json", config)
        _sessions(made, correct if sealed_sessions is None else correct[:sealed_sessions], epochs)
        if sealed_sessions is None:
            made.experiment = _experiment(made, dataset)
            write_json(made.folder / "experiment.json", made.experiment)
    _retime(made, seconds, mib)
    return made


def _retime(made: FabricatedRun, seconds: float, mib: float) -> None:
    sealed = [made.initials, [session.test for session in made.sessions]]
    sealed += [[getattr(epoch, stage) for epoch in made.epochs] for stage in STAGES]
    records = [record for group in sealed for record in group if record is not None]
    for n, record in enumerate(records, 1):
        path = made.store.root / "stages" / record.stage / record.fingerprint / "timing.json"
        held = 2 * mib if n == len(records) else mib
        took = {"seconds": seconds, "peak_mib": held, "gpu_peak_mib": None}
        path.write_text(json.dumps(json.loads(path.read_text()) | took))


def _sessions(made: FabricatedRun, correct: tuple[tuple[int, ...], ...], epochs: int) -> None:
    state = LoopState()
    for session, counts in enumerate(correct):
        state = _session(made, session, counts, epochs, state)


def _session(
    made: FabricatedRun, session: int, correct: tuple[int, ...], epochs: int, state: LoopState
) -> LoopState:
    folder, names = made.session_folder(session), CLASSES[: len(correct)]
    initial = None
    if made.method != "finetune":
        initial = _draw(made, session, 0, names, state)
        export(made.store, artifacts_of(initial), initial, folder / "initial")
        state = state.model_copy(update={"augmentation": initial.output})
    made.initials.append(initial)
    for epoch in range(epochs):
        record = _epoch(made, session, epoch, names, state, last=epoch == epochs - 1)
        stages = (record.train, record.evaluate, record.mine, record.compare, record.tune, record.regenerate)
        export(made.store, artifacts_of(stages), record, made.epoch_folder(record))
        made.epochs.append(record)
        state = record.next
    test = _test(made, session, correct)
    export(made.store, artifacts_of(test), test, folder / "test")
    asked = [record for record in made.epochs if record.session == session and record.compare]
    done = SessionRecord(
        run=made.run, session=session, initial=initial, epochs=epochs, converged_because="max_epochs",
        end=state, test=test, images_drawn=2 * len(names) * (epochs if initial else 0),
        usage=Usage.total([record.compare.output.usage for record in asked]),
        unparsed=sum(record.compare.output.unparsed for record in asked),
    )  # fmt: skip
    write_json(folder / "record.json", done)
    made.sessions.append(done)
    return state


def _experiment(made: FabricatedRun, dataset: str) -> ExperimentRecord:
    return ExperimentRecord(
        run=made.run, dataset=dataset, method=made.method, seed=made.seed, class_names=CLASSES, n_base=N_BASE,
        sessions=tuple(session.test.output.accuracy for session in made.sessions),
        images_drawn=sum(session.images_drawn for session in made.sessions),
        usage=Usage.total(session.usage for session in made.sessions),
        unparsed=sum(session.unparsed for session in made.sessions),
        epochs=sum(session.epochs for session in made.sessions),
    )  # fmt: skip


def _epoch(
    made: FabricatedRun, session: int, epoch: int, names: tuple[str, ...], state: LoopState, *, last: bool
) -> EpochRecord:
    record = EpochRecord(
        run=made.run, session=session, epoch=epoch, start=state,
        train=_train(made, session, epoch, names), evaluate=_evaluate(made, session, epoch, names),
    )  # fmt: skip
    if last or made.method == "finetune":
        return record
    found: dict[str, StageRecord] = {}
    if made.method != "fixed_sd":
        found = {
            "mine": _mine(made, session, epoch),
            "compare": _compare(made, session, epoch, names),
            "tune": _tune(made, session, epoch),
        }
        state = state.model_copy(update={"adapter": found["tune"].output.adapter})
    found["regenerate"] = _draw(made, session, epoch + 1, names, state)
    return record.model_copy(update=found)


def _stage(
    made: FabricatedRun, stage: str, at: tuple[int, int], output: type, compute: Callable
) -> StageRecord:
    session, place = Digest(f"{at[0]:032x}"), Digest(f"{at[0]}/{at[1]}")
    inputs: Mapping[str, Digest | None] = {
        "run": Digest(made.run), "at": place, "session": session, "generator": Digest("g"),
    }  # fmt: skip
    return made.store.run(
        stage, 1, settings={"x": 1, "vlm": {}}, inputs=inputs, seed=made.seed, output=output, compute=compute
    )


def _write(work: StageFolder, name: str, text: str) -> None:
    path = work.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _train(made: FabricatedRun, session: int, epoch: int, names: tuple[str, ...]) -> StageRecord:
    generated = 0 if made.method == "finetune" else 2 * len(names)

    def compute(work: StageFolder) -> Training:
        _write(work, "classifier/head.txt", f"{made.run} {session} {epoch}")
        ref = work.ref("classifier", "classifier")
        return Training(classifier=ref, losses=(1.0, 0.5 / (epoch + 1)), originals=5, generated=generated)

    return _stage(made, "train_classifier", (session, epoch), Training, compute)


def _evaluate(made: FabricatedRun, session: int, epoch: int, names: tuple[str, ...]) -> StageRecord:
    def compute(work: StageFolder) -> Evaluation:
        rows = [Prediction(image_id=f"v{i}", label=i, predicted=0, margin=0.5) for i in range(len(names))]
        write_lines(work.path / "predictions.jsonl", rows)
        accuracy = SessionAccuracy.of(session, N_BASE, rows)
        return Evaluation(
            predictions=work.ref("predictions.jsonl", "predictions"),
            validation=accuracy,
            augmented=SessionAccuracy.of(session, N_BASE, []),
        )

    return _stage(made, "evaluate", (session, epoch), Evaluation, compute)


def _test(made: FabricatedRun, session: int, correct: tuple[int, ...]) -> StageRecord:
    def compute(work: StageFolder) -> TestEvaluation:
        seen = len(correct)
        rows = [
            Prediction(image_id=f"t{c}-{i}", label=c, predicted=c if i < n else (c + 1) % seen, margin=0.1)
            for c, n in enumerate(correct)
            for i in range(TESTED)
        ]
        write_lines(work.path / "predictions.jsonl", rows)
        counts = tuple(ClassCount(label=c, correct=n, total=TESTED) for c, n in enumerate(correct))
        return TestEvaluation(
            predictions=work.ref("predictions.jsonl", "predictions"),
            accuracy=SessionAccuracy(session=session, n_base=N_BASE, counts=counts),
        )

    return _stage(made, "evaluate_test", (session, 0), TestEvaluation, compute)


def _mine(made: FabricatedRun, session: int, epoch: int) -> StageRecord:
    def compute(work: StageFolder) -> Mining:
        for name in ("pairs.jsonl", "triplets.jsonl", "clusters.jsonl"):
            _write(work, name, "")
        return Mining(
            pairs=work.ref("pairs.jsonl", "pairs"),
            triplets=work.ref("triplets.jsonl", "triplets"),
            clusters=work.ref("clusters.jsonl", "clusters"),
            failures={0: 2, 1: 1},
            candidates={0: 2, 1: 2},
            filtered=1,
        )

    return _stage(made, "mine_failures", (session, epoch), Mining, compute)


def _compare(made: FabricatedRun, session: int, epoch: int, names: tuple[str, ...]) -> StageRecord:
    def compute(work: StageFolder) -> Comparing:
        verdicts = [_verdict(made, epoch, label, name) for label, name in enumerate(names)]
        write_lines(work.path / "verdicts.jsonl", verdicts)
        _write(work, "transcript.jsonl", "")
        return Comparing(
            verdicts=work.ref("verdicts.jsonl", "verdicts"),
            transcript=work.ref("transcript.jsonl", "transcript"),
            semantic=len(names) - 1,
            detail=1,
            unparsed=1,
            rewritten=len(names) - 1,
            usage=Usage(calls=7, prompt_tokens=70, completion_tokens=14),
        )

    return _stage(made, "vlm_compare", (session, epoch), Comparing, compute)


def _verdict(made: FabricatedRun, epoch: int, label: int, name: str) -> Verdict:
    """Class 0 differs in detail, the others in meaning; slot 0 of a class is the judged one."""
    answer = "similar" if label == 0 else "different"
    comparison = Comparison(
        augmented_id=f"{name}-0-e{epoch}", original_id=f"v{label}", answer=answer,
        caption_augmented="a printed one", caption_original="a handwritten one",
    )  # fmt: skip
    return Verdict(
        augmented_id=f"{name}-0-e{epoch}", label=label, level="detail" if label == 0 else "semantic",
        prompt_next=made.prompt(name, epoch + 1), comparisons=(comparison,),
    )  # fmt: skip


def _tune(made: FabricatedRun, session: int, epoch: int) -> StageRecord:
    def compute(work: StageFolder) -> Tuning:
        _write(work, "adapter/weights.txt", f"{made.run} {session} {epoch}")
        series = {"loss": (3.0, 1.0), "ssim_positive": (0.25, 0.75)}
        return Tuning(adapter=work.ref("adapter", "adapter"), updates=2, series=series, steps_drawn=(1, 12))

    return _stage(made, "tune_lora", (session, epoch), Tuning, compute)


def _draw(
    made: FabricatedRun, session: int, epoch: int, names: tuple[str, ...], state: LoopState
) -> StageRecord:
    def compute(work: StageFolder) -> AugmentationSet:
        slots = [(label, name, slot) for label, name in enumerate(names) for slot in range(2)]
        rows = [_image(made, work, epoch, *place) for place in slots]
        write_lines(work.path / "manifest.jsonl", rows)
        return AugmentationSet(
            epoch=epoch,
            adapter=state.adapter.digest if state.adapter else None,
            images=work.ref("images", "images"),
            manifest=work.ref("manifest.jsonl", "manifest"),
            count=len(rows),
            batch_shape=(2, 3, 8, 8),
        )

    return _stage(made, "regenerate", (session, epoch), AugmentationSet, compute)


def _image(
    made: FabricatedRun, work: StageFolder, epoch: int, label: int, name: str, slot: int
) -> AugmentedImage:
    path = f"{name}/{slot}.png"
    target = work.path / "images" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (80 * label, 60 * epoch, 100 * slot)).save(target)
    return AugmentedImage(
        id=f"{name}-{slot}-e{epoch}", slot=f"{name}-{slot}", source_id=None, label=label,
        prompt=made.prompt(name, epoch), seed=slot, path=path, digest=Digest("x"),
        parent_id=f"{name}-{slot}-e{epoch - 1}" if epoch else None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ watching

_watching: list[list[Path]] = []


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str | os.PathLike):
        for opened in _watching:
            opened.append(Path(arguments[0]))


@cache
def _listen() -> None:
    sys.addaudithook(_note)  # there is no taking it away again


@contextmanager
def files_opened() -> Iterator[list[Path]]:
    """Every file that this process opens in the block, by whatever call; the interpreter itself tells."""
    _listen()
    opened: list[Path] = []
    _watching.append(opened)
    try:
        yield opened
    finally:
        _watching.pop()
