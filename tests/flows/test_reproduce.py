"""`dvc repro` in a clone: it builds the tables, then nothing, then only what a change concerns; a second clone replays."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from flows.__main__ import main
from flows.config import ConfigError, load_config
from flows.reproduce import choose_profile, read_profile, refuse_other_runs, settings_read, write_settings
from tasks.store import digest_of
from tests.canaries import CANARIES, holding
from tests.conftest import QUICK, ROOT, Place
from tests.storm import not_kept, processes, sealed

METHODS = ("finetune", "guided")


def run(place: Path, *command: str, fails: bool = False) -> str:
    """What a command prints, run in a clone with this environment's programs and no Prefect of its own."""
    done = subprocess.run(
        command,
        cwd=place,
        capture_output=True,
        text=True,
        env=environment_of(place),
        check=False,
        timeout=900,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment_of(place: Path) -> dict[str, str]:
    """Of a command in a clone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_API", "PYTHONPATH"))}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(place / ".fscil" / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PYTHONDONTWRITEBYTECODE": "1",
        **CANARIES,
        "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t",
    }  # fmt: skip


def set_params(place: Path, **changes: object) -> None:
    path = place / "params.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def ran(said: str) -> list[str]:
    """The stages that `dvc repro` ran, the look at the data aside, which it takes each time."""
    stages = [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]
    return [stage for stage in stages if not stage.startswith("data")]


def warm_log(place: Path) -> list[str]:
    """What the last process says that ran experiments: each writes its log anew."""
    return (place / ".fscil" / "warm.log").read_text().splitlines()


def commit(place: Path, message: str) -> None:
    run(place, "git", "add", "-A")
    run(place, "git", "commit", "--quiet", "--no-verify", "-m", message)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as git would hand it out, with quick settings."""
    place = tmp_path_factory.mktemp("clone") / "project"
    left = shutil.ignore_patterns(
        ".git", ".venv", ".fscil", "data", "runs", "runs-dev", "reports", "*_cache", "mlflow.db*", "mlartifacts",
        "mlruns", "__pycache__", "*.egg-info", "cache", "tmp", "config.local", "dvc.lock", "dvc_plots",
    )  # fmt: skip
    shutil.copytree(ROOT, place, symlinks=True, ignore=left)
    set_params(
        place, methods=list(METHODS), seeds=[0], overrides=[*QUICK, "dataset.n_sessions=1", "tracking=off"]
    )
    run(place, "git", "init", "--quiet")
    commit(place, "as it is handed out")
    return place


@pytest.fixture(scope="module")
def reproduced(clone: Path) -> Path:
    """The clone after its first `dvc repro`, which wrote every row."""
    said = run(clone, "dvc", "repro")
    assert sorted(ran(said)) == sorted(["settings", *(f"experiment@digits-{m}-0" for m in METHODS), "tables"])
    shown = said[said.index("Running stage 'experiment@digits-guided-0'") :]
    assert "session 1: test" in shown, "what one prints that was begun ahead comes under its own stage"
    return clone


def test_a_fresh_clone_builds_the_tables_and_a_second_time_does_nothing(reproduced: Path) -> None:
    table = (reproduced / "reports" / "table.md").read_text()
    assert all(f"{method} |" in table for method in METHODS)
    assert ran(run(reproduced, "dvc", "repro")) == []
    cell = json.loads((reproduced / "reports" / "cells" / "digits" / "guided" / "seed-0.json").read_text())
    assert cell["images"] > 0
    metrics = run(reproduced, "dvc", "metrics", "show", "--json")
    assert "guided" in metrics
    assert "novel" in metrics
    assert "index.html" in run(reproduced, "dvc", "plots", "show")


def test_each_run_has_a_pointer_that_dvc_agrees_with(reproduced: Path) -> None:
    pointers = sorted((reproduced / "runs").rglob("*.dvc"))
    assert [p.parent.name for p in pointers] == ["finetune", "guided"]
    for pointer in pointers:
        (out,) = yaml.safe_load(pointer.read_text())["outs"]
        assert out["md5"] == digest_of(pointer.with_suffix(""))
        assert "up to date" in run(reproduced, "dvc", "status", str(pointer))
    assert str(reproduced) not in pointers[0].read_text()


def test_a_change_runs_what_it_concerns(reproduced: Path) -> None:
    before = yaml.safe_load((reproduced / "params.yaml").read_text())
    set_params(reproduced, overrides=[*before["overrides"], "generator.steps=4"])
    said = run(reproduced, "dvc", "repro", "--dry")
    assert "experiment@digits-guided-0" not in ran(said), (
        "its settings are not known before they are composed"
    )
    run(reproduced, "dvc", "repro", "settings")
    assert "experiment@digits-guided-0" in run(reproduced, "dvc", "status")
    assert "experiment@digits-finetune-0" not in run(reproduced, "dvc", "status"), "it draws no image"
    set_params(reproduced, seeds=[0, 1], overrides=before["overrides"])
    run(reproduced, "dvc", "repro", "settings")
    said = run(reproduced, "dvc", "repro", "--dry")
    assert {s for s in ran(said) if s.startswith("experiment")} == {
        f"experiment@digits-{m}-1" for m in METHODS
    }
    set_params(reproduced, seeds=[0])
    assert ran(run(reproduced, "dvc", "repro")) in ([], ["settings"])


def test_pushed_here_restored_and_replayed_in_a_second_clone(reproduced: Path, tmp_path: Path) -> None:
    run(reproduced, "dvc", "remote", "add", "--force", "--default", "store", str(tmp_path / "remote"))
    run(reproduced, "dvc", "push", "--quiet")
    commit(reproduced, "pointers")
    second = tmp_path / "second"
    run(tmp_path, "git", "clone", "--quiet", str(reproduced), str(second))
    epoch = "runs/digits/guided/seed-0/session-01/epoch-000"
    images = digest_of(reproduced / epoch / "images")
    assert not (second / epoch).exists()
    assert "restored" in run(second, "fscil", "restore", images)
    assert digest_of(second / epoch / "images") == images
    run(second, "dvc", "pull", "--quiet", "data.dvc")
    assert len(list((second / "data" / "digits").rglob("*.png"))) == 5000
    shutil.rmtree(second / "runs" / "digits" / "guided" / "seed-0")
    said = run(second, "python", "-m", "flows", "replay", epoch)
    assert "identical: 6 of 6 stages" in said, "it restores what it needs"
    whole = "runs/digits/guided/seed-0"
    assert digest_of(second / whole) == digest_of(reproduced / whole)
    commit_of_run = run(reproduced, "git", "rev-list", "--max-parents=0", "HEAD").strip()
    image = next((second / epoch / "images").rglob("*.png")).relative_to(second)
    assert commit_of_run in run(second, "python", "-m", "flows", "trace", str(image))
    assert "no run was kept" in run(
        second, "python", "-m", "flows", "restore", "digits/fixed_sd/seed-0", fails=True
    )


def test_all_experiments_of_one_reproduction_were_forked_by_one_process(reproduced: Path) -> None:
    assert warm_log(reproduced) == ["cell digits finetune 0: 0", "cell digits guided 0: 0, begun ahead"]
    assert list((reproduced / ".fscil").glob("warm-*.sock")) == []
    assert processes(Place(reproduced)) == [], "it ended with dvc"
    for method in METHODS:
        told = json.loads(
            (reproduced / ".fscil" / "runs" / "digits" / method / "seed-0" / "provenance.json").read_text()
        )
        assert told["command"][1:] == ["cell", "digits", method, "0"]


def test_nothing_is_begun_ahead_of_a_stage_that_was_asked_for_by_name(reproduced: Path) -> None:
    set_params(reproduced, seeds=[0, 8])
    try:
        assert ran(run(reproduced, "dvc", "repro", "experiment@digits-finetune-8")) == [
            "experiment@digits-finetune-8"
        ]
        assert warm_log(reproduced) == ["cell digits finetune 8: 0"]
    finally:
        set_params(reproduced, seeds=[0])
    assert set(ran(run(reproduced, "dvc", "repro"))) <= {"settings", "tables"}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "seed"), [(signal.SIGINT, 7), (signal.SIGTERM, 9), (signal.SIGKILL, 10)])
