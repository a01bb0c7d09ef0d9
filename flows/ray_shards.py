"""``runtime=ray``: shards of a set are drawn on a Ray cluster, through prefect-ray; one GPU a shard where there are any.

Ray starts a task again on another worker when the one that ran it is lost. Prefect and Ray are imported here alone.
"""

import importlib.util
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext, TaskRunContext

from tasks.runtime import RuntimeSettings
from tasks.shards import Drawn, Order, Parcel, Shard, draw_parcel, drawn_by, packed

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner

LOST_WORKERS = 5
RESUMES = (
    "shards that are sealed stay: see `ray status`, then the same command goes on, on another cluster too"
)
AHEAD = 2
"""Shards handed out for each that the cluster draws at once, so that no worker waits for this process."""


class ClusterError(OSError):
    """The cluster cannot be reached, or lost the same shard again and again."""


@task(name="draw shard", cache_policy=NO_CACHE, persist_result=False)
def draw_on_worker(parcel: Parcel, shard: Shard) -> Drawn:
    """One shard, on a worker of the cluster."""
    return draw_parcel(parcel, shard)


def check_ray(runtime: RuntimeSettings) -> None:
    """Find out before any compute whether shards can be drawn where the settings say.

    Raises:
        ValueError: Ray is not installed.
    """
    missing = [name for name in ("ray", "prefect_ray") if importlib.util.find_spec(name) is None]
    if runtime.shards == "ray" and missing:
        raise ValueError(
            "runtime=ray needs Ray: pip install 'prefect-ray>=0.6' 'ray>=2.50', or pip install -e '.[ray]' in a clone"
        )


@contextmanager
def shards_on(runtime: RuntimeSettings) -> Iterator[None]:
    """For as long as the block lasts, shards are drawn where the settings say.

    Raises:
        ClusterError: there is no cluster at ``runtime.address``.
    """
    if runtime.shards == "process":
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from prefect_ray import RayTaskRunner

    runner = RayTaskRunner(runtime.address, _init_settings(runtime))
    try:
        runner.__enter__()
    except (OSError, RuntimeError) as error:
        raise ClusterError(f"no Ray cluster at {runtime.address or 'this machine'}: {error}") from error
    try:
        with drawn_by(RayDrawer(runner, runtime.gpus_per_shard)):
            yield
    finally:
        runner.__exit__(None, None, None)


def _init_settings(runtime: RuntimeSettings) -> dict[str, Any]:
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if runtime.address is not None:
        return quiet
    return quiet | {
        "include_dashboard": False,
        "num_cpus": runtime.workers,
        "_node_ip_address": "127.0.0.1",
    }


class RayDrawer:
    """Hands shards to the cluster, and their files back in order."""

    def __init__(self, runner: "RayTaskRunner[Any]", gpus_per_shard: float) -> None:
        """Args: runner: entered; gpus_per_shard: of each shard, where the cluster has GPUs."""
        import ray

        resources = ray.cluster_resources()
        on_gpu = gpus_per_shard > 0 and resources.get("GPU", 0) > 0
        slots = resources["GPU"] / gpus_per_shard if on_gpu else resources.get("CPU", 1)
        self._runner = runner
        self._ahead = AHEAD * max(1, int(slots))
        self._options = {
            "num_cpus": 1,
            "num_gpus": gpus_per_shard if on_gpu else 0,
            "max_retries": LOST_WORKERS,
        }

    def __call__(self, order: Order, shards: Sequence[Shard]) -> Iterator[Drawn]:
        """Draw the shards; the order's adapter crosses to each machine once.

        Raises:
            ClusterError: a shard lost its worker more than LOST_WORKERS times, or the cluster is gone.
        """
        import ray
        from prefect_ray.context import remote_options

        parcel, waiting, under_way = ray.put(packed(order)), deque(shards), deque[Any]()
        try:
            while waiting or under_way:
                with remote_options(**self._options), _without_parameters():
                    while waiting and len(under_way) < self._ahead:
                        given = {"parcel": parcel, "shard": waiting.popleft()}
                        under_way.append(self._runner.submit(draw_on_worker, given))
                yield _result(under_way.popleft())
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise ClusterError(f"the Ray cluster is gone ({error}); {RESUMES}") from error
        finally:
            with suppress(ray.exceptions.RayError, ConnectionError):
                for future in under_way:
                    ray.cancel(future.wrapped_future)


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Shards know whose they are, not their flow's parameters: those hold what cannot travel."""
    with ExitStack() as stack:
        for kind in (FlowRunContext, TaskRunContext):
            if (context := kind.get()) is not None:
                stack.enter_context(context.model_copy(update={"parameters": {}}))
        yield


def _result(future: Any) -> Drawn:
    future.wait()
    if future.state.is_crashed():
        raise ClusterError(
            f"Ray lost a shard, for good or {LOST_WORKERS + 1} times: {future.state.message}; {RESUMES}"
        )
    return future.result()
