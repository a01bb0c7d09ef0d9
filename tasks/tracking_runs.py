"""MLflow's runs by their keys: found or created, their points, tags, tables and files, each written once.

Only explicit run ids are used, no active run, so threads do not matter. MLflow is imported when first needed.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from tasks.disk import Lock
from tasks.records import Frozen
from tasks.secrets import credentials_in
from tasks.text import readable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

KEY_TAG = "fscil.key"
ERROR_TAG = "fscil.error"
TABLES_TAG = "mlflow.loggedArtifacts"
_TAG_LIMIT = 8000  # characters of a tag's value, as MLflow's databases hold them


class TrackingSettings(Frozen):
    """Where MLflow is and how much is shown there. None of it enters a fingerprint.

    Raises:
        ValueError: ``uri``, ``ui`` or ``artifacts`` holds a password or a key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    enabled: bool
    strict: bool
    uri: str
    ui: str
    experiment: str
    artifacts: str
    grid_images: int = Field(gt=0)
    grid_side: int = Field(gt=0)
    traced_calls: int = Field(ge=0)
    machine_every_s: float = Field(ge=0)

    @field_validator("uri", "ui", "artifacts")
    @classmethod
    def _no_password(cls, uri: str) -> str:
        if credentials_in(uri):
            raise ValueError(
                "an address with a password or key in it, which would be shown and kept; leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return uri

    @property
    def address(self) -> str:
        """Where a browser finds MLflow: at the server that is written to, or at the one that `make ui` starts."""
        return (self.uri if urlsplit(self.uri).scheme in ("http", "https") else self.ui).rstrip("/")


class Runs:
    """The runs of one MLflow experiment. Everything may raise what a database, a server or a disk raises."""

    def __init__(self, settings: TrackingSettings) -> None:
        """Nothing is opened before it is needed."""
        self.settings = settings

    @cached_property
    def client(self) -> "MlflowClient":
        """MLflow's own client."""
        return open_client(self.settings)

    @cached_property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment, which is created where it is missing."""
        found = self.client.get_experiment_by_name(self.settings.experiment)
        if found is not None:
            return found.experiment_id
        return self._created()

    def _created(self) -> str:
        from mlflow.exceptions import MlflowException

        remote = urlsplit(self.settings.uri).scheme in ("http", "https")
        location = None if remote else self.settings.artifacts
        try:
            return self.client.create_experiment(self.settings.experiment, artifact_location=location)
        except MlflowException:  # another machine was quicker
            found = self.client.get_experiment_by_name(self.settings.experiment)
            if found is None:
                raise
            return found.experiment_id

    def prepare(self) -> None:
        """Make the tables of a new database, and the experiment; for one at a time.

        Raises:
            HalfMadeError: a process that another program killed left a SQLite file with some of its tables.
        """
        make_database(self.settings.uri)
        try:
            assert self.experiment_id
        except Exception:
            _refuse_half_made(self.settings.uri)
            raise

    def search(self, condition: str) -> "list[Run]":
        """Runs by a filter in MLflow's language."""
        return list(self.client.search_runs([self.experiment_id], condition))

    def find_or_create(self, key: str, name: str, tags: dict[str, str]) -> "Run":
        """The run of a key; one that is made gets this name and these tags."""
        key = key.replace("'", "_").replace("`", "_")
        found = self.search(f"tags.`{KEY_TAG}` = '{key}'")
        if found:
            return found[0]
        return self.client.create_run(self.experiment_id, tags={KEY_TAG: key} | tags, run_name=name)

    def reopen(self, run: "Run") -> None:
        """Set a failed run running again; one that has finished stays so."""
        if run.info.status not in ("RUNNING", "FINISHED"):
            self.client.update_run(run.info.run_id, status="RUNNING")
        if ERROR_TAG in run.data.tags:
            self.client.delete_tag(run.info.run_id, ERROR_TAG)

    def end(self, run_id: str, status: str) -> None:
        """Give a run its status, and the time of it, unless it has that status."""
        if self.client.get_run(run_id).info.status != status:
            self.client.set_terminated(run_id, status)

    @contextmanager
    def machine(self, run_id: str) -> Iterator[None]:
        """MLflow's monitor of the machine, writing ``system/*`` to a run while the block lasts."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            run_id,
            self.settings.machine_every_s,
            resume_logging=True,
            tracking_uri=patient(self.settings.uri),
        )
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def tags(self, run_id: str) -> dict[str, str]:
        """The tags as they are now."""
        return dict(self.client.get_run(run_id).data.tags)

    def log_params(self, run: "Run", params: Mapping[str, str]) -> None:
        """Add params that are not there; one that is keeps its value, as MLflow demands."""
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for begin in range(0, len(new), 100):  # MLflow takes a hundred at a time
            self.client.log_batch(run.info.run_id, params=new[begin : begin + 100])

    def log(
        self, run_id: str, points: Iterable["Metric"] = (), tags: Mapping[str, str] | None = None
    ) -> None:
        """Write points and tags in one request."""
        from mlflow.entities import RunTag

        listed = [RunTag(key, str(value)[:_TAG_LIMIT]) for key, value in (tags or {}).items()]
        self.client.log_batch(run_id, metrics=list(points), tags=listed)

    def points(
        self, run_id: str, metrics: Mapping[str, float], step: int, timestamp: int | None
    ) -> "list[Metric]":
        """Points at a known time, which MLflow keeps once; without one, only those whose last value there is another."""
        from mlflow.entities import Metric

        if timestamp is not None:
            return [Metric(name, value, timestamp, step) for name, value in metrics.items()]
        now = int(time.time() * 1000)
        return [
            Metric(name, value, now, step)
            for name, value in metrics.items()
            if self._last(run_id, name, step) != value
        ]

    def _last(self, run_id: str, name: str, step: int) -> float | None:
        """The value of the newest point at a step."""
        there = [point for point in self.client.get_metric_history(run_id, name) if point.step == step]
        return max(there, key=lambda point: point.timestamp).value if there else None

    def log_table(self, run_id: str, name: str, table: Mapping[str, object], work: Path) -> None:
        """Log a table, and tell MLflow's UI that it is one, as far as one tag can hold. ``work`` is a folder to write in."""
        path = work / name
        path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
        self.client.log_artifact(run_id, str(path), "tables")
        known = json.loads(self.tags(run_id).get(TABLES_TAG, "[]"))
        if (entry := {"path": f"tables/{name}", "type": "table"}) not in known:
            known.append(entry)
        if len(text := json.dumps(known)) <= _TAG_LIMIT:
            self.log(run_id, tags={TABLES_TAG: text})


class HalfMadeError(OSError):
    """A SQLite file has some of MLflow's tables."""


def make_database(uri: str) -> None:
    """Make the SQLite file of an address, where it is one, with all tables or not at all.

    MLflow makes them one by one, and a file that was begun and left is of no use ever after. So they are made under
    another name: what a kill leaves there the next one removes.

    Args:
        uri: of MLflow; one that is no SQLite file, or is one that exists, is let pass.
    """
    if (file := _sqlite_file(uri)) is None or file.exists():
        return
    file = file.resolve()
    _keep_quiet()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    begun = file.with_name(
        f".{file.name}.{time.monotonic_ns()}.tmp"
    )  # MLflow keeps what it opened by a name open
    with Lock(lock := file.with_name(f".{file.name}.lock")):
        if not file.exists():
            for left in file.parent.glob(f".{file.name}.*tmp*"):
                left.unlink()
            SqlAlchemyStore(f"sqlite:///{begun}", "mlruns").engine.dispose()
            _put_in_place(begun, file)
        lock.unlink(missing_ok=True)  # who waits for it finds the file


def _put_in_place(begun: Path, file: Path) -> None:
    """Give a whole file its name, unless another program, which knows nothing of our lock, has made one meanwhile."""
    with suppress(FileExistsError):
        try:
            os.link(begun, file)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            if not file.exists():
                begun.rename(file)
    begun.unlink(missing_ok=True)


def _sqlite_file(uri: str) -> Path | None:
    from sqlalchemy.engine import make_url

    if urlsplit(uri).scheme.partition("+")[0] != "sqlite":
        return None
    name = make_url(uri).database
    return Path(name) if name and name != ":memory:" and not name.startswith("file:") else None


def _refuse_half_made(uri: str) -> None:
    if (file := _sqlite_file(uri)) is None:
        return
    with closing(sqlite3.connect(file)) as database, suppress(sqlite3.Error):
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        whole = "alembic_version" in tables and database.execute("SELECT 1 FROM alembic_version").fetchone()
        if "experiments" in tables and not whole:
            raise HalfMadeError(
                f"{file} has only some of MLflow's tables: what made them was killed or is still at it. If nothing "
                "is, remove the file; `fscil track` writes everything again from the records"
            )


def open_client(settings: TrackingSettings) -> "MlflowClient":
    """MLflow's client, told to send no usage reports, say little and not wait long for a dead server."""
    _keep_quiet()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=patient(settings.uri))


def _keep_quiet() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def patient(uri: str) -> str:
    """The same address; of a SQLite file one that waits a minute for who else writes, instead of five seconds."""
    return f"{uri}?timeout=60" if uri.startswith("sqlite:") and "?" not in uri else uri


def run_tags(settings: TrackingSettings, run_id: str) -> dict[str, str]:
    """The tags of any MLflow run: ``fscil.run`` and ``fscil.session`` say where its records are.

    Raises:
        ValueError: MLflow knows no run of this id.
    """
    client = open_client(settings)
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_run(run_id).data.tags)
    except MlflowException as error:
        raise ValueError(f"MLflow at {settings.uri} has no run {run_id!r}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, without its trace."""
    return readable((str(error).splitlines() or [""])[0], 500)