def test_a_reproduction_that_is_stopped_leaves_no_process_and_computes_nothing_twice(
    reproduced: Path, number: signal.Signals, seed: int
) -> None:
    state = reproduced / ".fscil"
    before = sealed(state)
    set_params(reproduced, seeds=[0, seed])
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=reproduced,
        env=environment_of(reproduced),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while sealed(state) == before or not list(state.glob("stages/*/*.partial")):
            assert process.poll() is None, "it ended before it had sealed anything"
            time.sleep(0.01)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(60) != 0
        assert processes(Place(reproduced), 60) == [], "its experiments end in order, then their server"
        kept = sealed(state)
        assert f"experiment@digits-{METHODS[-1]}-{seed}" in ran(run(reproduced, "dvc", "repro"))
        assert kept.items() <= sealed(state).items()
    finally:
        set_params(reproduced, seeds=[0])
    assert set(ran(run(reproduced, "dvc", "repro"))) <= {"settings", "tables"}


def test_no_planted_key_is_left_by_what_the_warm_process_ran(reproduced: Path) -> None:
    assert warm_log(reproduced)
    assert list(holding(reproduced)) == []


def test_what_nothing_names_is_shown_before_it_goes(reproduced: Path) -> None:
    collect = ("python", "-m", "flows", "gc", "--days", "0")
    run(reproduced, *collect, "--delete")
    left = reproduced / ".fscil" / "stages" / "evaluate" / ("0" * 64 + ".partial")
    orphan = reproduced / ".dvc" / "cache" / "files" / "md5" / "00" / ("0" * 30)
    stages = sorted((reproduced / ".fscil" / "stages").glob("*/*"))
    left.mkdir()
    (left / "half").write_text("x")
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_text("x")
    said = run(reproduced, *collect)
    assert str(left.relative_to(reproduced)) in said
    assert "1 sealed stages or leftovers" in said
    assert "1 objects of DVC's cache that no pointer, commit or experiment names" in said
    assert "nothing was deleted" in said
    assert left.exists()
    assert orphan.exists()
    run(reproduced, *collect, "--delete")
    assert sorted((reproduced / ".fscil" / "stages").glob("*/*")) == stages
    assert not orphan.exists()
    pointers = [*(reproduced / "runs").rglob("*.dvc"), reproduced / "data.dvc"]
    assert [fault for pointer in pointers for fault in not_kept(pointer.with_suffix(""))] == []
    assert ran(run(reproduced, "dvc", "repro")) == []


