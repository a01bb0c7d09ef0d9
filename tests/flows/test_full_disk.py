"""A whole experiment whose disk is full at each stage in turn, at sealing, exporting and while MLflow is written;
and folders that are read-only from the beginning.

Each time it ends with a sentence, and with space made the same call goes on; what it ends with equals an undisturbed run.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import flows.session
from flows.experiment import fscil
from tasks.disk import DiskError
from tasks.store import Store
from tasks.tracking import Tracker
from tasks.vlm.cache import CachedClient
from tests.conftest import QUICK, ROOT, Place
from tests.crowd import runs_in, twice
from tests.small_disk import SmallDisk, small_disk
from tests.storm import leftovers

STAGES = ("regenerate", "train_classifier", "evaluate", "mine_failures", "vlm_compare", "tune_lora")
PLACES = {
    "sealing": (Store, "_seal"),
    "exporting": (flows.session, "export"),
    "MLflow": (Tracker, "epoch"),
    "answers": (CachedClient, "_write"),
}


def full_at(disk: SmallDisk, moment: str, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Fill the disk when the run first comes to that moment; what to delete then."""
    ballast: list[Path] = []

    def before(work: Callable[..., object]) -> Callable[..., object]:
        def filled(*args: object, **kwargs: object) -> object:
            if not ballast:
                ballast.append(disk.fill())
            return work(*args, **kwargs)

        return filled

    if moment in PLACES:
        owner, name = PLACES[moment]
        monkeypatch.setattr(owner, name, before(getattr(owner, name)))
    else:
        run = Store.run

        def running(self: Store, stage: str, *args: object, compute: object, **rest: object) -> object:
            return run(self, stage, *args, compute=before(compute) if stage == moment else compute, **rest)

        monkeypatch.setattr(Store, "run", running)
    return ballast


@pytest.mark.slow
def test_an_experiment_on_a_disk_that_fills_again_and_again_ends_as_if_it_never_had(
    finished: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        place = Place(disk.path)
        for moment in (*STAGES, *PLACES):
            with monkeypatch.context() as patch:
                ballast = full_at(disk, moment, patch)
                with pytest.raises(DiskError, match="disk that is full: make space there") as caught:
                    fscil("digits", "guided", 0, place.overrides(tracking=True))
                assert ballast, f"the run never came to {moment}; it ended with {caught.value}"
            ballast[0].unlink()
        sealed = {path: path.stat().st_mtime_ns for path in disk.path.glob("state/stages/*/*/record.json")}
        assert len(sealed) > len(STAGES)
        fscil("digits", "guided", 0, place.overrides(tracking=True))
        assert {path: path.stat().st_mtime_ns for path in sealed} == sealed, (
            "nothing sealed is computed twice"
        )
        assert place.files("guided") == finished.files("guided")
        assert runs_in(place) == runs_in(finished)
        assert twice(place) == []
        assert leftovers(place) == []


@pytest.mark.slow
def test_the_disk_of_prefects_database_fills_in_the_middle_and_is_named(
    finished: Place, tmp_path: Path, digits: Path
) -> None:
    place = Place(tmp_path / "place")
    with small_disk(tmp_path / "prefect", 64 * 1024) as disk:
        command = [
            sys.executable,
            "-m",
            "flows",
            "dataset=digits",
            "method=guided",
            *place.overrides(tracking=True),
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environment |= {
            "PREFECT_HOME": str(disk.path),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        }
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not list(place.root.glob("state/stages/*/*/record.json")):
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.05)
        ballast = disk.fill()
        said, _ = run.communicate(timeout=600)
        ballast.unlink()
        assert run.returncode not in (0, None), said
        told = " ".join(said.split())
        assert "make room there, or set PREFECT_HOME" in told
        assert "Traceback" not in told
        again = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, again.stdout + again.stderr
    assert place.files("guided") == finished.files("guided")
    assert runs_in(place) == runs_in(finished)


@pytest.mark.parametrize(
    ("name", "code", "remedy"),
    [
        ("cwd", 2, "name another folder (PREFECT_HOME names Prefect's)"),
        ("home", 1, "name another folder (PREFECT_HOME names Prefect's)"),
        ("state", 2, "name another folder"),
    ],
)
def test_a_read_only_folder_is_one_sentence_with_the_remedy(
    name: str, code: int, remedy: str, tmp_path: Path, digits: Path
) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        places = {one: tmp_path / one for one in ("cwd", "home", "state")}
        places[name] = disk.path / name
        for folder in places.values():
            folder.mkdir()
        disk.make_read_only(True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        kept |= {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
        kept |= {} if name == "cwd" else {"PREFECT_HOME": str(places["home"])}
        chosen = [f"runtime.state={places['state']}", f"runtime.runs={tmp_path / 'runs'}"]
        command = [sys.executable, "-m", "flows", "dataset=digits", "method=finetune", *QUICK, *chosen]
        done = subprocess.run(
            [*command, "tracking=off", f"dataset.root={digits}"],
            cwd=places["cwd"] if name == "cwd" else ROOT, env=kept, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == code, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: ")
    assert f"{places[name]}" in said
    assert f" is read-only: make it writable or {remedy}" in said
    assert "Traceback" not in done.stderr
