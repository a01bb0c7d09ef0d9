"""Replay: each of an epoch's stages again from recorded inputs, bit for bit, or a report of what differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import flows.replay as replay_module
from flows.__main__ import main
from flows.config import ConfigError, config_here, load_config
from flows.experiment import seal_split
from flows.replay import ReplayReport, lines, locate, replay_report
from flows.rerun import ReplayError, Rerun, read_recorded
from tasks.datasets.benchmark import build_benchmark
from tasks.loading import generator_for, image_cache
from tasks.records import AugmentedImage, EpochRecord
from tasks.store import Store, read_json, read_lines, write_json, write_lines
from tests.conftest import ROOT, Place

EPOCH = "session-00/epoch-000"
VERBS = ["train_classifier", "evaluate", "mine_failures", "vlm_compare", "tune_lora", "regenerate"]


@pytest.fixture
def copy(finished: Place, tmp_path: Path) -> Path:
    """The finished run's results alone, somewhere else: no state, as on another machine."""
    shutil.copytree(finished.run("guided"), tmp_path / "guided" / "seed-0")
    return tmp_path / "guided" / "seed-0"


@pytest.fixture
def replayed(copy: Path, prefect_server: None, tmp_path: Path) -> Callable[..., ReplayReport]:
    def run(stages: str, folder: str = EPOCH) -> ReplayReport:
        return replay_report(
            str(copy / folder), stages=stages, overrides=[f"runtime.state={tmp_path / 'state'}"]
        )

    return run


def outcomes(report: ReplayReport) -> dict[str, str]:
    return {stage.stage: stage.outcome for stage in report.stages}


