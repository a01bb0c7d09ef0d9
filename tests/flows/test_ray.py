"""`runtime=ray`: the same bytes as one process, with a worker killed on the way; without Ray one sentence."""

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from prefect.states import Crashed

from flows import ray_shards
from flows.config import load_config
from tests.conftest import Place

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("prefect_ray") is None, reason="needs Ray: pip install -e '.[ray]'"
)


def test_where_shards_are_drawn_is_no_part_of_a_result() -> None:
    on_ray = load_config(["runtime=ray", "runtime.gpus_per_shard=0.5"])
    assert (on_ray.runtime.shards, on_ray.runtime.gpus_per_shard) == ("ray", 0.5)
    assert on_ray.identity == load_config([]).identity


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ray_shards.check_ray(load_config([]).runtime)
    with pytest.raises(ValueError, match=r"pip install"):
        ray_shards.check_ray(load_config(["runtime=ray"]).runtime)


class Lost:
    """What Prefect hands out for a shard that Ray gave up."""

    def __init__(self) -> None:
        self.state = Crashed(message="The worker died unexpectedly")

    def wait(self) -> None:
        return


def test_a_shard_that_ray_gave_up_ends_the_run_with_what_to_do() -> None:
    with pytest.raises(
        ray_shards.ClusterError, match=r"6 times: The worker died.*sealed stay.*the same command"
    ):
        ray_shards._result(Lost())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kill_a_worker(killed: list[int]) -> None:
    """Kill the first process of this one's Ray that draws a shard."""
    until = time.monotonic() + 300
    while not killed and time.monotonic() < until:
        for process in psutil.Process().children(recursive=True):
            try:
                if "draw shard" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        time.sleep(0.05)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_workers_draw_the_same_bytes_though_one_is_killed(
    tmp_path: Path, prefect_server: None, digits: Path, threads: None
) -> None:
    from flows.experiment import fscil

    tiny = ("dataset.n_sessions=0", "generator.steps=4", "generator.batch=4", "runtime.threads=1")
    alone, spread = Place(tmp_path / "alone"), Place(tmp_path / "spread")
    fscil("digits", "guided", 0, alone.overrides(*tiny))
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(killed,), daemon=True)
    killer.start()
    fscil("digits", "guided", 0, spread.overrides(*tiny, "runtime=ray", "runtime.workers=2"))
    assert killed, "no worker was seen drawing"

    def results(place: Place) -> dict[str, bytes]:
        run = place.run("guided")
        return {
            path.relative_to(run).as_posix(): path.read_bytes()
            for path in run.rglob("*")
            if path.is_file() and path.name != "config.json"
        }

    assert results(spread) == results(alone)
    assert any(name.endswith(".png") for name in results(alone))
