"""A drawn corpus on disk, so that training reads arrays: pixels, attribute indices and captions.

Drawn by several processes; the result does not depend on their number.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.miniature.captions import ATTRIBUTES, VALUES, Attributes
from tasks.miniature.corpus import Sample, sample

VERSION = 2
"""Part of a cached corpus's name: to be raised whenever the pictures or the captions of a seed change."""


@dataclass(frozen=True)
class Settings:
    """What a corpus is drawn from. ``short``, ``letters``: shares; ``held_out``: the judge's fonts."""

    seed: int
    count: int
    short: float = 0.17
    letters: float = 0.3
    held_out: bool = False


@dataclass(frozen=True)
class Corpus:
    """``pixels`` uint8 [n, 32, 32, 3]; ``labels`` int64 [n, 7] in :data:`ATTRIBUTES` order; ``captions`` per image."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    captions: list[list[str]]

    def images(self, index: NDArray[np.int64] | slice) -> torch.Tensor:
        """Images [n, 3, 32, 32] in [0, 1]."""
        return torch.from_numpy(self.pixels[index]).permute(0, 3, 1, 2).float() / 255


def indices(attributes: Attributes) -> list[int]:
    """Index of each attribute's value; -1 where it is None."""
    return [VALUES[n].index(v) if (v := getattr(attributes, n)) else -1 for n in ATTRIBUTES]


def attributes_of(row: NDArray[np.int64]) -> Attributes:
    """Inverse of :func:`indices`."""
    return Attributes(**{n: VALUES[n][i] for n, i in zip(ATTRIBUTES, row, strict=True) if i >= 0})


def _chunk(settings: Settings, start: int, stop: int) -> list[Sample]:
    s = settings
    return [
        sample(np.random.default_rng([s.seed, i]), s.short, s.letters, s.held_out) for i in range(start, stop)
    ]


def load(folder: Path, name: str, settings: Settings, workers: int = 2) -> Corpus:
    """The corpus of these settings, drawn on the first call and read from ``folder`` afterwards."""
    s = settings
    key = f"{name}-v{VERSION}-{s.seed}-{s.count}-{s.short}-{s.letters}-{s.held_out}"
    stem = folder / key.replace(".", "_")
    if not stem.with_suffix(".json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _save(stem, settings, workers)
    arrays = np.load(stem.with_suffix(".npz"))
    return Corpus(
        arrays["pixels"], arrays["labels"], json.loads(stem.with_suffix(".json").read_text("utf-8"))
    )


def _save(stem: Path, settings: Settings, workers: int) -> None:
    bounds = [*range(0, settings.count, 2000), settings.count]
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(_chunk, [settings] * (len(bounds) - 1), bounds[:-1], bounds[1:])
        drawn = [one for part in parts for one in part]
    labels = np.array([indices(one.attributes) for one in drawn])
    np.savez(stem.with_suffix(".npz"), pixels=np.stack([one.pixels for one in drawn]), labels=labels)
    stem.with_suffix(".json").write_text(json.dumps([one.captions for one in drawn]), "utf-8")
