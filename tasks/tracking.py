"""MLflow's view of a run, written from sealed records and never the other way round.

One parent run an experiment (dataset, method, seed), one child a session, one step an epoch:

    parent   params, ``test/*`` with step = session, ``result/*`` (A_base, A_last, A_avg, PD), ``budget/*``, ``system/*``
    child    ``train/*  evaluate/*  mine/*  compare/*  tune/*  regenerate/*  seconds/*`` with step = epoch,
             ``images/class~<name>`` (a grid of A_k for each class, which the UI shows as a series),
             ``tables/prompts_epoch_<k>.json`` of A_k and ``tables/verdicts_epoch_<k>.json`` on it,
             ``adapter/epoch-<k>``, tags ``dvc.md5.e<k>.<artifact>``, ``confusion/test.png``, its training data as input
    trace    the dialogue with the VLM of each stage that asked (tasks.tracking_traces)
    model    ``fscil-<dataset>-<method>``: a version for the adapter that each session ended with, tag ``dvc.md5``

Every call may be made again, after a kill or on a finished run, and adds nothing twice: runs are found by
their ``fscil.key`` tag, points carry the time at which their stage was sealed (MLflow keeps one of two equal
points), files have names made from content, and an epoch is marked when all of it is there. Files are read
from the results folder, times from the state. What is shown is described in docs/mlflow.md.
"""

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self

from tasks.confusion import confusion_matrix, confusion_table, draw_confusion
from tasks.records import (
    AugmentationSet,
    AugmentedImage,
    Comparing,
    EpochRecord,
    ExperimentRecord,
    Prediction,
    Provenance,
    SessionRecord,
    StageRecord,
    TestEvaluation,
    Verdict,
)
from tasks.store import Store, Timing, read_lines
from tasks.tracked import (
    STAGES,
    accuracy_metrics,
    by_class,
    class_of,
    contact_sheet,
    content_id,
    digest_tags,
    distinct,
    flat,
    plain,
    prompt_table,
    provenance_tags,
    result_metrics,
    save_series,
    stage_metrics,
    verdict_table,
)
from tasks.tracking_runs import ERROR_TAG, Runs, TrackingSettings, first_line
from tasks.tracking_traces import log_dialogue

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

log = logging.getLogger("fscil.tracking")

_ADAPTER_TAG = re.compile(r"dvc\.md5\.e(\d+)\.adapter")

# ------------------------------------------------------------------------------------------ the tracker

Args = ParamSpec("Args")


def _guarded(
    call: Callable[Concatenate["Tracker", Args], None],
) -> Callable[Concatenate["Tracker", Args], None]:
    """Skip a call when tracking is off; the one place where MLflow's failures end."""

    @wraps(call)
    def guarded(self: "Tracker", *args: Args.args, **kwargs: Args.kwargs) -> None:
        if not self.usable:
            return
        try:
            call(self, *args, **kwargs)
        except Exception as error:  # whatever a database, a server or a disk may raise; nothing else is lost
            self.usable = False
            said = f"MLflow at {self.settings.uri} failed in {call.__name__} ({type(error).__name__}: {first_line(error)})"
            if self.settings.strict and call.__name__ != "fail":  # then an error is under way already
                raise TrackingError(
                    f"{said}; nothing sealed is lost: see that it is well and give the same command again, "
                    "or set tracking.strict=false, with which a run goes on without it"
                ) from error
            log.warning(
                "%s; the run goes on without it: `fscil track`, or the same command again, logs later what is missing; "
                "tracking=off says nothing of it",
                said,
            )

    return guarded


PARTING_S = 10.0
"""What MLflow is waited for, in seconds, where a run is asked to end: it may hang."""


class TrackingError(OSError):
    """MLflow failed, and the settings say that this stops the run."""


