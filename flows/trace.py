"""Trace: from an image, an adapter, a digest or a number of a table back to what made it.

Everything is read from records; nothing is computed but sums, means and digests of the files that are shown. A path
or an image's id says which epoch to read; a digest is looked for in the text of records and manifests.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from flows.lineage import INITIAL, LineageError, RunFolder, read_record, rows_with
from flows.results import Cost
from flows.tables import COLUMNS, Statistic
from flows.trace_shape import (
    AdapterTrace,
    ArtifactTrace,
    CellTrace,
    Compared,
    Counted,
    Example,
    Failure,
    ImageTrace,
    Judged,
    Negative,
    Origin,
    Predicted,
    Seed,
    Step,
    Trace,
    Tuned,
)
from tasks.provenance import config_digest
from tasks.records import (
    ArtifactRef,
    AugmentedImage,
    Digest,
    EpochRecord,
    ExperimentRecord,
    FailurePair,
    Prediction,
    SessionRecord,
    StageRecord,
    TestEvaluation,
    Triplet,
    Tuning,
    Usage,
    Verdict,
)
from tasks.store import artifacts_of, digest_of, read_json, read_lines

_IMAGE_ID = re.compile(r"(?:(?P<run>.+/seed-\d+)[/:])?(?P<id>s(?P<session>\d+)-e(?P<epoch>\d+)-.+)")
_DIGEST = re.compile(r"[0-9a-f]{32}(\.dir)?")
_CELL = re.compile(r"(?P<dataset>[^/]+)/(?P<method>[^/]+)/(?P<column>[^/]+)")
_COLUMNS = {column.name.lower().replace(" ", "_"): column for column in COLUMNS}


class TraceError(LineageError):
    """What was asked for was not found; the message says where it was looked for."""


def trace(what: str, runs: Path, state: Path) -> Trace:
    """Trace one thing.

    Args:
        what: a file or folder of a run; an image's id, behind its run's key where several runs have it
            (``digits/guided/seed-0/s00-e001-003-0007``); a digest; or ``<dataset>/<method>/<column>``.
        runs: results folder, for what is not a path.
        state: state folder, which knows commits and packages.

    Raises:
        TraceError: there is no such thing.
        LineageError: a record on the way is missing, damaged or of another version.
    """
    path = Path(os.path.abspath(what))  # not resolved: DVC may link files to its cache
    tracer = Tracer(runs, state)
    if path.exists():
        return tracer.path(path)
    if _DIGEST.fullmatch(what):
        return tracer.digest(Digest(what))
    if (found := _IMAGE_ID.fullmatch(what)) is not None:
        return tracer.image_id(found["id"], int(found["session"]), int(found["epoch"]), found["run"])
    if (found := _CELL.fullmatch(what)) is not None:
        return tracer.cell(found["dataset"], found["method"], found["column"])
    raise TraceError(
        f"{what!r} is no file here, no digest (32 hexadecimal digits), no image id such as s00-e001-003-0007 "
        f"and no cell such as digits/guided/A_last"
    )


class Tracer:
    """Reads one results folder and one state folder."""

    def __init__(self, runs: Path, state: Path) -> None:
        """Args: runs: results folder; state: state folder of those runs; either may be missing."""
        self._runs, self._state = runs, state

    # -------------------------------------------------------------------------------------- what is asked for

    def path(self, path: Path) -> Trace:
        """A file or folder below a run. Raises TraceError if no record there speaks of it."""
        run = RunFolder.containing(path)
        inside = path.relative_to(run.root).parts
        if len(inside) < 3:
            raise TraceError(
                f"{path} is no single thing: give an image or an adapter below it, or an epoch's file"
            )
        folder, name = run.root.joinpath(*inside[:2]), "/".join(inside[2:])
        if inside[2] == "images" and len(inside) > 3:
            session, epoch = run.place(folder)
            return self._image(run, session, epoch + 1, self._row_of_path(folder, "/".join(inside[3:])))
        if inside[2] == "adapter":
            return self._adapter(run, *run.place(folder))
        for stage in _stages_in(folder):
            for ref in artifacts_of(stage.output):
                if ref.name in (name, inside[2]):
                    return self._artifact(run, folder, stage, ref)
        raise TraceError(f"the record in {folder} names no {name}")

    def image_id(self, name: str, session: int, epoch: int, run_key: str | None) -> ImageTrace:
        """An image by its id, in one run or in the only run that has it."""
        if run_key is not None:
            roots = [self._runs / run_key if (self._runs / run_key).is_dir() else Path(run_key)]
        else:
            roots = [file.parent for file in sorted(self._runs.glob("*/*/seed-*/config.json"))]
        hits = [
            (run, row)
            for run in map(RunFolder, roots)
            if (row := run.image(session, epoch, name)) is not None
        ]
        if not hits:
            where = roots[0] if run_key else f"the {len(roots)} runs below {self._runs}"
            raise TraceError(
                f"no image {name!r} among those drawn for session {session} epoch {epoch} of {where}"
            )
        if len(hits) > 1:
            raise TraceError(
                f"{len(hits)} runs have an image {name}: say which, such as "
                f"{hits[0][0].root.relative_to(self._runs).as_posix()}/{name}"
            )
        return self._image(hits[0][0], session, epoch, hits[0][1])

    def digest(self, digest: Digest) -> Trace:
        """An artifact or an image by its content; the first of those that have it, and where the others are."""
        records, hits = self._mentions("record.json", digest), []
        for file in records:
            for stage in _stages_in(file.parent):
                hits += [
                    (file.parent, stage, ref) for ref in artifacts_of(stage.output) if ref.digest == digest
                ]
        if hits:
            folder, stage, ref = hits[0]
            run, also = RunFolder.containing(folder), tuple(str(at) for at, *_ in hits[1:])
            found = (
                self._adapter(run, *run.place(folder))
                if ref.kind == "adapter"
                else self._artifact(run, *hits[0])
            )
            return found.model_copy(update={"also_in": also})
        images = [
            (file.parent, row)
            for file in self._mentions("manifest.jsonl", digest)
            for row in rows_with(file, AugmentedImage, digest)
            if row.digest == digest
        ]
        if not images:
            inputs = f"; {len(records)} records name it as an input, such as {records[0]}" if records else ""
            raise TraceError(
                f"no stage and no image below {self._runs} made content with digest {digest}{inputs}"
            )
        run = RunFolder.containing(images[0][0])
        session, epoch = run.place(images[0][0])
        also = tuple(str(folder / "images" / row.path) for folder, row in images[1:])
        return self._image(run, session, epoch + 1, images[0][1]).model_copy(update={"also_in": also})

    def cell(self, dataset: str, method: str, name: str) -> CellTrace:
        """A cell of the tables, computed again from session records."""
        if (column := _COLUMNS.get(name.lower().replace(" ", "_"))) is None:
            raise TraceError(f"no column {name!r}; the tables have {', '.join(c.name for c in COLUMNS)}")
        folder = self._runs / dataset / method
        roots = [file.parent for file in sorted(folder.glob("seed-*/config.json"))]
        if not roots:
            raise TraceError(f"no run below {folder}: no seed-<n>/config.json there")
        done = [root for root in roots if (root / "experiment.json").is_file()]
        seeds = tuple(self._seed(RunFolder(root), column.name) for root in done)
        if seeds and all(seed.value is None for seed in seeds):
            raise TraceError(f"{column.name} of {folder} stands in no record")
        found = Statistic.of([seed.value for seed in seeds if seed.value is not None])
        return CellTrace(
            dataset=dataset,
            method=method,
            column=column.name,
            mean=found.mean if found else None,
            std=found.std if found else None,
            seeds=seeds,
            unfinished=tuple(str(root) for root in roots if root not in done),
        )

    # -------------------------------------------------------------------------------------- an image

    def _image(self, run: RunFolder, session: int, epoch: int, row: AugmentedImage) -> ImageTrace:
        drawn = run.drawn(session, epoch)
        assert drawn is not None, "its manifest lies beside the record that drew it"
        folder, names = run.folder(session, epoch - 1), _class_names(run)
        adapter, first = None, self._slot(run, session, epoch, row)
        if drawn.output.adapter is not None:
            if (place := run.tuned_at(drawn.output.adapter, session, epoch - 1)) is None:
                raise LineageError(
                    f"no epoch of {run.root} before {folder} tuned adapter {drawn.output.adapter}"
                )
            adapter = self._adapter(run, *place)
        learned = _learned_from(run, session, first[0][1], names)
        return ImageTrace(
            image_id=row.id,
            run=run.key,
            session=session,
            epoch=epoch,
            folder=str(folder),
            slot=row.slot,
            label=row.label,
            class_name=names.get(row.label, row.path.split("/")[0]),
            source_id=row.source_id,
            steps=tuple(self._step(run, session, at, image, names) for at, image in first),
            first_prompt="base" if learned is None else "learned",
            learned_from=learned or (),
            generator=Digest(str(drawn.inputs["generator"])),
            session_data=_session_data(run, session),
            settings=dict(drawn.settings),
            batch_shape=drawn.output.batch_shape,
            adapter=adapter,
            origin=self._origin(run, ("augmenter", "vlm")),
            commands=_replay(folder, "regenerate"),
        )

    @staticmethod
    def _slot(
        run: RunFolder, session: int, epoch: int, row: AugmentedImage
    ) -> list[tuple[int, AugmentedImage]]:
        """The slot's images up to this one, first one first, with the epochs they were drawn for."""
        images = [(epoch, row)]
        while (parent := images[0][1].parent_id) is not None:
            at = images[0][0] - 1
            if (earlier := run.image(session, at, parent)) is None:
                raise LineageError(
                    f"{run.folder(session, at - 1)} has no row {parent}, the parent of {row.id}"
                )
            images.insert(0, (at, earlier))
        return images

    def _step(
        self, run: RunFolder, session: int, epoch: int, row: AugmentedImage, names: dict[int, str]
    ) -> Step:
        drawn, file = run.drawn(session, epoch), run.folder(session, epoch - 1) / "images" / row.path
        seen = run.folder(session, epoch)
        record = run.epoch(session, epoch) if (seen / "record.json").is_file() else None
        return Step(
            image_id=row.id,
            epoch=epoch,
            file=str(file),
            digest=row.digest,
            intact=file.is_file() and digest_of(file) == row.digest,
            prompt=row.prompt,
            seed=row.seed,
            adapter=drawn.output.adapter if drawn else None,
            predicted=_prediction(seen, record, row.id, names) if record else None,
            judged=_judged(seen, row.id) if record and record.compare else None,
        )

    @staticmethod
    def _row_of_path(folder: Path, path: str) -> AugmentedImage:
        for row in rows_with(folder / "manifest.jsonl", AugmentedImage, Path(path).stem):
            if row.path == path:
                return row
        raise TraceError(f"{folder / 'manifest.jsonl'} has no image {path}")

    # -------------------------------------------------------------------------------------- an adapter

    def _adapter(self, run: RunFolder, session: int, epoch: int) -> AdapterTrace:
        if epoch == INITIAL or (record := run.epoch(session, epoch)).tune is None:
            raise TraceError(f"{run.folder(session, epoch)} tuned no adapter")
        folder, tunings = run.folder(session, epoch), list(_tunings(run, session, epoch))
        if not tunings:
            raise TraceError(f"{folder} tuned no adapter: {record.tune.output.skipped_because}")
        mined, compared = record.mine, record.compare
        settings = {**record.tune.settings, **(mined.settings if mined else {})}
        return AdapterTrace(
            tuning=tunings[0],
            settings=settings | ({"vlm": compared.settings["vlm"]} if compared else {}),
            failures=tuple(_failures(run, folder, record)),
            before=tuple(tunings[1:]),
            origin=self._origin(run, ("augmenter",)),
            commands=_replay(folder, "tune"),
        )

    # -------------------------------------------------------------------------------------- the rest

    def _artifact(self, run: RunFolder, folder: Path, stage: StageRecord, ref: ArtifactRef) -> ArtifactTrace:
        session, place = int(folder.parent.name.removeprefix("session-")), folder.name
        return ArtifactTrace(
            what=ref.kind,
            digest=ref.digest,
            session=session,
            epoch=int(place.removeprefix("epoch-")) if place.startswith("epoch-") else None,
            folder=str(folder),
            stage=stage.stage,
            version=stage.version,
            fingerprint=stage.fingerprint,
            seed=stage.seed,
            inputs=dict(stage.inputs),
            settings=dict(stage.settings),
            origin=self._origin(run, ()),
            commands=_replay(folder, None),
        )

    def _seed(self, run: RunFolder, name: str) -> Seed:
        column = _COLUMNS[name.lower().replace(" ", "_")]
        written = read_record(run.root / "experiment.json", ExperimentRecord)
        files = [run.root / f"session-{s.session:02d}" / "record.json" for s in written.sessions]
        sessions = [read_record(file, SessionRecord) for file in files]
        value = column.value(_summed(written, sessions), Cost(seconds=None, mib=None))
        return Seed(
            seed=written.seed,
            value=value,
            agrees=value == column.value(written, Cost(seconds=None, mib=None)),
            sessions=tuple(_counted(file, one) for file, one in zip(files, sessions, strict=True)),
            origin=self._origin(run, ()),
            commands=tuple(
                f"fscil replay {run.folder(session, epoch)}"
                for session, epoch in run.places()
                if epoch != INITIAL
            ),
        )

    def _origin(self, run: RunFolder, groups: Sequence[str]) -> Origin:
        config = read_json(run.root / "config.json")
        origin = Origin(
            run=run.key,
            config_digest=config_digest(config),
            settings={name: config.get(name) for name in groups},
        )
        known = run.provenance(self._state)
        return origin if known is None else origin.model_copy(update=known.model_dump())

    def _mentions(self, name: str, text: str) -> list[Path]:
        files = sorted(self._runs.glob(f"*/*/seed-*/session-*/*/{name}"))
        return [file for file in files if text.encode() in file.read_bytes()]


