"""`fscil track`: write MLflow again from the sealed records, as the runs themselves would have.

MLflow is a view of runs/, so its database and artifacts may be deleted, moved to a server, or have missed a run that
went on without them. Everything is found by its key, so a second call adds nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import Timeout

from flows.lineage import INITIAL, RunFolder, read_record
from tasks.records import ExperimentRecord, Frozen, SessionRecord
from tasks.store import Store, read_json
from tasks.tracking import Tracker
from tasks.tracking_runs import TrackingSettings

BUSY = "nothing was written, as another process is at it: track it again when that has ended"


class Tracked(Frozen):
    """What was logged of one run: how many sessions and epochs, and how the run stands."""

    run: str
    sessions: int
    epochs: int
    status: str

    def sentence(self) -> str:
        """In words."""
        return f"{self.run}: {self.sessions} sessions, {self.epochs} epochs, {self.status}"


def track(runs: Path, state: Path, settings: TrackingSettings, keys: Sequence[str] = ()) -> Iterator[Tracked]:
    """Log runs from their records.

    Args:
        runs: results folder.
        state: state folder, which knows when each stage was sealed and who made the run.
        settings: which MLflow; its failures are raised, whatever ``strict`` says.
        keys: such as ``digits/guided/seed-0``; none means all.

    Yields:
        What was logged, run by run.

    Raises:
        ValueError: a key without a run, or no run at all.
        TrackingError: MLflow cannot be written to.
    """
    found = {folder.key: folder for folder in _folders(runs)}
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"{runs} holds no run {missing[0]}; it has {', '.join(found) or 'none'}")
    if not found:
        raise ValueError(f"{runs} holds no run; start one with: fscil dataset=digits method=guided seed=0")
    told = settings.model_copy(update={"enabled": True, "strict": True})
    for key in keys or found:
        yield _track(found[key], key, Store(state), told)


def _folders(runs: Path) -> Iterator[RunFolder]:
    return (RunFolder(file.parent) for file in sorted(runs.glob("*/*/seed-*/config.json")))


def _track(run: RunFolder, key: str, store: Store, settings: TrackingSettings) -> Tracked:
    """Log one run, unless another process does: two that look for a run of MLflow at once would make two."""
    try:
        with store.track_lock(key).acquire(timeout=0):
            return _track_alone(run, key, store, settings)
    except Timeout:
        return Tracked(run=key, sessions=0, epochs=0, status=BUSY)


def _track_alone(run: RunFolder, key: str, store: Store, settings: TrackingSettings) -> Tracked:
    tracker = Tracker(settings, store, key)
    tracker.start(
        read_json(run.root / "config.json"),
        run.provenance(store.root),
        goes_on=(run.root / "experiment.json").is_file(),
    )
    places, names = run.places(), _class_names(run)
    sessions = sorted(run.root.glob("session-*"))
    for index, folder in enumerate(sessions):
        tracker.session_start(
            index, run.drawn(index, 0) if (index, INITIAL) in places else None, folder / "initial"
        )
        for session, epoch in places:
            if session == index and epoch != INITIAL:
                tracker.epoch(run.epoch(session, epoch), run.folder(session, epoch))
        if (folder / "record.json").is_file():
            tracker.session(run.session(index), folder, names)
    return Tracked(
        run=key,
        sessions=len(sessions),
        epochs=sum(epoch != INITIAL for _, epoch in places),
        status=_end(run, tracker),
    )


def _class_names(run: RunFolder) -> tuple[str, ...]:
    """As the finished run says; before that labels stand for them."""
    if (file := run.root / "experiment.json").is_file():
        return read_record(file, ExperimentRecord).class_names
    records = [read_record(file, SessionRecord) for file in run.root.glob("session-*/record.json")]
    labels = [count.label for record in records for count in record.test.output.accuracy.counts]
    return tuple(str(label) for label in range(max(labels, default=-1) + 1))


def _end(run: RunFolder, tracker: Tracker) -> str:
    """Finished, or stopped before its end."""
    if (file := run.root / "experiment.json").is_file():
        tracker.finish(read_record(file, ExperimentRecord))
        return "finished"
    tracker.stop()
    return "stopped before its end"
