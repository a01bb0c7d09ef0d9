"""Mining a session of N originals, all of them wrong, and N generated images: seconds and memory as N grows.

Sessions grow by classes of 50 originals and 50 generated images, as few-shot benchmarks do (60 classes of a base
session make 3,000). Centres cost K rows; each failure's hardest negatives are exact and look at every right
generation of its class. So a class that grows at a fixed number of classes costs failures x candidates, which the
last row shows: in time, not in memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tasks.records import AugmentedImage, Digest, ImageRef
from tasks.similarity.mining import mine_class
from tasks.similarity.selection import MiningSettings
from tests.benchmarks.measuring import Call, Plan, Row, peak_mib

CLASS, SIZES, ONE_CLASS, SCRATCH = 50, (750, 1500, 3000), 750, (256, 32)
SETTINGS = MiningSettings(
    centres=8,
    negatives=8,
    ssim_size=64,
    min_contrast=0.02,
    greyscale=True,
    gap=0.0,
    inherit="all",
    pairs="nearest",
)

IMAGE_BYTES = 6 * 4 * SETTINGS.ssim_size**2
"""Of each candidate beyond ``memory_mb``: its pixels as compared, their local statistics, and these in the making."""


def rows(plan: Plan) -> Iterator[Row]:
    """Seconds and MiB for each N; linear is a cost an image that stays."""
    short = Plan(plan.clock, min(plan.rounds, 2), plan.device)
    best = short.race({str(n): session(n, CLASS) for n in SIZES})
    memory = [peak_mib(session, n, CLASS) for n in SIZES]
    first = best[str(SIZES[0])] / SIZES[0]
    for n, needed in zip(SIZES, memory, strict=True):
        growth = best[str(n)] / n / first
        yield Row(
            f"mining N = {n:,} originals and generated images, 64 px grey, K = 8",
            f"{best[str(n)]:.2f} s, {needed:.0f} MiB",
            f"{growth:.2f} x a image of N = {SIZES[0]}",
            "<= 1.25 x",
            growth <= 1.25,
        )
    for memory_mb in SCRATCH:
        alone = short.seconds(session(ONE_CLASS, ONE_CLASS, memory_mb))
        needed = peak_mib(session, ONE_CLASS, ONE_CLASS, memory_mb)
        allowed = memory_mb + ONE_CLASS * IMAGE_BYTES / 2**20
        yield Row(
            f"- all {ONE_CLASS} of one class: {ONE_CLASS**2:,} pairs, memory_mb={memory_mb}",
            f"{alone:.2f} s, {needed:.0f} MiB",
            "",
            f"<= {allowed:.0f} MiB",
            needed <= allowed,
        )


def session(n: int, per_class: int, memory_mb: int = 256) -> Call:
    """Mining of n originals and n generated images in classes of a size; images are blurred noise, 32 px."""
    generator = torch.Generator().manual_seed(0)
    images = [_pictures(per_class, generator) for _ in range(2)]
    settings = SETTINGS.model_copy(update={"memory_mb": memory_mb})

    def mine() -> None:
        for label in range(n // per_class):
            failures = [_original(label, i) for i in range(per_class)]
            candidates = [_generated(label, i) for i in range(per_class)]
            mine_class(failures, images[0], candidates, images[1], [], images[1][:0], settings)

    return mine


def _pictures(n: int, generator: torch.Generator) -> Tensor:
    small = torch.rand(n, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(small, (32, 32), mode="bilinear").clamp(0, 1)


def _original(label: int, i: int) -> ImageRef:
    return ImageRef(id=f"o{label}-{i}", path=f"{label}/{i}.png", digest=Digest("x"), label=label)


def _generated(label: int, i: int) -> AugmentedImage:
    name = f"g{label}-{i}"
    return AugmentedImage(
        id=name, slot=name, source_id=None, label=label, prompt="a picture", seed=i, path=f"{name}.png",
        digest=Digest("x"), parent_id=None,
    )  # fmt: skip
