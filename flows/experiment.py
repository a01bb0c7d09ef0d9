"""One experiment: a dataset, a method and a seed, all FSCIL sessions. The flow that deployments start."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import Timeout
from prefect import flow
from prefect.runtime import flow_run

from flows.config import ExperimentConfig, differences, identity_of, load_config
from flows.garbage import note_results
from flows.interrupts import interrupts_first, raise_unheeded
from flows.progress import note, say, session_line, show_experiment, show_tracked, tag_run
from flows.ray_shards import check_ray, shards_on
from flows.session import run_session
from flows.stage_progress import stage_progress
from tasks.context import EpochContext
from tasks.datasets.benchmark import build_benchmark
from tasks.diffusion.generator import GeneratorSettings
from tasks.disk import Lock
from tasks.gpu import gpu_held
from tasks.learners.factory import check_learner
from tasks.loading import MINIATURE_CAPTIONER, backbone_digest, generator_digest, vlm_digest
from tasks.miniature.shipped import refuse_damaged
from tasks.miniature.vlm_server import serve_miniature
from tasks.progress import watched_by
from tasks.provenance import provenance
from tasks.records import (
    ArtifactRef,
    Benchmark,
    ExperimentRecord,
    Frozen,
    LoopState,
    SessionRecord,
    StageRecord,
    Usage,
)
from tasks.store import StageFolder, Store, StoreError, clear_leftovers, read_json, remove, write_json
from tasks.tracking import Tracker
from tasks.versions import RunVersions
from tasks.vlm.factory import check_vlm
from tasks.vlm.images_api import ImagesApi, ImagesApiSettings
from tasks.vlm.zero_shot import refuse_alike
from tasks.whereabouts import inside

SPLIT_VERSION = 1

WRITTEN = ("vlm", "images_api", "runs", "results", "datasets")
"""Folders of a state, beside its stages, that files are written to one by one."""

QUIET_S = 1.0
"""How long a run waits for others before it says so."""


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


class RunInProgress(RunError):
    """Another process is running it; nothing about the command is wrong."""


class Split(Frozen):
    """The benchmark, sealed: training views without a test image, and test views handed out only to seal."""

    class_names: tuple[str, ...]
    train: tuple[ArtifactRef, ...]
    test: tuple[ArtifactRef, ...]


def all_overrides(
    dataset: str, method: str, seed: int, overrides: Sequence[str] | None, models: Sequence[str] | None
) -> list[str]:
    """What a flow run's parameters say to Hydra; what ``overrides`` names wins over the others."""
    wanted = list(overrides or [])
    named = {override.partition("=")[0] for override in wanted}
    others = [*(models or []), f"dataset={dataset}", f"method={method}", f"seed={seed}"]
    return [override for override in others if override.partition("=")[0] not in named] + wanted


def _run_name() -> str:
    """``digits · guided · seed 0``."""
    given = inspect.signature(fscil.fn).bind(**flow_run.parameters)
    given.apply_defaults()
    said = dict(override.partition("=")[::2] for override in all_overrides(*given.args))
    return f"{said['dataset']} · {said['method']} · seed {said['seed']}"


@flow(name="fscil", flow_run_name=_run_name, persist_result=False)
def fscil(
    dataset: str = "digits",
    method: str = "guided",
    seed: int = 0,
    overrides: list[str] | None = None,
    models: list[str] | None = None,
) -> ExperimentRecord:
    """Run one experiment, or the rest of it.

    Args:
        dataset: a name in configs/dataset.
        method: a name in configs/method - a row of the tables.
        seed: the run's seed.
        overrides: any Hydra overrides, e.g. ``["tuning.updates=20"]``; they win over what the others say.
        models: a deployment's own overrides, e.g. ``["classifier=vit_b16", "generator=sd15"]``.

    Raises:
        ConfigError: a wrong setting.
        RunInProgress: the run is in progress elsewhere.
        RunError: its folder was written with other settings.
    """
    config = load_config(all_overrides(dataset, method, seed, overrides, models))
    tag_run(*config.tags)
    note(f"{config.run_key} begins or goes on; results in {config.runtime.runs.name}/{config.run_key}")
    with watched_by(stage_progress):
        record = run_experiment(config)
    show_experiment(record)
    return record