# ------------------------------------------------------------------------------------------ read from one folder


def _stages_in(folder: Path) -> list[StageRecord]:
    """The stages of an epoch's, an ``initial`` or a ``test`` folder."""
    run, file = RunFolder.containing(folder), folder / "record.json"
    if folder.name == "test":
        return [read_record(file, StageRecord[TestEvaluation])]
    return run.stages(*run.place(folder))


def _class_names(run: RunFolder) -> dict[int, str]:
    """The category word of each label, as far as the run's records have them."""
    if (file := run.root / "experiment.json").is_file():
        return dict(enumerate(read_record(file, ExperimentRecord).class_names))
    names: dict[int, str] = {}
    for manifest in sorted(run.root.glob("session-*/initial/manifest.jsonl")):
        names |= {row.label: row.path.split("/")[0] for row in read_lines(manifest, AugmentedImage)}
    return names


def _session_data(run: RunFolder, session: int) -> Digest | None:
    begun = (run.folder(session, 0) / "record.json").is_file()
    return run.epoch(session, 0).train.inputs["session"] if begun else None


def _prediction(folder: Path, record: EpochRecord, name: str, names: dict[int, str]) -> Predicted | None:
    for row in rows_with(folder / "predictions.jsonl", Prediction, name):
        if row.image_id == name:
            return Predicted(
                predicted=row.predicted,
                class_name=None if row.predicted is None else names.get(row.predicted),
                correct=row.correct,
                margin=row.margin,
                classifier=record.train.output.classifier.digest,
            )
    return None