def test_all_six_stages_of_a_moved_run_come_out_identical(copy, prefect_server, tmp_path, capsys) -> None:
    state = tmp_path / "state"
    assert main(["replay", str(copy / EPOCH), "--json", f"runtime.state={state}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["equal"], report["session"], report["place"]) == (
        1,
        True,
        0,
        "epoch-000",
    )
    assert [stage["stage"] for stage in report["stages"]] == VERBS
    assert all(stage["files"] == stage["identical"] > 0 for stage in report["stages"])
    assert not (state / "stages").exists(), "nothing but what is known of the data's pictures is kept"
    assert not (copy / "stages").exists()


@pytest.mark.parametrize(
    ("folder", "verbs"),
    [
        ("session-00/initial", ["regenerate"]),
        pytest.param("session-02/initial", ["regenerate"], marks=pytest.mark.slow),
        ("session-01/test", ["evaluate_test"]),
        ("session-00/epoch-001", ["train_classifier", "evaluate"]),
        pytest.param("session-02/epoch-000", VERBS, marks=pytest.mark.slow),
    ],
)
def test_other_folders_come_out_identical(replayed, folder: str, verbs: list[str]) -> None:
    assert outcomes(replayed("all", folder)) == dict.fromkeys(verbs, "identical")


def test_a_split_of_fewer_sessions_that_lies_in_the_state_is_not_taken_for_the_runs(
    copy: Path, replayed, tmp_path: Path
) -> None:
    """The two have this session in common, and not their classes."""
    config = config_here(copy)
    shorter = config.model_copy(update={"dataset": config.dataset.model_copy(update={"n_sessions": 1})})
    other = seal_split(Store(tmp_path / "state"), shorter, build_benchmark(shorter.dataset)).output
    inputs = EpochRecord.model_validate(read_json(copy / EPOCH / "record.json")).train.inputs
    assert other.train[0].digest == inputs["session"]
    assert outcomes(replayed("train,evaluate")) == dict.fromkeys(VERBS[:2], "identical")


@pytest.mark.slow
def test_another_number_of_threads_changes_last_bits_alone(
    copy: Path, prefect_server: None, tmp_path: Path
) -> None:
    """The figures of docs/reproducibility.md, smaller."""
    other = 2 if torch.get_num_threads() == 1 else 1
    report = replay_report(
        str(copy / EPOCH),
        stages="train,tune,regenerate",
        overrides=[f"runtime.threads={other}", f"runtime.state={tmp_path / 'state'}"],
    )
    assert report.threads == other
    found = {stage.stage: stage for stage in report.stages}
    for stage in ("train_classifier", "tune_lora"):
        weights = [file for file in found[stage].differences if file.what == "weights"]
        assert all(file.largest is not None and file.largest < 1e-2 for file in weights), weights
    assert found["regenerate"].outcome == "identical", "each picture is drawn by one thread"


def test_stages_by_run_session_and_epoch(copy: Path, prefect_server: None, tmp_path: Path, capsys) -> None:
    given = ["--session", "0", "--epoch", "0", "--stages", "mine,compare", f"runtime.state={tmp_path}"]
    assert main(["replay", str(copy), *given]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"identical: 2 of 2 stages of {copy / EPOCH}"
    assert [line.split(":")[0].strip() for line in shown[1:]] == ["mine_failures", "vlm_compare"]


def test_an_epoch_is_found_by_its_mlflow_run(finished: Place) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{finished.root}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (session,) = [run.info.run_id for run in found if run.data.tags.get("fscil.session") == "1"]
    (whole,) = [run.info.run_id for run in found if "mlflow.parentRunId" not in run.data.tags]
    places = [f"tracking.uri={uri}", f"runtime.runs={finished.root / 'runs'}"]
    folder = finished.run("guided") / "session-01" / "epoch-000"
    assert locate(session, None, 0, places) == folder
    assert locate(whole, 1, "0", places) == folder
    assert locate("digits/guided/seed-0", 1, 0, places) == folder
    with pytest.raises(ReplayError, match="--session and --epoch"):
        locate(whole, None, 0, places)
    with pytest.raises(ValueError, match="no run"):
        locate("0" * 32, 0, 0, places)


@pytest.mark.parametrize(
    "tags",
    [
        {"fscil.run": "../../elsewhere/seed-0"},
        {"fscil.run": "/etc/x/seed-0"},
        {"fscil.run": "digits/../seed-0"},
        {"fscil.run": "digits/guided/seed-0", "fscil.session": "../1"},
        {},
    ],
)
def test_tags_that_lead_elsewhere_are_none_of_a_run(
    tags: dict[str, str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(replay_module, "run_tags", lambda *_: tags)
    with pytest.raises(ReplayError, match="is none of this project"):
        locate("0" * 32, None, 0, [f"runtime.runs={tmp_path}"])


# ------------------------------------------------------------------------------------------ what differs


def test_a_changed_pixel_is_seen_where_it_was_drawn_alone(copy: Path, replayed) -> None:
    row = read_lines(copy / EPOCH / "manifest.jsonl", AugmentedImage)[0]
    file = copy / EPOCH / "images" / row.path
    picture = Image.open(file).convert("RGB")
    picture.putpixel((0, 0), tuple(255 - value for value in picture.getpixel((0, 0))))
    file.unlink()  # not the file of the other tests, which it may be a link to
    picture.save(file)
    report = replayed("mine,regenerate")
    assert outcomes(report) == {"mine_failures": "identical", "regenerate": "differs"}
    (difference,) = report.stages[1].differences
    assert difference.file == f"images/{row.path}"
    assert difference.psnr is not None
    assert difference.psnr > 20
    assert report.stages[1].identical == report.stages[1].files - 1
    image_cache.cache_clear()  # the recorded picture is not taken from memory
    report = replayed("train,evaluate", "session-00/epoch-001")
    assert outcomes(report) == {"train_classifier": "failed", "evaluate": "failed"}
    for stage in report.stages:
        assert "is not the one that was recorded" in stage.note
        assert "images has digest" in stage.causes[0], "the set that it reads is not the recorded one"


def test_a_changed_prompt_and_seed_are_named(copy: Path, replayed, capsys) -> None:
    manifest = copy / EPOCH / "manifest.jsonl"
    rows = read_lines(manifest, AugmentedImage)
    other = rows[1].model_copy(update={"prompt": "a picture of nothing"})
    write_lines(manifest, [rows[0].model_copy(update={"seed": 1}), other, *rows[2:]])
    (stage,) = replayed("regenerate").stages
    (difference,) = stage.differences
    assert [row.row for row in difference.rows] == [rows[0].id, rows[1].id]
    assert difference.rows[0].changes == (f"seed: 1 -> {rows[0].seed}",)
    assert difference.rows[1].changes == (f"prompt: 'a picture of nothing' -> {rows[1].prompt!r}",)


def test_changed_weights_are_measured(copy: Path, replayed) -> None:
    file = copy / EPOCH / "adapter" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, file)
    (stage,) = replayed("tune").stages
    (difference,) = stage.differences
    assert (difference.what, difference.tensor) == ("weights", name)
    assert difference.largest == pytest.approx(0.5, abs=1e-6)
    assert (stage.outcome, stage.causes) == ("differs", ())


def test_a_changed_answer_and_a_missing_one(copy: Path, replayed) -> None:
    transcript = copy / EPOCH / "transcript.jsonl"
    rows = transcript.read_text().splitlines()
    (stage,) = replayed("compare").stages
    assert stage.outcome == "identical"
    transcript.write_text("\n".join(rows[1:]) + "\n")
    report = replayed("mine,compare")
    assert outcomes(report) == {"mine_failures": "identical", "vlm_compare": "failed"}
    assert "holds no answer" in (report.stages[1].note or "")
    assert not report.equal
    transcript.write_text("\n".join([rows[0].replace("**Colour:** ", "**Colour:** pale "), *rows[1:]]) + "\n")
    (stage,) = replayed("compare").stages
    assert stage.outcome in ("failed", "differs"), "another caption asks another question"


def test_packages_of_other_versions_are_named(finished: Place, copy: Path, replayed, tmp_path: Path) -> None:
    of_run = Path("runs") / "digits" / "guided" / "seed-0" / "provenance.json"
    known = read_json(finished.root / "state" / of_run)
    assert replayed("mine").stack == ()
    known["packages"]["torch"] = "1.0"
    write_json(tmp_path / "state" / of_run, known)
    (copy / EPOCH / "triplets.jsonl").unlink()
    report = replayed("mine")
    assert [line.split(" -> ")[0] for line in report.stack] == ["torch: '1.0'"]
    assert lines(report)[-1].startswith("  other packages than the run's: torch: '1.0' -> ")
    assert [d.sentence() for d in report.stages[0].differences] == [
        "triplets.jsonl: is missing in the folder"
    ]


def test_other_settings_and_numbers_of_a_record_are_causes(copy: Path, replayed) -> None:
    file = copy / EPOCH / "record.json"
    record = read_json(file)
    record["mine"]["settings"]["mining"]["centres"] = 3
    record["mine"]["output"]["filtered"] = 7
    record["train"]["output"]["losses"][0] += 0.25
    write_json(file, record)
    mined, trained = replayed("mine,train").stages
    assert mined.causes == ("settings.mining.centres: 3 -> 2",)
    assert mined.values == ("filtered: 7 -> 0",)
    assert not mined.differences
    assert "losses: 1 of 1 differ, at most by 0.25" in trained.values[0]


def test_a_batch_that_had_to_be_smaller_is_drawn_as_small_again(copy: Path, tmp_path: Path) -> None:
    file, places = copy / EPOCH / "record.json", [f"runtime.state={tmp_path / 'state'}"]
    record = read_json(file)
    record["regenerate"]["output"]["batch_shape"][0] = 5
    write_json(file, record)
    rerun = Rerun(read_recorded(copy / EPOCH), config_here(copy, places), tmp_path)
    again, _ = rerun.stage("regenerate")
    assert again.output.batch_shape[0] == 5
    assert again.settings["generator"]["batch"] == 16
    usual = generator_for(rerun._context(tmp_path), config_here(copy, places).generator, None)
    assert usual.batch == 16


def test_what_a_provider_drew_is_left_out(copy: Path, replayed) -> None:
    config, provider = read_json(copy / "config.json"), load_config(["images_api=openai"]).images_api
    assert provider is not None
    config["images_api"] = provider.model_dump(mode="json")
    config["augmenter"] |= {"source": "images_api", "prompts": "fixed", "tuning": "none"}
    write_json(copy / "config.json", config)
    report = replayed("evaluate,regenerate")
    assert outcomes(report) == {"evaluate": "identical", "regenerate": "left out"}
    assert report.equal
    with pytest.raises(ReplayError, match=f"come from {provider.model}, which takes no seed"):
        replayed("all", "session-00/initial")


# ------------------------------------------------------------------------------------------ what cannot be replayed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "no record.json"),
        (["session-00/epoch-001", "--stages", "tune"], "ran no tune; it ran train, evaluate"),
        ([EPOCH, "--stages", "tun"], "'tun' is none of train, evaluate"),
        (["session-00"], "there are"),
        (["session-00", "--epoch", "last"], "neither a number nor initial"),
        ([EPOCH, "tuning.updates=3"], "would change what was recorded"),
    ],
)
def test_what_cannot_be_replayed_is_said(copy, prefect_server, arguments, says, capsys) -> None:
    assert main(["replay", str(copy / arguments[0]), *arguments[1:]]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_missing_and_other_data_are_said(copy: Path, prefect_server: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make data"):
        replay_report(
            str(copy / EPOCH), overrides=[f"dataset.root={tmp_path / 'none'}", f"runtime.state={tmp_path}"]
        )
    file = copy / EPOCH / "record.json"
    file.write_text(
        file.read_text().replace(EpochRecord.model_validate(read_json(file)).train.inputs["session"], "0")
    )
    with pytest.raises(ReplayError, match="are not those of"):
        replay_report(str(copy / EPOCH), overrides=[f"runtime.state={tmp_path}"])


def test_data_are_found_where_this_checkout_has_them(copy: Path, digits: Path, monkeypatch) -> None:
    config = read_json(copy / "config.json")
    config["dataset"]["root"] = "elsewhere/digits"
    write_json(copy / "config.json", config)
    monkeypatch.chdir(ROOT)
    assert config_here(copy).dataset.root == Path("data/digits")
    assert config_here(copy, ["dataset.root=mine"]).dataset.root == Path("mine")
    with pytest.raises(ConfigError, match="would change"):
        config_here(copy, ["seed=3"])