def preflight(config: ExperimentConfig) -> Benchmark:
    """Find what would stop the experiment, before any compute: its folder, data, weights and VLM.

    Raises:
        RunInProgress: the run is in progress elsewhere.
        RunError: its folder was written with other settings.
        ValueError: data or weights that are missing or do not fit.
        VlmError: the VLM does not answer.
    """
    store, folder = Store(config.runtime.state), config.runtime.runs / config.run_key
    with _held(store, config.run_key):
        _make_way(folder, config)
    for path in _local_weights(config):
        refuse_damaged(path)
    check_ray(config.runtime)
    config.runtime.torch_device  # noqa: B018 - raises where the device is not there
    benchmark = build_benchmark(config.dataset, cache=config.runtime.state / "datasets")
    if config.zero_shot:
        refuse_alike(benchmark.class_names)
    else:
        check_learner(config.trained, benchmark.class_names, len(benchmark.sessions))
    if config.augmenter.draws:
        generator_digest(config.drawer)
        if isinstance(config.drawer, ImagesApiSettings):
            ImagesApi(config.drawer, cache=config.runtime.state / "images_api").check()
    if config.asks_vlm and config.vlm.kind != "miniature":
        with check_vlm(config.vlm, serve_miniature):
            pass
    with _held(store, config.run_key):
        _refuse_other_inputs(folder, _inputs(config, benchmark), config.runtime.replace)
    return benchmark


def run_experiment(config: ExperimentConfig) -> ExperimentRecord:
    """Check everything that can be wrong, then run the sessions in order, skipping what is sealed."""
    benchmark = preflight(config)
    store, folder = Store(config.runtime.state), config.runtime.runs / config.run_key
    with _held(store, config.run_key):
        clear_leftovers(folder.rglob(".*.tmp"))
        clear_leftovers(folder.parent.glob(f".*{folder.name}.*.tmp"))  # of the pointer beside it
        clear_leftovers(path for name in WRITTEN for path in (store.root / name).rglob(".*.tmp"))
        note_results(store.root, config.runtime.runs)
        store.clear_scratch()
        split = seal_split(store, config, benchmark)
        with ExitStack() as stack:
            stack.enter_context(gpu_held(config.runtime, say))
            vlm_url = stack.enter_context(check_vlm(config.vlm, serve_miniature)) if config.asks_vlm else None
            origin = provenance(
                config.identity,
                data_digest=str(split.inputs["benchmark"]),
                weights=_weights(config),
                command=(Path(sys.argv[0]).name, *sys.argv[1:]),
                device=config.runtime.torch_device.type,
                threads=config.runtime.threads or torch.get_num_threads(),
            )
            write_json(folder / "inputs.json", _inputs(config, benchmark))
            write_json(folder / "config.json", config.identity)
            write_json(store.root / "runs" / config.run_key / "provenance.json", origin)
            stack.enter_context(_tracked_alone(store, config))
            tracker = stack.enter_context(Tracker.of(config.tracking, store, config.run_key))
            tracker.start(config.identity, origin)
            tracker.watch_machine()
            show_tracked(config.run_key, tracker.page())
            stack.enter_context(shards_on(config.runtime))
            versions = RunVersions(folder, origin.model_dump(mode="json"))
            sessions = _run_sessions(config, split.output, folder, vlm_url, tracker, versions)
            record = summarise(config, split.output, sessions)
            write_json(folder / "experiment.json", record)
            versions.keep()
            tracker.finish(record)
    return record


@interrupts_first()
def _run_sessions(
    config: ExperimentConfig,
    split: Split,
    folder: Path,
    vlm_url: str | None,
    tracker: Tracker,
    versions: RunVersions,
) -> list[SessionRecord]:
    state, sessions = LoopState(), []
    for index, (train_ref, test_ref) in enumerate(zip(split.train, split.test, strict=True)):
        context = EpochContext(
            run=config.run_key,
            seed=config.seed,
            session=index,
            epoch=0,
            session_ref=train_ref,
            start=state,
            class_names=split.class_names,
            n_base=config.dataset.n_base,
            dataset=config.dataset,
            runtime=config.runtime,
        )
        session_folder = folder / f"session-{index:02d}"
        with inside(f"session {index}"):
            session = run_session(
                config, index, context, test_ref, session_folder, vlm_url, tracker, versions
            )
        note(session_line(session))
        sessions.append(session)
        state = session.end
        raise_unheeded()
    return sessions


def seal_split(store: Store, config: ExperimentConfig, benchmark: Benchmark) -> StageRecord[Split]:
    """Cut the dataset into sessions and seal them, test images apart."""

    def compute(work: StageFolder) -> Split:
        train: list[ArtifactRef] = []
        test: list[ArtifactRef] = []
        for session in benchmark.sessions:
            for view, refs, name in (
                (session.model_copy(update={"test": ()}), train, "train"),
                (session.model_copy(update={"train": (), "val": ()}), test, "test"),
            ):
                file = f"session-{session.index:02d}-{name}.json"
                write_json(work.path / file, view)
                refs.append(work.ref(file, "session"))
        return Split(class_names=benchmark.class_names, train=tuple(train), test=tuple(test))

    return store.run(
        "split",
        SPLIT_VERSION,
        settings={"dataset": config.dataset.name},
        inputs={"benchmark": benchmark.digest},
        seed=0,
        output=Split,
        compute=compute,
    )


