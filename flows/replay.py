"""Replay: run any or all stages of a sealed epoch again from their records, and compare what they make.

Works from a results folder alone: no state, no key and no VLM. Each stage reads what the recorded ones before it
made (:mod:`flows.rerun`), and its files are compared bit for bit, else by how much they differ
(:mod:`flows.comparing`). Nothing is written but a scratch folder that goes away.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from pydantic import computed_field

from flows.comparing import FileDifference, compare_files, files_of, values_differ
from flows.config import ExperimentConfig, config_here, load_config
from flows.lineage import STAGES, LineageError, RunFolder
from flows.rerun import TEST, Recorded, ReplayError, Rerun, read_recorded
from flows.restore import bring_back
from tasks.diffusion.generator import GeneratorSettings
from tasks.images import UnreadableImageError
from tasks.provenance import versions
from tasks.records import ArtifactRef, Frozen, Provenance, StageRecord
from tasks.store import Store, StoreError, artifacts_of
from tasks.tracking_runs import run_tags
from tasks.vlm.transport import VlmError

REPLAY_FORMAT = 1
ALL = "all"

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_RUN_KEY = re.compile(r"[^/]+/[^/]+/seed-\d+")
_PLACE = re.compile(r"session-(\d+)/(epoch-\d+|initial|test)$")

Outcome = Literal["identical", "differs", "failed", "left out"]


class StageReport(Frozen):
    """What a stage's rerun found.

    Attributes:
        stage: its name, such as ``tune_lora``.
        outcome: ``failed`` where it could not be run, such as for want of a recorded answer; ``left out`` where
            nothing can repeat it.
        files: how many files are compared; ``identical`` of them came out bit for bit.
        differences: of the others, each file's.
        values: numbers of the record that came out otherwise.
        causes: settings, weights, versions or inputs that are not those of the record.
        note: why it failed or was left out.
    """

    stage: str
    outcome: Outcome
    files: int = 0
    identical: int = 0
    differences: tuple[FileDifference, ...] = ()
    values: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    note: str | None = None

    def headline(self) -> str:
        """One line."""
        text = f"{self.stage}: {self.outcome}"
        if self.note is not None:
            return f"{text}: {self.note}"
        text += f", {self.identical} of {self.files} files"
        shown = [d.psnr for d in self.differences if d.what == "image" and d.psnr is not None]
        return f"{text}, worst PSNR {min(shown):.1f} dB" if shown else text


class ReplayReport(Frozen):
    """What a replay found; the JSON of ``fscil replay --json``, whose shape ``format`` numbers.

    ``device`` and ``threads`` are those of the rerun: the run's own, where its provenance is at hand.
    ``stack``: packages of other versions than the run's, as ``name: then -> now``, where the state knows the run's.
    """

    format: int = REPLAY_FORMAT
    run: str
    session: int
    place: str
    folder: str
    stages: tuple[StageReport, ...]
    stack: tuple[str, ...] = ()
    device: str
    threads: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def equal(self) -> bool:
        """Whether every stage that can be repeated came out identical."""
        return all(stage.outcome in ("identical", "left out") for stage in self.stages)

    def title(self) -> str:
        """One line for all stages."""
        good = sum(stage.outcome == "identical" for stage in self.stages)
        verdict = "identical" if self.equal else "differs"
        return f"{verdict}: {good} of {len(self.stages)} stages of {self.folder}"


# ------------------------------------------------------------------------------------------ the flow


def _run_name() -> str:
    """``replay · digits/guided/seed-0 · session 1 · epoch 2``."""
    given = flow_run.parameters
    path = str(given["folder"]).rstrip("/")
    session, place = given.get("session"), given.get("epoch")
    if (named := _PLACE.search(path)) is not None:
        session, place = int(named[1]), named[2].removeprefix("epoch-")
    key = _RUN_KEY.search(path)
    where = f"epoch {int(place)}" if str(place).isdecimal() else place
    parts = ("replay", key[0] if key else path, None if session is None else f"session {session}", where)
    return " · ".join(part for part in parts if part)


@flow(name="replay", flow_run_name=_run_name, persist_result=False)
def replay(
    folder: str,
    session: int | None = None,
    epoch: int | str | None = None,
    stages: str = ALL,
    overrides: list[str] | None = None,
) -> State:
    """Run stages of an epoch again and compare; the flow run fails, as ``Differs``, where something does.

    Args:
        folder: an epoch's folder, a session's ``initial`` or ``test``, or a run: its folder, its key such as
            ``digits/guided/seed-0``, or the id of an MLflow run.
        session: of a run; an MLflow run of a session says it itself.
        epoch: of a run; ``initial`` and ``test`` are a session's first set and its sealing evaluation.
        stages: ``all`` that ran, or some, such as ``mine,compare``.
        overrides: where things are on this machine, such as ``dataset.root=...`` or ``runtime.device=cpu``.

    Returns:
        The flow run's state, with the :class:`ReplayReport`; :func:`replay_report` gives the report itself.

    Raises:
        ReplayError: nothing there that can be replayed; the message says why.
        ValueError: an unknown stage or override, data that are missing, or a record of another version.
    """
    place = locate(folder, session, epoch, overrides or ())
    recorded, config = read_recorded(place), config_here(place, overrides or ())
    origin = RunFolder.containing(place).provenance(config.runtime.state)
    config = _computed_as(origin, config)
    chosen = _chosen(recorded, stages)
    if chosen == ["regenerate"] and (why := _not_drawn_again(recorded, config)) is not None:
        raise ReplayError(why)
    with Store(config.runtime.state).scratch() as scratch:
        rerun = Rerun(recorded, config, scratch)
        reports = tuple(_replayed(rerun, recorded, config, name) for name in chosen)
    report = ReplayReport(
        run=config.run_key,
        session=recorded.session,
        place=place.resolve().name,
        folder=str(place),
        stages=reports,
        stack=() if origin is None else tuple(values_differ(origin.packages, versions())),
        device=config.runtime.torch_device.type,
        threads=torch.get_num_threads(),
    )
    rows = [{"stage": one.stage, "outcome": one.outcome, "what": one.headline()} for one in reports]
    create_table_artifact(table=rows, key="replay", description=report.title())
    if report.equal:
        return Completed(message=report.title(), data=report)
    return Failed(name="Differs", message=report.title(), data=report)


def replay_report(
    folder: str,
    session: int | None = None,
    epoch: int | str | None = None,
    stages: str = ALL,
    overrides: list[str] | None = None,
) -> ReplayReport:
    """Run the flow; its report, also where something differs. Raises as :func:`replay`."""
    state = replay(folder, session, epoch, stages, overrides, return_state=True)
    report = state.result(raise_on_failure=False)
    if isinstance(report, BaseException):
        raise report
    assert isinstance(report, ReplayReport), "what the flow's states hold"
    return report


def lines(report: ReplayReport) -> list[str]:
    """The report for people: a title, a line for each stage, and what differs."""
    shown = [report.title()]
    for stage in report.stages:
        shown.append(f"  {stage.headline()}")
        details = [*stage.causes, *(d.sentence() for d in stage.differences), *stage.values]
        shown += [f"    {' '.join(detail.split())}" for detail in details]
    if not report.equal:
        here = f"computed here on {report.device} with {report.threads} threads"
        shown.append(f"  {here}; another number or device than the run's changes last bits: runtime.threads=")
    if report.stack and not report.equal:
        shown.append(f"  other packages than the run's: {', '.join(report.stack)}")
    return shown


def _computed_as(origin: Provenance | None, config: ExperimentConfig) -> ExperimentConfig:
    """On the run's kind of device and with its number of threads, where they are known and nothing else is asked for."""
    if origin is None:
        return config
    runtime = config.runtime
    if runtime.device == "auto" and origin.device == "cpu":
        runtime = runtime.model_copy(update={"device": "cpu"})
    if runtime.threads is None and origin.threads is not None:
        runtime = runtime.model_copy(update={"threads": origin.threads})
    return config.model_copy(update={"runtime": runtime})


