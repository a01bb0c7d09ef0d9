"""Bad input gets one clear sentence that names the value and the remedy, before any compute."""

import io
import json
import logging
import socket
from pathlib import Path

import pytest

import flows.__main__ as entry
from flows import commands, reproduce
from flows.__main__ import expand, main
from flows.cli import failures_told_once
from flows.config import CONFIGS, ConfigError, choices, differences, load_config
from tasks.datasets.benchmark import build_benchmark
from tasks.store import Store
from tests.conftest import Place


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence that the command line refuses with."""
    assert main(list(arguments)) in (1, 2)
    text = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in text
    return text


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dataset=nope", ["dataset=nope is unknown", "digits"]),
        ("dataset=0", ["dataset=0 is unknown", "digits"]),
        ("method=nope", ["method=nope is unknown", "guided", "fixed_sd"]),
        ("tuning.updats=3", ["tuning.updats", "tuning.updates"]),
        ("tuning.updates=many", ["tuning.updates", "many"]),
        ("seed=-1", ["seed", "-1"]),
        ("+surprise=1", ["surprise"]),
        ("augmenter.base_prompt=photo", ["base_prompt", "category"]),
        ('augmenter.base_prompt="a {category} {style}"', ["base_prompt", "no other brace"]),
        ("tuning.learning_rate=inf", ["tuning.learning_rate", "finite"]),
        ("vlm.price_in=.nan", ["vlm.price_in"]),
        ("dataset.base_shots=0", ["dataset.base_shots", "greater than or equal to 1"]),
        ("generator.steps=0", ["generator.steps"]),
        ("generator.scheduler=euler", ["generator.scheduler", "'ddim' or 'dpmsolver++'", "euler"]),
        ("tuning.coef=half", ["tuning.coef", "'exact' or 'unit'", "half"]),
        ("mining.negatives=9", ["mining.negatives", "8"]),
    ],
)
def test_a_wrong_override_is_named_with_what_would_be_right(override: str, says: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config([override])
    assert all(word in str(error.value) for word in says), str(error.value)


@pytest.mark.parametrize(
    "group", sorted({path.name for path in CONFIGS.iterdir() if path.is_dir()} - {"windows", "profile"})
)
def test_every_yaml_composes_and_validates(group: str) -> None:
    for name in choices(group):
        more = ["vlm.transcript=transcript.jsonl"] if (group, name) == ("vlm", "cassette") else []
        more += ["dataset.root=images"] if name == "imagefolder" else []
        more += ["augmenter=none"] if (group, name) == ("learner", "vlm_zero_shot") else []
        more += ["images_api=openai"] if (group, name) == ("augmenter", "images_api") else []
        config = load_config([f"{group}={name}", *more])
        assert group != "method" or config.method == name


def test_method_presets_choose_their_augmenter() -> None:
    assert load_config(["method=finetune"]).augmenter.source == "none"
    guided = load_config(["method=guided"]).augmenter
    assert (guided.prompts, guided.tuning) == ("rewritten", "guided")
    assert load_config(["method=finetune", "augmenter=guided"]).augmenter == guided


def test_combinations_are_expanded_and_other_lists_left_alone() -> None:
    assert expand(["method=a,b", "seed=0,1", "x=[1,2]"]) == [
        ["method=a", "seed=0", "x=[1,2]"],
        ["method=a", "seed=1", "x=[1,2]"],
        ["method=b", "seed=0", "x=[1,2]"],
        ["method=b", "seed=1", "x=[1,2]"],
    ]


def test_changed_settings_are_named() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}) == ["a.c: 2 -> 3"]


def test_no_arguments_print_the_help(capsys) -> None:
    assert main([]) == 2
    assert "fscil replay" in capsys.readouterr().out
    assert main(["--help"]) == 0


def test_something_that_is_no_override(capsys) -> None:
    assert "'guided' is neither" in refused(capsys, "guided")


# ------------------------------------------------------------------------------------------ data and models


@pytest.mark.usefixtures("prefect_server", "digits")
class TestBeforeAnyCompute:
    def refused(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, *more: str, method: str = "guided"
    ) -> str:
        place = Place(tmp_path)
        text = refused(capsys, "dataset=digits", f"method={method}", *place.overrides(*more))
        stages = place.root / "state" / "stages"
        assert not stages.exists() or {p.name for p in stages.iterdir()} <= {"split"}
        return text

    def test_missing_data_folder(self, capsys, tmp_path: Path) -> None:
        text = self.refused(capsys, tmp_path, f"dataset.root={tmp_path / 'nowhere'}")
        assert "nowhere" in text
        assert "make data" in text

    def test_too_many_sessions(self, capsys, tmp_path: Path) -> None:
        text = self.refused(capsys, tmp_path, "dataset.n_sessions=3")
        assert "10" in text
        assert "12" in text

    def test_too_few_images(self, capsys, tmp_path: Path) -> None:
        assert "401" in self.refused(capsys, tmp_path, "dataset.base_shots=401")

    def test_unreadable_image(self, capsys, tmp_path: Path, digits: Path) -> None:
        import shutil

        shutil.copytree(digits, tmp_path / "digits")
        for path in (tmp_path / "digits" / "train" / "three").glob("*.png"):
            path.write_bytes(path.read_bytes()[:50])
        assert "three" in self.refused(capsys, tmp_path, f"dataset.root={tmp_path / 'digits'}")

    def test_missing_classifier_checkpoint(self, capsys, tmp_path: Path) -> None:
        assert (
            "no such checkpoint"
            in self.refused(capsys, tmp_path, f"classifier.checkpoint={tmp_path / 'vit'}").lower()
        )

    def test_missing_generator(self, capsys, tmp_path: Path) -> None:
        text = self.refused(capsys, tmp_path, f"generator.path={tmp_path / 'sd'}")
        assert "sd" in text
        assert "generator.path" in text

    def test_vlm_that_refuses_the_connection(self, capsys, tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        text = self.refused(
            capsys,
            tmp_path,
            "vlm=openai_compatible",
            f"vlm.base_url=http://127.0.0.1:{port}/v1",
            "vlm.model=m",
        )
        assert str(port) in text
        assert "vlm.base_url" in text

    def test_a_run_folder_of_other_settings(self, capsys, tmp_path: Path) -> None:
        place = Place(tmp_path)
        config = load_config(["method=finetune", *place.overrides()]).identity
        config["stopping"]["max_epochs"] = 9
        place.run("finetune").mkdir(parents=True)
        (place.run("finetune") / "config.json").write_text(json.dumps(config))
        text = self.refused(capsys, tmp_path, method="finetune")
        assert "stopping.max_epochs: 9 -> 2" in text
        assert "runtime.runs" in text

    def test_a_method_without_images_needs_no_generator(self, tmp_path: Path) -> None:
        place = Place(tmp_path)
        quick = place.overrides(f"generator.path={tmp_path / 'sd'}", "stopping.max_epochs=1")
        assert main(["dataset=digits", "method=finetune", *quick]) == 0


def test_a_run_in_progress_elsewhere_is_refused_as_a_run_not_as_a_wrong_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path)
    with Store(place.root / "state").run_lock("digits/finetune/seed-0"):
        assert main(["dataset=digits", "method=finetune", "seed=0", *place.overrides()]) == 1
    assert "digits/finetune/seed-0 is already running in another process" in " ".join(
        capsys.readouterr().err.split()
    )


def test_what_a_flow_fails_with_is_told_once_and_all_else_as_ever() -> None:
    said = io.StringIO()
    handler, here = logging.StreamHandler(said), {"send_to_api": False}
    logging.getLogger().addHandler(handler)
    try:
        with failures_told_once():
            logging.getLogger("prefect.flow_runs").error("Encountered exception during execution", extra=here)
            logging.getLogger("prefect.task_runs").error("Task run failed", extra=here)
            logging.getLogger("tasks.store").warning("put there anew")
            logging.getLogger("prefect.client").error("no answer")
        logging.getLogger("prefect.flow_runs").error("after it", extra=here)
    finally:
        logging.getLogger().removeHandler(handler)
    assert said.getvalue().split("\n") == ["put there anew", "no answer", "after it", ""]


def test_a_study_of_no_example_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["study", "--examples", "0"])
    assert left.value.code == 2
    assert "--examples 0: give at least 1" in capsys.readouterr().err


def test_missing_data_of_the_development_benchmark_names_a_command_that_exists(tmp_path: Path) -> None:
    config = load_config(["dataset=digits_dev", f"dataset.root={tmp_path / 'none'}"])
    with pytest.raises(ValueError, match=r"run `make data DATASET=digits`"):
        build_benchmark(config.dataset)


@pytest.mark.parametrize("command", ["replay", "cell"])
def test_a_key_is_refused_before_it_becomes_a_parameter_that_prefect_keeps(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begun() -> None:
        pytest.fail("a flow run began")

    bad = "tracking.uri=https://me:short@host"
    monkeypatch.setattr(entry, "prefect_server", begun)
    monkeypatch.setattr(commands, "prefect_server", begun)
    monkeypatch.setattr(commands, "run_warm", lambda _: None)
    monkeypatch.setattr(reproduce, "overrides_of", lambda _: [bad])
    arguments = {"replay": ["runs/digits/guided/seed-0", bad], "cell": ["digits", "guided", "0"]}[command]

    assert main([command, *arguments]) != 0
    said = capsys.readouterr().err
    assert "tracking.uri= holds an address with a password" in said
    assert "short" not in said