# ------------------------------------------------------------------------------------------ without DVC


def read_by(*overrides: str) -> dict[str, object]:
    return dict(settings_read(load_config(["dataset=digits", *overrides])))


@pytest.mark.slow
def test_a_change_that_is_taken_back_leaves_the_runs_that_the_tables_show(reproduced: Path) -> None:
    """DVC could bring back the summary alone."""
    before = yaml.safe_load((reproduced / "params.yaml").read_text())
    table = (reproduced / "reports" / "table.csv").read_bytes()
    config = reproduced / "runs" / "digits" / "finetune" / "seed-0" / "config.json"
    set_params(reproduced, methods=["finetune"], overrides=[*before["overrides"], "learner.temperature=8"])
    run(reproduced, "dvc", "repro")
    assert json.loads(config.read_text())["learner"]["temperature"] == 8
    assert (reproduced / "reports" / "table.csv").read_bytes() != table
    set_params(reproduced, **before)
    assert "experiment@digits-finetune-0" in ran(run(reproduced, "dvc", "repro"))
    assert json.loads(config.read_text())["learner"]["temperature"] != 8
    assert (reproduced / "reports" / "table.csv").read_bytes() == table


@pytest.mark.slow
def test_the_figures_of_a_variation_stand_beside_those_of_the_commit(reproduced: Path) -> None:
    before = yaml.safe_load((reproduced / "params.yaml").read_text())
    run(reproduced, "git", "add", "-A")
    run(reproduced, "git", "commit", "--quiet", "--allow-empty", "--no-verify", "-m", "tables")
    varied = json.dumps([*before["overrides"], "learner.temperature=8"])
    try:
        run(
            reproduced,
            "dvc",
            "exp",
            "run",
            "--name",
            "warmer",
            "-S",
            "methods=[finetune]",
            "-S",
            f"overrides={varied}",
        )
        said = run(reproduced, "dvc", "metrics", "diff", "--json", "HEAD", "warmer")
        (table,) = json.loads(said.splitlines()[0]).values()
        figures = table["digits.finetune.A_base"]
        assert 0 < figures["old"] != figures["new"] > 0
        assert "learner.temperature=8" in run(reproduced, "dvc", "params", "diff", "HEAD", "warmer")
        assert '"error": {' not in run(reproduced, "dvc", "exp", "show", "--json")
        assert "index.html" in run(reproduced, "dvc", "plots", "diff", "HEAD", "warmer")
    finally:
        set_params(reproduced, **before)
    assert "experiment@digits-finetune-0" in ran(run(reproduced, "dvc", "repro"))


