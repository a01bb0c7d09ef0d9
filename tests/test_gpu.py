"""A GPU is shared by as many experiments as the settings say; a killed one frees its slot at once."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tasks import gpu
from tasks.gpu import gpu_held, slot_held
from tasks.runtime import RuntimeSettings
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from tasks.gpu import slot_held
with slot_held(Path(sys.argv[1]), "GPU-1", 1, "a GPU", print):
    print("held", flush=True)
    time.sleep(120)
"""


def runtime(device: str, gpu_runs: int | None) -> RuntimeSettings:
    return RuntimeSettings.model_validate(
        {"device": device, "threads": None, "state": ".", "runs": ".", "gpu_runs": gpu_runs}
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu, "POLL_S", 0.02)
    return tmp_path


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch sees one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = SimpleNamespace(uuid="1234", name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: seen)


def test_a_killed_holder_frees_its_slot_at_once(cache: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(cache)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    said: list[str] = []
    got = threading.Event()

    def wait() -> None:
        with slot_held(cache, "GPU-1", 1, "a GPU", said.append):
            got.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not got.wait(0.3)
    assert said == ["waits for the GPU (a GPU): runtime.gpu_runs=1 and so many experiments use it"]
    with slot_held(cache, "GPU-2", 1, "another", said.append), slot_held(cache, "GPU-1", 2, "a GPU", print):
        pass  # neither another GPU nor a second slot waits
    began = time.monotonic()
    holder.send_signal(signal.SIGKILL)
    assert got.wait(10)
    assert time.monotonic() - began < 5
    waiting.join()
    holder.wait()
    assert len(said) == 1


def test_a_run_on_the_cpu_or_without_a_limit_holds_nothing(cache: Path, one_gpu: None) -> None:
    for settings in (runtime("cpu", 1), runtime("cuda", None)):
        with gpu_held(settings, print):
            assert list(cache.iterdir()) == []


def test_a_run_on_a_gpu_holds_a_slot_of_it_and_gives_it_back(cache: Path, one_gpu: None) -> None:
    said: list[str] = []
    for _ in range(2):
        with gpu_held(runtime("auto", 1), said.append):
            assert [path.name for path in (cache / "fscil" / "gpus").iterdir()] == ["1234-0.lock"]
    assert said == []


def test_no_experiment_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="gpu_runs"):
        runtime("cuda", 0)