def _judged(folder: Path, name: str) -> Judged | None:
    """The verdict on an image, with the comparisons that led to it."""
    file = folder / "verdicts.jsonl"
    if (own := _verdict(file, name)) is None:
        return None
    centre = own if own.inherited_from is None else _verdict(file, own.inherited_from)
    comparisons = centre.comparisons if centre is not None else ()
    return Judged(
        level=own.level,
        prompt_next=own.prompt_next,
        target_id=own.target_id,
        inherited_from=own.inherited_from,
        comparisons=tuple(
            Compared(
                original_id=one.original_id,
                caption_original=one.caption_original,
                caption_augmented=one.caption_augmented,
                answer=one.answer,
                target=one.original_id == own.target_id,
            )
            for one in comparisons
        ),
    )


def _verdict(file: Path, name: str) -> Verdict | None:
    return next((row for row in rows_with(file, Verdict, name) if row.augmented_id == name), None)


def _learned_from(
    run: RunFolder, session: int, first: AugmentedImage, names: dict[int, str]
) -> tuple[str, ...] | None:
    """Images of the session before whose prompts this first one repeats; None where it is the base prompt."""
    augmenter = read_json(run.root / "config.json")["augmenter"]
    assert isinstance(augmenter, dict), "written from AugmenterSettings"
    own = names.get(first.label, "")
    if session == 0 or first.prompt == str(augmenter["base_prompt"]).format(category=own):
        return None
    end = run.session(session - 1).end.augmentation
    if end is None:
        return ()
    rows = read_lines(run.folder(session - 1, end.epoch - 1) / "manifest.jsonl", AugmentedImage)
    same = [row for row in rows if row.label == first.label and row.prompt == first.prompt]
    return tuple(row.id for row in same or rows if _in_words_of(row, names, own) == first.prompt)


