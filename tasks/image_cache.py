"""Pictures decoded once: resized 8-bit copies by content, in memory, up to a bound.

An epoch reads the same pictures in several stages, and the originals in every epoch; decoding a photograph takes
longer than a GPU takes to learn from it. A copy is the very pixels that :func:`tasks.images.load_pixels` gives.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from tasks.images import load_pixels
from tasks.records import Digest

MEBIBYTE = 2**20
THREADED_SIZE = 65
"""From this side on decoding a picture takes longer than handing it to a thread."""


class ImageCache:
    """The pictures last used. Of more than fit, asked for again and again, the first ones are kept."""

    def __init__(self, limit: int) -> None:
        """Args: limit: in bytes; 0 keeps nothing."""
        self.limit = limit
        self._kept: OrderedDict[tuple[Digest, int], Tensor] = OrderedDict()
        self._bytes = 0

    def load(self, paths: Sequence[Path], digests: Sequence[Digest], size: int) -> Tensor:
        """Pictures of one side length: uint8 [n, 3, size, size]; n may be 0.

        Args:
            paths: n picture files.
            digests: their content ids, under which the copies are kept; what is decoded must have them.
            size: side of the result, in pixels.

        Raises:
            UnreadableImageError: names the path and what is wrong with it, another content than the id's too.
        """
        images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
        missing, used = [], set()
        for i, digest in enumerate(digests):
            if (pixels := self._kept.get((digest, size))) is None:
                missing.append(i)
            else:
                self._kept.move_to_end((digest, size))
                used.add((digest, size))
                images[i] = pixels
        decoded = _decoded([paths[i] for i in missing], [digests[i] for i in missing], size)
        for i, pixels in zip(missing, decoded, strict=True):
            images[i] = pixels
            self._keep((digests[i], size), pixels, used)
        return images

    def _keep(self, key: tuple[Digest, int], pixels: Tensor, used: set[tuple[Digest, int]]) -> None:
        """Make room by forgetting what was used longest ago, but nothing that this call has used."""
        while self._bytes + pixels.nbytes > self.limit and len(self._kept) > len(used):
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        if key not in self._kept and self._bytes + pixels.nbytes <= self.limit:
            self._kept[key] = pixels
            self._bytes += pixels.nbytes
            used.add(key)


def _decoded(paths: Sequence[Path], digests: Sequence[Digest], size: int) -> Iterator[Tensor]:
    if size < THREADED_SIZE or len(paths) < 2:
        yield from map(load_pixels, paths, repeat(size), digests)
        return
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        yield from pool.map(load_pixels, paths, repeat(size), digests)
