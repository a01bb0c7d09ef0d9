"""MLflow shows what the records say, once, however often it is told."""

import errno
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from io import StringIO
from pathlib import Path
from threading import Event

import pandas
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from prefect.exceptions import TerminationSignal
from pydantic import ValidationError
from sqlalchemy import Engine, event

from tasks.store import StoreError, digest_of
from tasks.tracked import contact_sheet, flat, provenance_tags, stage_metrics, verdict_table
from tasks.tracking import Tracker, TrackingError
from tasks.tracking_runs import ERROR_TAG, HalfMadeError, Runs, TrackingSettings, make_database, run_tags
from tests.conftest import ROOT
from tests.helpers import PROVENANCE, FabricatedRun, fabricate_run


def settings_at(root: Path, **changes: object) -> TrackingSettings:
    values: dict[str, object] = {
        "enabled": True,
        "strict": True,
        "uri": f"sqlite:///{root / 'mlflow.db'}",
        "ui": "http://127.0.0.1:5000",
        "experiment": "fscil",
        "artifacts": str(root / "artifacts"),
        "grid_images": 4,
        "grid_side": 16,
        "traced_calls": 3,
        "machine_every_s": 0,
    }
    return TrackingSettings.model_validate(values | changes)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, made once: that costs seconds."""
    root = tmp_path_factory.mktemp("mlflow")
    MlflowClient(settings_at(root).uri).search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def settings(tmp_path: Path, empty_database: Path) -> TrackingSettings:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return settings_at(tmp_path)


@pytest.fixture
def made(tmp_path: Path) -> FabricatedRun:
    return fabricate_run(tmp_path)


def tell(
    settings: TrackingSettings, made: FabricatedRun, *, sessions: int = 2, finish: bool = True
) -> Tracker:
    """Do what the flows do, with a tracker of its own, as a new process has."""
    tracker = Tracker(settings, made.store, made.run)
    tracker.start(made.config, PROVENANCE)
    for done, initial in list(zip(made.sessions, made.initials, strict=True))[:sessions]:
        tracker.session_start(done.session, initial, made.session_folder(done.session) / "initial")
        for record in made.epochs:
            if record.session == done.session:
                tracker.epoch(record, made.epoch_folder(record))
        tracker.session(done, made.session_folder(done.session), made.experiment.class_names)
    if finish and made.experiment is not None:
        tracker.finish(made.experiment)
    return tracker


class Seen:
    """Everything that MLflow holds, as plain values."""

    def __init__(self, settings: TrackingSettings) -> None:
        self.client = MlflowClient(settings.uri)
        found = self.client.get_experiment_by_name(settings.experiment)
        assert found is not None
        runs = self.client.search_runs([found.experiment_id])
        self.parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        self.children = sorted(
            (run for run in runs if "mlflow.parentRunId" in run.data.tags),
            key=lambda run: run.info.run_name,
        )

    def points(self, run: Run, name: str) -> dict[int, float]:
        history = self.client.get_metric_history(run.info.run_id, name)
        assert len({point.step for point in history}) == len(history), f"{name} has two points at one step"
        return {point.step: point.value for point in history}

    def files(self, run: Run, folder: str | None = None) -> list[str]:
        found = []
        for file in self.client.list_artifacts(run.info.run_id, folder):
            found += self.files(run, file.path) if file.is_dir else [file.path]
        return sorted(found)

    def read(self, run: Run, path: str) -> str:
        return Path(self.client.download_artifacts(run.info.run_id, path)).read_text("utf-8")

    def everything(self) -> object:
        """All points with their times, all tags and files."""
        return [
            (
                run.info.run_name,
                run.info.status,
                {
                    name: [
                        (p.step, p.value, p.timestamp)
                        for p in self.client.get_metric_history(run.info.run_id, name)
                    ]
                    for name in sorted(run.data.metrics)
                },
                run.data.tags,
                run.data.params,
                self.files(run),
            )
            for run in self.parents + self.children
        ]


@pytest.fixture(scope="module")
def told(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> tuple[TrackingSettings, FabricatedRun, Seen]:
    """A whole run, told once, for the tests that only look."""
    root = tmp_path_factory.mktemp("told")
    shutil.copy(empty_database, root / "mlflow.db")
    settings, made = settings_at(root), fabricate_run(root)
    tell(settings, made)
    return settings, made, Seen(settings)


Told = tuple[TrackingSettings, FabricatedRun, Seen]


def test_parent_and_children_stand_for_experiment_and_sessions(told: Told) -> None:
    _, _, seen = told
    (parent,) = seen.parents
    assert [run.info.run_name for run in seen.children] == ["session-00", "session-01"]
    assert {run.data.tags["mlflow.parentRunId"] for run in seen.children} == {parent.info.run_id}
    assert {run.info.status for run in seen.parents + seen.children} == {"FINISHED"}
    assert seen.parents[0].data.params["learner.lr"] == "0.0002"
    assert seen.parents[0].data.tags["mlflow.source.git.commit"] == PROVENANCE.git_commit


def test_metrics_are_those_of_the_records(told: Told) -> None:
    _, _, seen = told
    parent, child = seen.parents[0], seen.children[1]
    assert seen.points(parent, "test/accuracy") == pytest.approx({0: 17 / 20, 1: 20 / 30})
    assert seen.points(parent, "test/base") == pytest.approx({0: 17 / 20, 1: 15 / 20})
    assert seen.points(parent, "test/novel") == pytest.approx({1: 0.5})
    assert seen.points(parent, "test/harmonic") == pytest.approx({1: 0.6})
    assert seen.points(parent, "result/A_avg") == pytest.approx({0: (17 / 20 + 20 / 30) / 2})
    assert seen.points(parent, "result/PD") == pytest.approx({0: 17 / 20 - 20 / 30})
    assert seen.points(parent, "budget/images_drawn") == {0: 20}
    assert seen.points(parent, "budget/vlm_calls") == {0: 14}
    assert seen.points(child, "train/loss") == {0: 0.5, 1: 0.25}
    assert seen.points(child, "evaluate/validation_accuracy") == pytest.approx({0: 1 / 3, 1: 1 / 3})
    assert seen.points(child, "mine/failures") == {0: 3}
    assert seen.points(child, "compare/semantic") == {0: 2}
    assert seen.points(child, "compare/calls") == {0: 7}
    assert seen.points(child, "tune/ssim_positive") == {0: 0.5}
    assert seen.points(child, "regenerate/images") == {0: 6}
    assert set(seen.points(child, "seconds/train")) == {0, 1}
    assert set(seen.points(child, "memory_mib/train").values()) <= {100.0, 200.0}
    assert "evaluate/augmented_accuracy" not in child.data.metrics


def test_images_make_a_series_of_each_class(told: Told) -> None:
    _, made, seen = told
    names = [path.removeprefix("images/") for path in seen.files(seen.children[0], "images")]
    assert len(names) == 2 * 2 * 2  # classes x epochs x (picture, small copy)
    assert {tuple(name.split("+")[:3]) for name in names} == {
        (f"class~{name}", "step", str(step)) for name in ("zero", "one") for step in (0, 1)
    }
    timing = made.store.timing(made.initials[0])
    assert timing is not None
    assert {name.split("+")[4] for name in names if "+step+0+" in name} == {str(timing.timestamp_ms)}


def test_tables_open_as_mlflow_tables(told: Told) -> None:
    _, _, seen = told
    child = seen.children[1]
    assert seen.files(child, "tables") == [
        "tables/confusion_test.json",
        "tables/prompts_epoch_000.json",
        "tables/prompts_epoch_001.json",
        "tables/verdicts_epoch_000.json",
    ]
    table = pandas.read_json(StringIO(seen.read(child, "tables/verdicts_epoch_000.json")), orient="split")
    assert list(table["class"]) == ["zero", "one", "two"]
    assert list(table["level"]) == ["detail", "semantic", "semantic"]
    assert table["next prompt"][2] == "A picture of a two, handwritten"
    assert table["caption of original"][2] == "a handwritten one"
    announced = json.loads(child.data.tags["mlflow.loggedArtifacts"])
    assert sorted(entry["path"] for entry in announced) == seen.files(child, "tables")


def test_the_adapter_is_an_artifact_with_dvcs_digest(told: Told) -> None:
    _, made, seen = told
    child = seen.children[0]
    assert seen.read(child, "adapter/epoch-000/weights.txt") == f"{made.run} 0 0"
    tuned = made.epochs[0].tune
    assert tuned is not None
    assert tuned.output.adapter is not None
    assert child.data.tags["dvc.md5.e000.adapter"] == tuned.output.adapter.digest
    assert child.data.tags["dvc.md5.e001.images"] == made.epochs[0].next.augmentation.images.digest  # type: ignore[union-attr]


def test_each_sessions_test_has_its_confusion_matrix(told: Told) -> None:
    _, made, seen = told
    for child, record in zip(seen.children, made.sessions, strict=True):
        assert seen.files(child, "confusion") == ["confusion/test.png"]
        table = json.loads(seen.read(child, "tables/confusion_test.json"))
        cells = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
        for count in record.test.output.accuracy.counts:
            name = made.experiment.class_names[count.label]
            assert cells[name][name] == count.correct
            assert sum(v for k, v in cells[name].items() if k != "true class") == count.total


def test_the_adapter_of_each_session_is_a_version_of_the_methods_model(told: Told) -> None:
    _, made, seen = told
    versions = sorted(
        seen.client.search_model_versions("name = 'fscil-digits-guided'"), key=lambda v: int(v.version)
    )
    assert [v.tags["fscil.session"] for v in versions] == ["0", "1"]
    for version, record, child in zip(versions, made.sessions, seen.children, strict=True):
        assert record.end.adapter is not None
        assert version.tags["dvc.md5"] == record.end.adapter.digest
        assert version.run_id == child.info.run_id
        folder = Path(version.source.removeprefix("file://"))
        assert digest_of(folder) == record.end.adapter.digest


def test_training_data_are_inputs_of_their_session(told: Told) -> None:
    for child, number in zip(told[2].children, (0, 1), strict=True):
        (given,) = child.inputs.dataset_inputs
        assert given.dataset.name == f"digits, session {number}"
        assert {tag.key: tag.value for tag in given.tags}["mlflow.data.context"] == "training"


def test_telling_it_all_again_changes_nothing(settings: TrackingSettings, made: FabricatedRun) -> None:
    tell(settings, made)
    before = Seen(settings).everything()
    tell(settings, made)
    assert Seen(settings).everything() == before


def test_results_of_other_data_take_the_place_of_the_old_ones(
    settings: TrackingSettings, made: FabricatedRun
) -> None:
    """As after runtime.replace=true, with the same settings: the same run of MLflow."""
    tell(settings, made)
    accuracy = made.experiment.sessions[-1]
    counts = tuple(count.model_copy(update={"correct": 0}) for count in accuracy.counts)
    worse = made.experiment.model_copy(
        update={"sessions": (*made.experiment.sessions[:-1], accuracy.model_copy(update={"counts": counts}))}
    )
    tracker = Tracker(settings, made.store, made.run)
    tracker.start(made.config, PROVENANCE)
    for _ in range(2):
        tracker.finish(worse)
    (run,) = Seen(settings).parents
    assert run.data.metrics["result/A_last"] == 0
    history = Seen(settings).client.get_metric_history(run.info.run_id, "result/A_last")
    assert len(history) == 2, "once each"


def test_two_runs_may_make_the_methods_model_at_once(
    settings: TrackingSettings, made: FabricatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = MlflowClient.create_registered_model

    def quicker(self: MlflowClient, name: str, **about: object) -> object:
        create(self, name)
        return create(self, name, **about)

    monkeypatch.setattr(MlflowClient, "create_registered_model", quicker)
    assert tell(settings, made).usable
    assert len(Seen(settings).client.search_model_versions()) == 2


def test_an_mlflow_that_hangs_does_not_keep_a_run_from_ending(
    settings: TrackingSettings, made: FabricatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = Event()
    monkeypatch.setattr("tasks.tracking.PARTING_S", 0.1)
    monkeypatch.setattr(Tracker, "fail", lambda *_: goes_on.wait(60))

    def interrupted() -> None:
        with Tracker.of(settings, made.store, made.run):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not goes_on.is_set()
    goes_on.set()


def test_a_kill_between_two_writes_leaves_no_doubles(settings: TrackingSettings, made: FabricatedRun) -> None:
    """The epoch's mark is written last: without it everything is written again, over itself."""
    tell(settings, made)
    before = Seen(settings)
    for child in before.children:
        for tag in list(child.data.tags):
            if tag.startswith(("fscil.logged.", "dvc.md5.", "mlflow.logged")):
                before.client.delete_tag(child.info.run_id, tag)
    tell(settings, made)
    after = Seen(settings)
    for old, new in zip(before.children, after.children, strict=True):
        assert after.files(new) == before.files(old)
        assert new.data.tags == old.data.tags
        for name in new.data.metrics:
            assert after.points(new, name) == before.points(old, name)