def _in_words_of(row: AugmentedImage, names: dict[int, str], category: str) -> str:
    before, _, after = row.prompt.partition(names.get(row.label, ""))
    return f"{before}{category}{after}"


def _tunings(run: RunFolder, session: int, epoch: int) -> Iterator[Tuned]:
    """The tuning of an epoch and those that its adapter was tuned by before, latest first."""
    place: tuple[int, int] | None = (session, epoch)
    while place is not None:
        record = run.epoch(*place)
        assert record.tune is not None, "found by what it tuned"
        output, started = record.tune.output, record.start.adapter
        if output.adapter is None:
            return
        yield _tuned(run, record, record.tune, output.adapter)
        place = run.tuned_at(started.digest, *place) if started else None


def _tuned(run: RunFolder, record: EpochRecord, tune: StageRecord[Tuning], adapter: ArtifactRef) -> Tuned:
    folder = run.folder(record.session, record.epoch)
    triplets = read_lines(folder / "triplets.jsonl", Triplet)
    loss = tune.output.series.get("loss") or ()
    return Tuned(
        adapter=adapter.digest,
        session=record.session,
        epoch=record.epoch,
        folder=str(folder),
        seed=tune.seed,
        updates=tune.output.updates,
        steps_drawn=dict(sorted(Counter(tune.output.steps_drawn).items())),
        loss=(loss[0], loss[-1]) if loss else None,
        failures=len(triplets),
        negatives=len({name for triplet in triplets for name in triplet.negatives}),
        classifier=record.train.output.classifier.digest,
        generator=Digest(str(tune.inputs["generator"])),
        session_data=Digest(str(record.train.inputs["session"])),
        started_from=record.start.adapter.digest if record.start.adapter else None,
    )