# ------------------------------------------------------------------------------------------ what is replayed


def locate(what: str, session: int | None, epoch: int | str | None, overrides: Sequence[str] = ()) -> Path:
    """The folder that is meant.

    Raises:
        ReplayError: no such run, or it is not said which session and epoch.
        ValueError: MLflow knows no such run.
    """
    path = Path(what)
    if _PLACE.search(path.absolute().as_posix()):
        return _fetched(path)
    if _RUN_ID.fullmatch(what) and not path.exists():
        path, said = _of_mlflow(what, overrides)
        session = said if session is None else session
    elif _RUN_KEY.fullmatch(what) and not path.exists():
        path = _here(overrides).runtime.runs / what
    if (found := re.fullmatch(r"session-(\d+)", path.name)) and path.is_dir():
        path, session = path.parent, int(found[1])
    if session is None or epoch is None:
        below = [str(file.parent) for file in sorted(path.glob("session-*/*/record.json"))]
        there = f"; there are {below[0]} to {below[-1]}" if below else ""
        raise ReplayError(
            f"{what} holds no record.json of one epoch: give the folder of an epoch, such as "
            f"runs/<dataset>/<method>/seed-<n>/session-00/epoch-000, or say --session and --epoch{there}"
        )
    if str(epoch) not in ("initial", "test") and not str(epoch).isdecimal():
        raise ReplayError(f"epoch {epoch!r} is neither a number nor initial nor test")
    name = f"epoch-{int(epoch):03d}" if str(epoch).isdecimal() else str(epoch)
    return _fetched(path / f"session-{session:02d}" / name)