def _local_weights(config: ExperimentConfig) -> list[Path]:
    """Where on this machine the networks of the run are, as far as settings say so."""
    paths: list[str] = []
    if not config.zero_shot:
        language = getattr(config.trained, "language", None)
        named = (
            config.trained.backbone.checkpoint,
            *((language.model, language.tokenizer) if language else ()),
        )
        paths += [path for path in named if path]
    if config.augmenter.draws and isinstance(config.drawer, GeneratorSettings):
        paths.append(config.drawer.path)
    own = config.asks_vlm and config.vlm.kind == "miniature" and config.vlm.base_url is None
    return [*map(Path, paths), *([MINIATURE_CAPTIONER] if own else [])]


def _weights(config: ExperimentConfig) -> dict[str, str]:
    """Digests of the weights that the run uses; those of a VLM are known where the project ships them."""
    weights: dict[str, str] = {}
    if not config.zero_shot:
        weights["backbone"] = str(backbone_digest(config.trained.backbone))
    if config.augmenter.draws:
        weights["generator"] = str(generator_digest(config.drawer))
    if config.asks_vlm and (vlm := vlm_digest(config.vlm)) is not None:
        weights["vlm"] = str(vlm)
    return weights


def summarise(config: ExperimentConfig, split: Split, sessions: list[SessionRecord]) -> ExperimentRecord:
    """The experiment's record: all counts and the whole budget."""
    return ExperimentRecord(
        run=config.run_key,
        dataset=config.dataset.name,
        method=config.method,
        seed=config.seed,
        class_names=split.class_names,
        n_base=config.dataset.n_base,
        sessions=tuple(session.test.output.accuracy for session in sessions),
        images_drawn=sum(session.images_drawn for session in sessions),
        drawing=Usage.total(session.drawing for session in sessions),
        usage=Usage.total(session.usage for session in sessions),
        unparsed=sum(session.unparsed for session in sessions),
        epochs=sum(session.epochs for session in sessions),
    )


@contextmanager
def _held(store: Store, key: str) -> Iterator[None]:
    lock = store.run_lock(key)
    with _in_turn(store.gc_lock(), "`fscil gc` has ended"):
        try:
            lock.acquire()
        except Timeout as error:
            raise RunInProgress(
                f"{key} is already running in another process; wait for it or stop it"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _tracked_alone(store: Store, config: ExperimentConfig) -> AbstractContextManager[None]:
    """Wait for a `fscil track` of this run: two that look for a run of MLflow at once would make two."""
    return _in_turn(store.track_lock(config.run_key), f"another process has tracked {config.run_key}")


@contextmanager
def _in_turn(lock: Lock, until: str) -> Iterator[None]:
    """Hold a lock; who has to wait for longer than a moment says what for."""
    try:
        lock.acquire(timeout=QUIET_S)
    except Timeout:
        say(f"waits until {until}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make_way(folder: Path, config: ExperimentConfig) -> None:
    """See that the run's folder is empty or its own; one of other settings goes only where that was asked for."""
    path = folder / "config.json"
    if not path.is_file():
        return
    changed = differences(identity_of(read_json(path)), config.identity)
    if changed and not config.runtime.replace:
        raise RunError(
            f"{folder} was written with other settings ({'; '.join(changed)}). "
            "Move or delete that folder, set runtime.runs= to another one, or runtime.replace=true to replace it"
        )
    if changed:
        _remove_at_once(folder)


def _inputs(config: ExperimentConfig, benchmark: Benchmark) -> dict[str, str]:
    """Digests of the data and of the weights that the run computes with."""
    return {"data": str(benchmark.digest), **_weights(config)}


def _refuse_other_inputs(folder: Path, now: Mapping[str, str], replace: bool) -> None:
    """See that data and weights are those that the folder was begun with: a flipped byte in one would go unseen."""
    before, file = {}, folder / "inputs.json"
    if file.is_file():
        try:
            before = read_json(file)
        except StoreError as error:
            say(f"{error}; what the run was begun with is not known, and it is written again")
    known = before.keys() & now.keys()
    changed = differences({name: before[name] for name in known}, {name: now[name] for name in known})
    if changed and not replace:
        raise RunError(
            f"{folder} was begun with other files: digests of {'; '.join(changed)}. Put back what was damaged or "
            "changed by mistake, or give runtime.replace=true to begin anew with what is there now"
        )
    if changed:
        _remove_at_once(folder)


def _remove_at_once(folder: Path) -> None:
    """Delete a run's folder; a kill leaves either all of it or what the next start clears away, not half a run."""
    aside = folder.with_name(f".{folder.name}.replaced.tmp")
    remove(aside)
    folder.rename(aside)
    remove(aside)