def _failures(run: RunFolder, folder: Path, record: EpochRecord) -> Iterator[Failure]:
    names, pairs = _class_names(run), read_lines(folder / "pairs.jsonl", FailurePair)
    said = {row.image_id: row.predicted for row in read_lines(folder / "predictions.jsonl", Prediction)}
    verdicts = read_lines(folder / "verdicts.jsonl", Verdict) if record.compare else []
    judged = {row.augmented_id: row for row in verdicts}
    manifest = run.folder(record.session, record.epoch - 1) / "manifest.jsonl"
    prompts = {row.id: row.prompt for row in read_lines(manifest, AugmentedImage)}
    for triplet in read_lines(folder / "triplets.jsonl", Triplet):
        original, predicted = triplet.positive, said.get(triplet.positive.id)
        centres = [pair.augmented_id for pair in pairs if pair.original.id == original.id]
        yield Failure(
            original_id=original.id,
            path=original.path,
            digest=original.digest,
            label=triplet.label,
            class_name=names.get(triplet.label, str(triplet.label)),
            predicted=predicted,
            predicted_class=None if predicted is None else names.get(predicted),
            examples=tuple(_examples(original.id, centres, judged, prompts)),
            negatives=tuple(
                Negative(image_id=name, ssim=ssim)
                for name, ssim in zip(triplet.negatives, triplet.ssims, strict=True)
            ),
        )


def _examples(
    original: str, centres: Sequence[str], judged: dict[str, Verdict], prompts: dict[str, str]
) -> Iterator[Example]:
    """The centres that were tuned towards an original: a rewritten one only towards its own target."""
    for centre in centres:
        verdict = judged.get(centre)
        if verdict is None:
            yield Example(centre=centre, prompt=prompts[centre], level="semantic")
        elif verdict.target_id in (None, original):
            yield Example(centre=centre, prompt=verdict.prompt_next, level=verdict.level)


def _summed(written: ExperimentRecord, sessions: Sequence[SessionRecord]) -> ExperimentRecord:
    """The experiment's record, its counts and budget summed again from its sessions."""
    return written.model_copy(
        update={
            "sessions": tuple(session.test.output.accuracy for session in sessions),
            "images_drawn": sum(session.images_drawn for session in sessions),
            "usage": Usage.total(session.usage for session in sessions),
            "unparsed": sum(session.unparsed for session in sessions),
            "epochs": sum(session.epochs for session in sessions),
        }
    )


def _counted(file: Path, session: SessionRecord) -> Counted:
    accuracy = session.test.output.accuracy
    base = [count for count in accuracy.counts if count.label < accuracy.n_base]
    return Counted(
        session=session.session,
        correct=sum(count.correct for count in accuracy.counts),
        total=sum(count.total for count in accuracy.counts),
        base_correct=sum(count.correct for count in base),
        base_total=sum(count.total for count in base),
        record=str(file),
    )


def _replay(folder: Path, stage: str | None) -> tuple[str, ...]:
    return (f"fscil replay {folder}" + (f" --stages {stage}" if stage else ""),)
