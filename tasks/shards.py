"""Where the images of a set are drawn: in this process, or wherever the run's drawer sends them.

A shard is one batch of the generator. So its shape and the seeds are the same wherever it is drawn, and with them
every bit of its images. What comes back are the images' files; who asked seals them.

On a processor the operations of a small generator are too short to be shared between threads. There one thread
draws a shard, however many there are, and each draws shards of its own with a copy of the generator.
"""

import math
import tempfile
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch

from tasks.collapse import refuse_nan
from tasks.context import EpochContext
from tasks.diffusion.generator import GeneratorSettings
from tasks.image_cache import MEBIBYTE
from tasks.images import encoded
from tasks.loading import Drawer, DrawerSettings, drawer_for, generator_digest
from tasks.records import ArtifactRef, Digest, Frozen

SMALL, LIGHT = 128, 256 * MEBIBYTE
"""Side in pixels, and size of the files of weights, up to which one thread draws a shard."""

COPIES = 16
"""Of the generator at most; each needs its memory."""


class Shard(Frozen):
    """One batch: where it begins in the set, and how many of its images are drawn at once at most."""

    start: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    batch: int


class Drawn(Frozen):
    """A shard's image files, and how many were drawn at once in the end: fewer where the memory did not suffice."""

    start: int
    batch: int
    files: tuple[bytes, ...]


class Order(Frozen):
    """What draws the shards of a set."""

    context: EpochContext
    generator: DrawerSettings
    adapter: ArtifactRef | None


class Parcel(Frozen):
    """An order for a process that shares neither memory nor folders with this one."""

    order: Order
    weights: Digest
    adapter_files: dict[str, bytes]


class ShardDrawer(Protocol):
    """Draws shards somewhere else."""

    def __call__(self, order: Order, shards: Sequence[Shard]) -> Iterator[Drawn]:
        """The shards drawn, one by one, each as soon as it and those before it are there."""


_elsewhere: ContextVar[ShardDrawer | None] = ContextVar("elsewhere", default=None)


@contextmanager
def drawn_by(drawer: ShardDrawer) -> Iterator[None]:
    """For as long as the block lasts, shards of generators are drawn by ``drawer``."""
    token = _elsewhere.set(drawer)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def draw_shards(order: Order, shards: Sequence[Shard]) -> Generator[Drawn, None, None]:
    """Draw shards here, or where :func:`drawn_by` says; a provider's images are always asked for from here."""
    elsewhere = _elsewhere.get()
    if elsewhere is not None and isinstance(order.generator, GeneratorSettings):
        yield from elsewhere(order, shards)
        return
    if _by_one_thread(order):
        yield from _side_by_side(order, shards)
        return
    for shard in shards:
        yield draw_shard(order, shard)


def _by_one_thread(order: Order) -> bool:
    """Whether a shard's operations are too short to be shared."""
    generator, device = order.generator, order.context.runtime.torch_device
    if not isinstance(generator, GeneratorSettings) or device.type != "cpu":
        return False
    return generator.size <= SMALL and not generator.compile and _weigh(generator.path) <= LIGHT


@lru_cache(maxsize=4)
def _weigh(path: str) -> float:
    """Bytes of a folder's weights; infinite where they are not in a folder."""
    files = list(Path(path).rglob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else math.inf


def _with_threads(order: Order, threads: int) -> Order:
    runtime = order.context.runtime.model_copy(update={"threads": threads})
    return order.model_copy(update={"context": order.context.model_copy(update={"runtime": runtime})})


def _side_by_side(order: Order, shards: Sequence[Shard]) -> Generator[Drawn, None, None]:
    """As many shards at a time as there are threads, up to a limit; the first that fails ends all."""
    threads = torch.get_num_threads()
    hands = min(order.context.runtime.threads or threads, max(1, len(shards)), COPIES)
    alone, free = _with_threads(order, 1).context, SimpleQueue[Drawer]()

    def drawn(shard: Shard) -> Drawn:
        drawer = free.get()
        try:
            return _drawn(drawer, order.generator, shard)
        finally:
            free.put(drawer)

    pool = ThreadPoolExecutor(hands, "drawing", initializer=lambda: torch.set_num_threads(1))
    try:
        for hand in range(hands):  # none while another one draws: loading changes what modules do everywhere
            free.put(drawer_for(alone, order.generator, order.adapter, hand))
        yield from pool.map(drawn, shards)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def draw_shard(order: Order, shard: Shard) -> Drawn:
    """Draw one shard in this thread.

    Raises:
        CollapseError: an image is not finite.
    """
    return _drawn(drawer_for(order.context, order.generator, order.adapter), order.generator, shard)


def _drawn(drawer: Drawer, settings: DrawerSettings, shard: Shard) -> Drawn:
    drawer.batch = min(drawer.batch, shard.batch)
    images = drawer.draw(list(shard.prompts), list(shard.seeds))
    refuse_nan(images, shard.prompts)
    files = tuple(encoded(image, f".{settings.format}") for image in images)
    return Drawn(start=shard.start, batch=drawer.batch, files=files)


# ------------------------------------------------------------------------------------------ parcels


def packed(order: Order) -> Parcel:
    """The order with its adapter's files, the digest of the weights, and the number of threads of this process."""
    folder = order.context.store.locate(order.adapter) if order.adapter else None
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder else {}
    threads = 1 if _by_one_thread(order) else order.context.runtime.threads or torch.get_num_threads()
    return Parcel(
        order=_with_threads(order, threads),
        weights=generator_digest(order.generator),
        adapter_files=files,
    )


def draw_parcel(parcel: Parcel, shard: Shard) -> Drawn:
    """Draw one shard of a parcel, in the process that it was sent to.

    Raises:
        ValueError: the generator's weights here are not those of the process that sent it.
    """
    order, found = parcel.order, generator_digest(parcel.order.generator)
    if found != parcel.weights:
        raise ValueError(
            f"the generator {order.generator.model_dump().get('path')} has digest {found} on this worker and "
            f"{parcel.weights} where the run was started; put the same weights on every machine"
        )
    state = Path(_scratch().name)
    runtime = order.context.runtime.model_copy(update={"state": state})
    if order.adapter is not None:
        folder = state / "stages" / order.adapter.path
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in parcel.adapter_files.items():
            (folder / name).write_bytes(content)
    context = order.context.model_copy(update={"runtime": runtime})
    return draw_shard(order.model_copy(update={"context": context}), shard)


@lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """This process's own folder for adapters, for as long as it lives."""
    return tempfile.TemporaryDirectory(prefix="fscil-")