def test_without_timings_points_and_pictures_are_still_not_doubled(
    settings: TrackingSettings, made: FabricatedRun
) -> None:
    for path in made.store.root.rglob("timing.json"):
        path.unlink()
    test_a_kill_between_two_writes_leaves_no_doubles(settings, made)
    assert "seconds/train" not in Seen(settings).children[0].data.metrics


def test_a_run_stopped_halfway_is_taken_up_again(settings: TrackingSettings, made: FabricatedRun) -> None:
    half = tell(settings, made, sessions=1, finish=False)
    half.session_start(1, made.initials[1], made.session_folder(1) / "initial")
    half.fail(StoreError("disk is full\nsecond line"))
    seen = Seen(settings)
    assert [run.info.status for run in seen.parents + seen.children] == ["FAILED", "FINISHED", "FAILED"]
    assert seen.parents[0].data.tags[ERROR_TAG] == "StoreError: disk is full"
    whole = tell(settings, made)
    seen = Seen(settings)
    assert whole.run_id == half.run_id
    assert [run.info.status for run in seen.parents + seen.children] == ["FINISHED"] * 3
    assert ERROR_TAG not in seen.parents[0].data.tags


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), TerminationSignal(signal=signal.SIGTERM)], ids=repr)
def test_an_interrupt_that_leaves_the_block_marks_the_run(
    stop: BaseException, settings: TrackingSettings, made: FabricatedRun
) -> None:
    """While a flow runs, SIGTERM is Prefect's to raise."""

    def interrupted() -> None:
        with Tracker.of(settings, made.store, made.run) as tracker:
            tracker.start(made.config, PROVENANCE)
            raise stop

    with pytest.raises(type(stop)):
        interrupted()
    assert [run.info.status for run in Seen(settings).parents] == ["KILLED"]