def _fetched(folder: Path) -> Path:
    """The folder; where it is missing but its run was kept by DVC, the run is restored first."""
    if not folder.exists():
        bring_back(folder)
    if not (folder / "record.json").is_file():
        raise ReplayError(
            f"{folder} holds no record.json; give an epoch folder such as runs/.../session-00/epoch-000"
        )
    return folder


def _of_mlflow(run_id: str, overrides: Sequence[str]) -> tuple[Path, int | None]:
    here = _here(overrides)
    tags = run_tags(here.tracking, run_id)
    if "fscil.run" not in tags:
        raise ReplayError(f"the MLflow run {run_id} is none of this project: it has no tag fscil.run")
    run, session = tags["fscil.run"], tags.get("fscil.session", "")
    if not _RUN_KEY.fullmatch(run) or ".." in run.split("/") or (session and not session.isdecimal()):
        raise ReplayError(
            f"the MLflow run {run_id} is none of this project: its tags say run {run!r} and session {session!r}"
        )
    return here.runtime.runs / run, int(session) if session else None


def _here(overrides: Sequence[str]) -> ExperimentConfig:
    return load_config([name for name in overrides if name.startswith(("runtime", "tracking"))])


def _chosen(recorded: Recorded, stages: str) -> list[str]:
    wanted = list(recorded.stages) if stages == ALL else [name.strip() for name in stages.split(",")]
    for name in wanted:
        if name not in (*STAGES, TEST):
            raise ValueError(f"stages={stages}: {name!r} is none of {', '.join((*STAGES, TEST))}, nor {ALL}")
        if name not in recorded.stages:
            raise ReplayError(f"{recorded.folder} ran no {name}; it ran {', '.join(recorded.stages)}")
    return wanted


# ------------------------------------------------------------------------------------------ one stage


def _replayed(rerun: Rerun, recorded: Recorded, config: ExperimentConfig, name: str) -> StageReport:
    old = recorded.stages[name]
    if name == "regenerate" and (why := _not_drawn_again(recorded, config)) is not None:
        return StageReport(stage=old.stage, outcome="left out", note=why)
    causes: Sequence[str] = ()
    try:
        causes = rerun.changed_inputs(name)
        new, store = rerun.stage(name)
    except (LineageError, StoreError, UnreadableImageError, VlmError) as error:
        return StageReport(stage=old.stage, outcome="failed", note=str(error), causes=tuple(causes))
    return _compared(recorded.folder, old, new, store, causes)


def _not_drawn_again(recorded: Recorded, config: ExperimentConfig) -> str | None:
    """Why images cannot be drawn again; None where they can."""
    if isinstance(config.drawer, GeneratorSettings):
        return None
    return f"the images of {recorded.folder} come from {config.drawer.model}, which takes no seed to draw by"


def _compared(
    folder: Path, old: StageRecord, new: StageRecord, store: Store, causes: Sequence[str]
) -> StageReport:
    recorded: dict[str, Path] = {}
    replayed: dict[str, Path] = {}
    for ref in artifacts_of(old.output):
        recorded |= files_of(folder / ref.name, ref.name)
    for ref in artifacts_of(new.output):
        replayed |= files_of(store.locate(ref), ref.name)
    different = compare_files(recorded, replayed)
    values = values_differ(_plain(old.output), _plain(new.output))
    causes = [*causes, *_other_identity(old, new)]
    everything = {*recorded, *replayed}
    return StageReport(
        stage=old.stage,
        outcome="differs" if different or values or causes else "identical",
        files=len(everything),
        identical=len(everything) - len(different),
        differences=tuple(different),
        values=tuple(values),
        causes=tuple(causes),
    )


def _other_identity(old: StageRecord, new: StageRecord) -> list[str]:
    """Version, seed, settings and inputs that are not the record's; the VLM aside, whose answers are recorded."""
    names = {"version", "settings", "inputs", "seed"}
    a, b = old.model_dump(mode="json", include=names), new.model_dump(mode="json", include=names)
    for identity in (a, b):
        for part in ("settings", "inputs"):
            identity[part].pop("vlm", None)
    return values_differ(a, b)


def _plain(value: object) -> object:
    """An output as JSON, its references reduced to digests: their paths name the work, not what came of it."""
    if isinstance(value, ArtifactRef):
        return value.digest
    if isinstance(value, Frozen):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    return value
