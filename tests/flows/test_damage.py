"""A run whose files were damaged since: what was is named, it alone is computed again, and the results are the same."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.config import load_config
from flows.experiment import RunError, fscil, preflight
from tasks import loading
from tasks.datasets.benchmark import build_benchmark
from tasks.images import UnreadableImageError
from tasks.store import read_json, write_json
from tests.conftest import Place


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damaged", "damage"),
    [
        ("tune_lora/*/adapter/*.safetensors", flipped),
        ("regenerate/*/images/*/*.png", flipped),
        ("regenerate/*/manifest.jsonl", halved),
        ("train_classifier/*/record.json", halved),
        ("evaluate/*/record.json", flipped),
    ],
)
def test_a_damaged_stage_is_named_and_computed_again_and_no_other(
    finished: Place,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damaged: str,
    damage: Callable[[Path], None],
) -> None:
    shutil.copytree(finished.root / "state", tmp_path / "state")
    place = Place(tmp_path)
    stages = place.root / "state" / "stages"
    file = min(stages.glob(damaged))
    content = file.read_bytes()
    damage(file)
    before = {path: path.stat().st_mtime_ns for path in stages.glob("*/*/record.json")}
    with caplog.at_level(logging.WARNING, logger="fscil.store"):
        fscil("digits", "guided", 0, place.overrides())
    stage = file.relative_to(stages).parts[:2]
    assert f"sealed stage {'/'.join(stage)} is damaged" in caplog.text
    after = {path: path.stat().st_mtime_ns for path in stages.glob("*/*/record.json")}
    assert [path.relative_to(stages).parts[:2] for path in before if after[path] != before[path]] == [stage]
    assert file.read_bytes() == content
    assert place.files("guided") == finished.files("guided")


def test_a_damaged_answer_is_asked_for_again_and_no_other(
    finished: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished.root / "state", tmp_path / "state")
    place = Place(tmp_path)
    shutil.rmtree(place.root / "state" / "stages" / "vlm_compare")
    answers = {path: path.stat().st_mtime_ns for path in place.root.glob("state/vlm/**/*.json")}
    flipped(min(answers))
    fscil("digits", "guided", 0, place.overrides())
    assert f"the cached VLM answer {min(answers)} is damaged and will be asked for again" in caplog.text
    assert [path for path, at in answers.items() if path.stat().st_mtime_ns != at] == [min(answers)]
    assert place.files("guided") == finished.files("guided")


@pytest.mark.parametrize("damaged", ["session-*/record.json", "session-*/epoch-*/transcript.jsonl"])
def test_damaged_results_are_written_again(finished: Place, tmp_path: Path, damaged: str) -> None:
    shutil.copytree(finished.root / "state", tmp_path / "state")
    place = Place(tmp_path)
    fscil("digits", "guided", 0, place.overrides())
    file = min(place.run("guided").glob(damaged))
    file.chmod(0o644)
    halved(file)
    fscil("digits", "guided", 0, place.overrides())
    assert place.files("guided") == finished.files("guided")


def test_an_original_that_was_exchanged_is_refused_even_if_its_size_and_time_are_the_same(
    digits: Path, tmp_path: Path, prefect_server: None
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    place = Place(tmp_path, data)
    settings = place.overrides("dataset.n_sessions=0", "stopping.max_epochs=1")
    config = load_config(["method=finetune", *settings])
    used = build_benchmark(config.dataset, cache=config.runtime.state / "datasets").sessions[0].train
    zero, one = (data / next(ref.path for ref in used if ref.label == label) for label in (0, 1))
    times = zero.stat()
    assert one.stat().st_size == times.st_size
    zero.write_bytes(one.read_bytes())
    os.utime(zero, ns=(times.st_atime_ns, times.st_mtime_ns))
    loading.image_cache.cache_clear()  # what another test has read under this digest is not read again
    with pytest.raises(UnreadableImageError, match=f"{zero.name} is not the one that was recorded"):
        fscil("digits", "finetune", 0, settings)


@pytest.mark.parametrize("what", ["data", "generator"])
def test_other_data_or_weights_than_those_a_run_began_with_are_refused_until_it_is_begun_anew(
    finished: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    shutil.copytree(finished.root / "state", tmp_path / "state")
    shutil.copytree(finished.root / "runs", tmp_path / "runs")
    place = Place(tmp_path)
    file = place.run("guided") / "inputs.json"
    begun = read_json(file) | {what: "0" * 32}
    write_json(file, begun)
    other = place.overrides(f"runtime.runs={tmp_path / 'others'}")
    fscil("digits", "guided", 0, other)  # another folder of the same state has its own files
    with pytest.raises(RunError, match=f"was begun with other files.*{what}: '0+' -> .*Put back"):
        preflight(load_config(["method=guided", *place.overrides()]))
    assert read_json(file) == begun, "a second try is refused too"
    fscil("digits", "guided", 0, other)
    fscil("digits", "guided", 0, place.overrides("runtime.replace=true"))
    assert place.files("guided") == finished.files("guided")
    begun = read_json(file)
    halved(file)
    fscil("digits", "guided", 0, place.overrides())
    assert f"cannotread{file}" in "".join(capsys.readouterr().err.split())
    assert read_json(file) == begun