def test_other_settings_are_another_run(settings: TrackingSettings, made: FabricatedRun) -> None:
    tell(settings, made)
    made.config = made.config | {"seed": 1}
    tell(settings, made, sessions=0, finish=False)
    assert len(Seen(settings).parents) == 2


def test_a_method_without_generator_has_metrics_alone(settings: TrackingSettings, tmp_path: Path) -> None:
    made = fabricate_run(tmp_path, method="finetune")
    tell(settings, made)
    seen = Seen(settings)
    assert seen.files(seen.children[0]) == ["confusion/test.png", "tables/confusion_test.json"]
    assert seen.client.search_registered_models() == []
    assert set(stage_metrics(made.epochs[0])) == {"train", "evaluate"}
    assert seen.points(seen.children[0], "test/accuracy") == {1: 0.85}


def test_off_touches_nothing(tmp_path: Path, made: FabricatedRun) -> None:
    tracker = tell(settings_at(tmp_path, enabled=False), made)
    tracker.fail(ValueError("x"))
    assert tracker.run_id is None
    assert not (tmp_path / "mlflow.db").exists()


def test_a_broken_mlflow_warns_once_and_the_run_goes_on(
    tmp_path: Path, made: FabricatedRun, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says" * 100)
    with caplog.at_level(logging.WARNING, "fscil.tracking"):
        tracker = tell(settings_at(tmp_path, strict=False), made)
    assert not tracker.usable
    assert [record.name for record in caplog.records].count("fscil.tracking") == 1
    assert "tracking=off" in caplog.text


def test_strict_raises_instead(tmp_path: Path, made: FabricatedRun) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, whatever its name says" * 100)
    with pytest.raises(TrackingError, match=r"failed in start .*not a database.*nothing sealed is lost"):
        tell(settings_at(tmp_path), made)


def test_a_password_in_the_uri_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        settings_at(tmp_path, uri="https://me:sesame@example.org")
    assert "sesame" not in str(caught.value)


def test_a_run_is_found_back_by_its_id(told: Told) -> None:
    settings, made, seen = told
    tags = run_tags(settings, seen.children[1].info.run_id)
    assert (tags["fscil.run"], tags["fscil.session"]) == (made.run, "1")
    with pytest.raises(ValueError, match="no run 'f00'"):
        run_tags(settings, "f00")


def test_sheets_keep_order_and_colour(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    paths = [tmp_path / f"{place}.png" for place in range(3)]
    for path, colour in zip(paths, colours, strict=True):
        Image.new("RGB", (4, 4), colour).save(path)
    sheet = contact_sheet(paths, 32)
    assert sheet.size == (65, 65)
    assert [sheet.getpixel(at) for at in ((0, 0), (64, 0), (0, 64), (64, 64))] == [*colours, (128, 128, 128)]


def test_settings_become_flat_params() -> None:
    assert flat({"a": {"b": 1.5, "c d/e": None}, "f": [1, "x"], "g": "text", "h": True}) == {
        "a.b": "1.5",
        "a.c d-e": "null",
        "f": '[1, "x"]',
        "g": "text",
        "h": "true",
    }


def test_unknown_provenance_is_left_out() -> None:
    tags = provenance_tags(PROVENANCE.model_copy(update={"git_commit": None, "git_dirty": None}))
    assert "mlflow.source.git.commit" not in tags
    assert "git.dirty" not in tags
    assert tags["package.torch"] == "2"


def test_a_verdict_without_comparisons_keeps_its_row() -> None:
    from tasks.records import Verdict

    verdict = Verdict(
        augmented_id="a", label=7, level="detail", prompt_next="p", comparisons=(), inherited_from="c"
    )
    assert verdict_table([verdict], {})["data"] == [["7", "a", "detail", "c", "p", "", "", ""]]


@pytest.mark.slow
def test_many_processes_may_make_the_database_at_once(tmp_path: Path) -> None:
    """Without a lock all but the first fail: the tables are there already."""
    code = (
        "import sys; from pathlib import Path; from tasks.store import Store; from tasks.tracking import Tracker;"
        "from tests.test_tracking import settings_at; root = Path(sys.argv[1]);"
        "Tracker(settings_at(root), Store(root / 'state'), f'd/m/seed-{sys.argv[2]}').start({}, None)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(n)], cwd=ROOT, stderr=subprocess.PIPE)
        for n in range(3)
    ]
    said = [process.communicate()[1].decode()[-500:] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert {run.info.run_name for run in Seen(settings_at(tmp_path)).parents} == {
        f"d/m/seed-{n}" for n in range(3)
    }


def test_a_database_whose_making_is_killed_is_made_again(tmp_path: Path) -> None:
    """With tables of the first kind, and again amid the migrations."""
    settings = settings_at(tmp_path)
    file = Path(settings.uri.removeprefix("sqlite:///"))
    code = (
        "import os, sys; from sqlalchemy import event, Engine; from tasks.tracking_runs import make_database\n"
        "left = [int(sys.argv[2])]\n"
        "@event.listens_for(Engine, 'before_cursor_execute')\n"
        "def count(*_):\n    left[0] -= 1\n    left[0] or os.kill(os.getpid(), 9)\n"
        "make_database(sys.argv[1])"
    )
    for at in (30, 200):
        process = subprocess.run([sys.executable, "-c", code, settings.uri, str(at)], cwd=ROOT)
        assert process.returncode == -signal.SIGKILL
        assert not file.exists()
    assert list(file.parent.glob(f".{file.name}.*.tmp"))
    runs = Runs(settings)
    runs.prepare()
    runs.find_or_create("key", "run", {})
    assert {path.name for path in file.parent.iterdir() if file.name in path.name} == {file.name}


def test_a_process_that_could_not_make_the_database_may_try_again(tmp_path: Path) -> None:
    """MLflow keeps the connection of its first try, to a file that is not there any more."""
    uri, left = f"sqlite:///{tmp_path}/mlflow.db", [30]

    def fails(*_: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.EIO, "input/output error")

    event.listen(Engine, "before_cursor_execute", fails)
    try:
        with pytest.raises(OSError, match="input/output"):
            make_database(uri)
        make_database(uri)
    finally:
        event.remove(Engine, "before_cursor_execute", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    Runs(settings_at(tmp_path).model_copy(update={"uri": uri})).prepare()


def test_a_database_that_another_program_makes_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own server knows nothing of our lock."""
    file = tmp_path / "mlflow.db"
    link = os.link

    def late(begun: Path, target: Path) -> None:
        target.write_text("theirs")
        link(begun, target)

    monkeypatch.setattr(os, "link", late)
    make_database(f"sqlite:///{file}")
    assert file.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_database_is_made_where_a_link_says(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "mlflow.db").symlink_to(tmp_path / "scratch" / "far.db")
    make_database(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert (tmp_path / "mlflow.db").is_symlink()
    assert (tmp_path / "scratch" / "far.db").stat().st_size > 0


def test_a_database_that_was_left_half_made_is_told_of(settings: TrackingSettings) -> None:
    file = settings.uri.removeprefix("sqlite:///")
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("DELETE FROM alembic_version")
        database.execute("DROP TABLE trace_tags")
    with pytest.raises(
        HalfMadeError, match=r"only some of MLflow's tables: .*remove the file; `fscil track`"
    ):
        Runs(settings).prepare()


def test_a_writer_waits_for_another_one(settings: TrackingSettings) -> None:
    runs = Runs(settings)
    run_id = runs.find_or_create("key", "run", {}).info.run_id
    other = sqlite3.connect(
        settings.uri.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False
    )
    other.execute("begin exclusive")
    threading.Timer(6, lambda: other.execute("commit")).start()  # longer than SQLite waits by itself
    runs.log(run_id, tags={"late": "yes"})
    assert runs.tags(run_id)["late"] == "yes"