def test_no_table_is_made_of_runs_that_are_others(reproduced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, reports = read_profile(reproduced / "params.yaml"), reproduced / "reports"
    refuse_other_runs(profile, reproduced / "runs", reports)
    with pytest.raises(
        ConfigError, match=r"nowhere/digits/finetune/seed-0, .*guided.*: not what `dvc repro` ran, or gone"
    ):
        refuse_other_runs(profile, reproduced / "nowhere", reports)
    record = reproduced / "runs" / "digits" / "finetune" / "seed-0" / "experiment.json"
    whole = record.read_text()
    try:
        record.unlink()
        record.write_text(json.dumps(json.loads(whole) | {"epochs": 77}))
        with pytest.raises(ConfigError, match=r"--force experiment@digits-finetune-0$"):
            refuse_other_runs(profile, reproduced / "runs", reports)
        monkeypatch.chdir(reproduced)
        monkeypatch.setenv("DVC_STAGE", "tables")
        assert main(["report"]) == 2
    finally:
        record.unlink()
        record.write_text(whole)


@pytest.mark.parametrize(
    ("setting", "rows"),
    [
        ("tuning.updates=3", {"guided", "first", "random", "vlm"}),
        ("mining.centres=1", {"guided", "first", "random", "vlm", "sd_vlm"}),
        ("generator.steps=4", {"guided", "first", "random", "vlm", "sd_vlm", "fixed_sd"}),
        ("vlm.model=other", {"guided", "vlm", "sd_vlm", "vlm_zero_shot"}),
        ("learner.base.passes=1", {"guided", "first", "random", "vlm", "sd_vlm", "fixed_sd", "finetune"}),
        ("runtime.threads=1", set()),
    ],
)
def test_a_setting_is_part_of_the_rows_that_read_it(setting: str, rows: set[str]) -> None:
    methods = ("guided", "first", "random", "vlm", "sd_vlm", "fixed_sd", "finetune", "vlm_zero_shot")
    if setting.startswith("learner."):
        methods = methods[:-1]
    changed = {m for m in methods if read_by(f"method={m}") != read_by(f"method={m}", setting)}
    assert changed == rows


def test_settings_of_rows_that_left_the_profile_go(tmp_path: Path) -> None:
    profile = read_profile(ROOT / "params.yaml").model_copy(update={"methods": ("finetune", "ncm")})
    assert len(write_settings(profile, tmp_path)) == 2
    write_settings(profile.model_copy(update={"methods": ("ncm",)}), tmp_path)
    assert [p.name for p in (tmp_path / "settings" / "digits").iterdir()] == ["ncm.json"]


def test_a_profile_is_chosen_by_name_and_a_wrong_one_named(tmp_path: Path) -> None:
    chosen = choose_profile("paper", tmp_path / "params.yaml")
    assert (chosen.profile, len(chosen.datasets)) == ("paper", 3)
    with pytest.raises(ConfigError, match="profile 'papr' is unknown; it is one of miniature, paper"):
        choose_profile("papr", tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("profile: x\n")
    with pytest.raises(ConfigError, match=r"(?s)is no profile .*make profile"):
        read_profile(tmp_path / "params.yaml")


def commands(arguments: Sequence[str]) -> int:
    from flows.__main__ import main

    return main(arguments)


def test_the_commands_refuse_what_they_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands(["restore", "digits/guided/seed-0"]) == 1
    assert "lies in no DVC repository" in capsys.readouterr().err
    assert commands(["profile", "papr"]) == 2
    assert "one of miniature, paper" in capsys.readouterr().err
