"""A set drawn by this process against the same set on a local Ray of two workers, one thread each."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from prefect.testing.utilities import prefect_test_harness

from flows.config import load_config
from flows.ray_shards import shards_on
from tasks.context import EpochContext
from tasks.records import ArtifactRef, Digest, LoopState
from tasks.shards import Drawn, Order, Shard, draw_shards
from tests.benchmarks.measuring import Plan, Row

WORKERS, SHARDS = 2, 6


def rows(plan: Plan) -> Iterator[Row]:
    """Images per second and the speed-up; nothing is promised, since cores may be shared."""
    if importlib.util.find_spec("prefect_ray") is None:
        yield Row("regenerate on Ray", "not measured: pip install -e '.[ray]'")
        return
    with TemporaryDirectory() as folder, prefect_test_harness(server_startup_timeout=180):
        before, (order, shards) = torch.get_num_threads(), _set(Path(folder))

        def draw() -> list[Drawn]:
            return list(draw_shards(order, shards))

        here = plan.race({"here": draw})["here"]
        one = draw()
        with shards_on(order.context.runtime):
            on_ray = plan.race({"ray": draw})["ray"]
            same = draw() == one
        torch.set_num_threads(before)
    n = sum(len(shard.prompts) for shard in shards)
    yield Row(f"regenerate, {SHARDS} shards, one process, 1 thread", f"{n / here:.1f} images/s")
    name, bits = f"- Ray, {WORKERS} workers, 1 thread each", "the same bits" if same else "OTHER BITS"
    yield Row(name, f"{n / on_ray:.1f} images/s", f"{here / on_ray:.2f} x, {bits}", "the same bits", same)


def _set(folder: Path) -> tuple[Order, list[Shard]]:
    limits = [
        f"runtime.workers={WORKERS}",
        "runtime.threads=1",
        "runtime.device=cpu",
        f"runtime.state={folder}",
    ]
    config = load_config(["dataset=digits", "method=fixed_sd", "runtime=ray", *limits])
    context = EpochContext(
        run="bench", seed=0, session=0, epoch=0,
        session_ref=ArtifactRef(path="none/0/none", digest=Digest("none"), kind="session"),
        start=LoopState(), class_names=("zero",), n_base=1, dataset=config.dataset, runtime=config.runtime,
    )  # fmt: skip
    batch = config.generator.batch
    shards = [
        Shard(
            start=start,
            prompts=("A picture of a zero.",) * batch,
            seeds=tuple(range(start, start + batch)),
            batch=batch,
        )
        for start in range(0, SHARDS * batch, batch)
    ]
    return Order(context=context, generator=config.generator, adapter=None), shards