class Tracker:
    """Writes one experiment to MLflow. Switched off, every call returns at once.

    MLflow being unusable does not stop a run: the first error is one warning and tracking ends for this
    process; the same command or `fscil track` later logs what is missing. With ``settings.strict`` a
    TrackingError is raised.
    As a context manager it marks the run as failed when an error leaves the block.

    Attributes:
        run_id: MLflow's id of the parent run, None before ``start`` and when tracking is off.
        usable: whether calls still reach MLflow.
    """

    def __init__(self, settings: TrackingSettings, store: Store, run_key: str) -> None:
        """Nothing is opened before ``start``.

        Args:
            settings: where to log.
            store: whose state knows when each stage was sealed.
            run_key: dataset, method and seed.
        """
        self.settings = settings
        self.store = store
        self.run_key = run_key
        self.run_id: str | None = None
        self.usable = settings.enabled
        self._goes_on = True
        self._key = run_key
        self._classes: dict[int, str] = {}
        self._runs = Runs(settings)
        self._machine = ExitStack()

    @classmethod
    def of(cls, settings: TrackingSettings, store: Store, run_key: str) -> Self:
        """The same as the constructor."""
        return cls(settings, store, run_key)

    def __enter__(self) -> Self:
        """Nothing to open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Record an error that leaves the block; it is not swallowed."""
        parting = Thread(target=self._part, args=[error], daemon=True)
        parting.start()
        parting.join(None if error is None or isinstance(error, Exception) else PARTING_S)

    def _part(self, error: BaseException | None) -> None:
        self._machine.close()
        if error is not None:
            self.fail(error)

    @_guarded
    def start(self, config: Mapping[str, object], origin: Provenance | None, *, goes_on: bool = True) -> None:
        """Find the run of this key and these settings, or create it; set it running unless it has finished.

        Args:
            config: the settings that make the result, nested; shown as params, and their digest is part of
                the key. A param that is already there keeps its value, as MLflow demands.
            origin: who and what makes the run, where it is known; shown as tags, overwritten on every start.
            goes_on: False where it is only told again; a run or session that failed then stays so, with its error.
        """
        self._key = f"{self.run_key}@{content_id(json.dumps(config, sort_keys=True, default=str))[:12]}"
        with self.store.lock("mlflow"):  # of two that make the database's tables at once, one would fail
            self._runs.prepare()
        run = self._runs.find_or_create(self._key, self.run_key, {"fscil.run": self.run_key})
        self.run_id = run.info.run_id
        self._runs.log_params(run, flat(config))
        self._runs.log(self.run_id, tags=provenance_tags(origin) if origin else {})
        self._goes_on = goes_on
        if goes_on:
            self._runs.reopen(run)

    def page(self, session: int | None = None) -> str | None:
        """The address of the run's page in MLflow's UI, or of a session's; None where nothing of it is there."""
        if not self.usable or self.run_id is None:
            return None
        try:
            run_id = self.run_id if session is None else self._child(session).info.run_id
            return f"{self.settings.address}/#/experiments/{self._runs.experiment_id}/runs/{run_id}"
        except Exception:  # as in _guarded, where it is told; a page is not worth a word more
            return None

    @_guarded
    def watch_machine(self) -> None:
        """Log processor, memory, disk, network and GPU as ``system/*`` on the parent, until the block is left."""
        if self.settings.machine_every_s:
            self._machine.enter_context(self._runs.machine(self._parent))

    @_guarded
    def session_start(self, index: int, initial: StageRecord[AugmentationSet] | None, folder: Path) -> None:
        """Open the session's run and log A_0.

        Args:
            index: the session's number.
            initial: the sealed drawing of A_0, None without a generator.
            folder: where its images and manifest were exported.
        """
        child = self._child(index)
        if self._goes_on:
            self._runs.reopen(child)
        if initial is not None:
            self._log_set(child, initial, folder)

    @_guarded
    def epoch(self, record: EpochRecord, folder: Path) -> None:
        """Log one sealed epoch on its session's run; nothing is done if it is logged already.

        Args:
            record: the epoch.
            folder: its results folder.
        """
        child = self._child(record.session)
        mark, digest = f"fscil.logged.e{record.epoch:03d}", content_id(record.model_dump_json())
        if child.data.tags.get(mark) == digest:
            return
        self._runs.log(child.info.run_id, self._epoch_points(child, record))
        if record.epoch == 0:
            self._log_data(child, record)
        if record.compare is not None:
            verdicts = read_lines(folder / record.compare.output.verdicts.name, Verdict)
            table = verdict_table(verdicts, self._classes)
            with self.store.scratch() as work:
                name = f"verdicts_epoch_{record.epoch:03d}.json"
                self._runs.log_table(child.info.run_id, name, table, work)
            self._log_dialogue(child, record.compare, folder, f"{self.run_key} · {_place(record)} · compare")
        if record.tune is not None and (adapter := record.tune.output.adapter) is not None:
            target = f"adapter/epoch-{record.epoch:03d}"
            self._runs.client.log_artifacts(child.info.run_id, str(folder / adapter.name), target)
        if record.regenerate is not None:
            self._log_set(child, record.regenerate, folder)
        self._runs.log(child.info.run_id, tags=digest_tags(record) | {mark: digest})

    @_guarded
    def session(self, record: SessionRecord, folder: Path, class_names: Sequence[str]) -> None:
        """Log a sealed session: test accuracies on its run, and on the parent with step = session.

        Args:
            record: the session.
            folder: its results folder.
            class_names: of all classes of the benchmark.
        """
        child = self._child(record.session)
        metrics, last = accuracy_metrics(record.test.output.accuracy), max(record.epochs - 1, 0)
        ended = self._ended(record.test)
        for run_id, step in ((child.info.run_id, last), (self._parent, record.session)):
            self._runs.log(run_id, self._runs.points(run_id, metrics, step, ended))
        self._log_confusion(child, record, folder, class_names)
        self._log_dialogue(
            child, record.test, folder / "test", f"{self.run_key} · session {record.session} · test"
        )
        self._register(child, record)
        self._runs.log(child.info.run_id, tags={"fscil.converged_because": record.converged_because})
        self._runs.end(child.info.run_id, "FINISHED")

    @_guarded
    def finish(self, record: ExperimentRecord) -> None:
        """Log the experiment's summary on the parent and end it as FINISHED."""
        self._runs.log(self._parent, self._runs.points(self._parent, result_metrics(record), 0, None))
        self._runs.end(self._parent, "FINISHED")

    @_guarded
    def fail(self, error: BaseException) -> None:
        """End the parent and its open sessions as FAILED (KILLED on an interrupt), the error in a tag."""
        if self.run_id is None:
            return
        self._runs.log(self.run_id, tags={ERROR_TAG: f"{type(error).__name__}: {first_line(error)}"[:500]})
        self._stop("FAILED" if isinstance(error, Exception) else "KILLED")

    @_guarded
    def stop(self) -> None:
        """End the parent and its open sessions as KILLED, as nobody knows why it stopped; unless it failed before."""
        status = self._runs.client.get_run(self._parent).info.status
        self._stop(status if status == "FAILED" else "KILLED")

    def _stop(self, status: str) -> None:
        for child in self._runs.search(f"tags.`mlflow.parentRunId` = '{self._parent}'"):
            if child.info.status == "RUNNING":
                self._runs.end(child.info.run_id, status)
        self._runs.end(self._parent, status)

    # ---------------------------------------------------------------- runs

    @property
    def _parent(self) -> str:
        assert self.run_id is not None, "Tracker.start comes first"
        return self.run_id

    def _child(self, session: int) -> "Run":
        name = f"session-{session:02d}"
        tags = {"mlflow.parentRunId": self._parent, "fscil.run": self.run_key, "fscil.session": str(session)}
        return self._runs.find_or_create(f"{self._key}/{name}", name, tags)

    # ---------------------------------------------------------------- params, tags, points

    def _epoch_points(self, child: "Run", record: EpochRecord) -> "list[Metric]":
        points: list[Metric] = []
        metrics = stage_metrics(record)
        for stage in STAGES:
            if (sealed := getattr(record, stage)) is None:
                continue
            timing = self.store.timing(sealed)
            took = {} if timing is None else _took(stage, timing)
            ended = None if timing is None else timing.timestamp_ms
            points += self._runs.points(child.info.run_id, metrics.get(stage, {}) | took, record.epoch, ended)
        return points

    def _ended(self, record: StageRecord) -> int | None:
        timing = self.store.timing(record)
        return None if timing is None else timing.timestamp_ms

    # ---------------------------------------------------------------- files

    def _log_set(self, child: "Run", record: StageRecord[AugmentationSet], folder: Path) -> None:
        """Log a set at the epoch it was drawn for: a contact sheet for each class, and its prompts."""
        images = record.output
        rows = read_lines(folder / images.manifest.name, AugmentedImage)
        self._classes |= {row.label: class_of(row) for row in rows}
        mark = f"dvc.md5.e{images.epoch:03d}.images"
        if child.data.tags.get(mark) == images.images.digest:
            return
        stamp = self._ended(record) or self._logged_at(child, images.epoch) or int(time.time() * 1000)
        with self.store.scratch() as work:
            for name, members in by_class(rows).items():
                shown = [
                    folder / images.images.name / row.path for row in members[: self.settings.grid_images]
                ]
                sheet = contact_sheet(shown, self.settings.grid_side)
                save_series(sheet, work, f"class~{distinct(name)}", images, stamp)
            self._runs.client.log_artifacts(child.info.run_id, str(work), "images")
        with self.store.scratch() as work:
            table = f"prompts_epoch_{images.epoch:03d}.json"
            self._runs.log_table(child.info.run_id, table, prompt_table(rows), work)
        self._runs.log(child.info.run_id, tags={"mlflow.loggedImages": "True", mark: images.images.digest})

    def _log_confusion(
        self, child: "Run", record: SessionRecord, folder: Path, class_names: Sequence[str]
    ) -> None:
        """Which class was taken for which in the test, as a picture and a table."""
        tested = record.test.output
        if child.data.tags.get("dvc.md5.test.predictions") == tested.predictions.digest:
            return
        rows = read_lines(folder / "test" / tested.predictions.name, Prediction)
        counts = confusion_matrix(rows, len(class_names))
        title = f"{self.run_key}, session {record.session}: {tested.accuracy.overall:.1%} of the test right"
        with self.store.scratch() as work:
            (work / "test.png").write_bytes(draw_confusion(counts, class_names, title))
            self._runs.client.log_artifacts(child.info.run_id, str(work), "confusion")
        with self.store.scratch() as work:
            table = confusion_table(counts, class_names)
            self._runs.log_table(child.info.run_id, "confusion_test.json", table, work)
        self._runs.log(child.info.run_id, tags={"dvc.md5.test.predictions": tested.predictions.digest})

    def _register(self, child: "Run", record: SessionRecord) -> None:
        """Make the adapter that the session ended with a version of the method's model, if it tuned one."""
        from mlflow.exceptions import MlflowException

        digest = record.end.adapter.digest if record.end.adapter else None
        tags = self._runs.tags(child.info.run_id)
        tuned = [m for name, value in tags.items() if value == digest and (m := _ADAPTER_TAG.fullmatch(name))]
        if digest is None or not tuned:
            return
        model = plain("-".join(["fscil", *self.run_key.split("/")[:2]]))
        try:
            self._runs.client.get_registered_model(model)
        except MlflowException:
            try:
                self._runs.client.create_registered_model(model, description="LoRA adapters, one a session")
            except MlflowException:  # another run of the method was quicker
                self._runs.client.get_registered_model(model)
        known = self._runs.client.search_model_versions(f"name = '{model}'")
        if any(v.run_id == child.info.run_id and v.tags.get("dvc.md5") == digest for v in known):
            return
        self._runs.client.create_model_version(
            model,
            source=f"{child.info.artifact_uri}/adapter/epoch-{tuned[-1][1]}",
            run_id=child.info.run_id,
            tags={"dvc.md5": digest, "fscil.run": self.run_key, "fscil.session": str(record.session)},
        )

    def _log_dialogue(
        self,
        child: "Run",
        record: "StageRecord[Comparing] | StageRecord[TestEvaluation]",
        folder: Path,
        title: str,
    ) -> None:
        """What the stage asked the VLM, as a trace."""
        told = record.output
        if told.transcript is not None:
            outcome = told.model_dump(mode="json", include={"semantic", "detail", "rewritten", "unparsed"})
            timing = self.store.timing(record)
            log_dialogue(self._runs, child, title, folder / told.transcript.name, timing, outcome)

    def _log_data(self, child: "Run", record: EpochRecord) -> None:
        """The session's training data as an input of its run."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        digest = record.train.inputs["session"]
        dataset, number = self.run_key.split("/", 1)[0], f"session {record.session}"
        data = Dataset(f"{dataset}, {number}", str(digest)[:36], "local", json.dumps({"dataset": dataset}))
        tags = [InputTag("mlflow.data.context", "training"), InputTag("dvc.md5", str(digest))]
        self._runs.client.log_inputs(child.info.run_id, [DatasetInput(data, tags)])

    def _logged_at(self, child: "Run", epoch: int) -> int | None:
        """The time in the names of an epoch's sheets, if some are there already."""
        for file in self._runs.client.list_artifacts(child.info.run_id, "images"):
            found = re.search(r"\+step\+(\d+)\+timestamp\+(\d+)\+", file.path)
            if found and int(found[1]) == epoch:
                return int(found[2])
        return None


def _place(record: EpochRecord) -> str:
    return f"session {record.session} · epoch {record.epoch}"


def _took(stage: str, timing: Timing) -> dict[str, float]:
    """What computing a stage took, as metrics."""
    held = {"memory_mib": timing.peak_mib, "gpu_memory_mib": timing.gpu_peak_mib}
    known = {f"{name}/{stage}": mib for name, mib in held.items() if mib is not None}
    return {f"seconds/{stage}": timing.seconds, **known}
