"""Where and how fast things run. Nothing here may change a result that is recorded as equal."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from tasks.records import Frozen


class RuntimeSettings(Frozen):
    """Device, threads, folders, and how many MiB of decoded pictures are kept; no fingerprint covers them.

    Attributes:
        shards: where images are drawn: in this ``process``, or on a ``ray`` cluster.
        address: of a Ray cluster that runs; None for one of this machine, for as long as the run lasts.
        workers: shards under way at once on this machine's own cluster; None: one for each core.
        gpus_per_shard: GPUs that a shard takes where the cluster has any; 0.5 puts two on one.
    """

    device: Literal["auto", "cpu", "cuda"]
    threads: int | None
    image_cache: int = Field(default=2048, ge=0)
    state: Path
    runs: Path
    shards: Literal["process", "ray"] = "process"
    address: str | None = None
    workers: int | None = Field(default=None, ge=1)
    gpus_per_shard: float = Field(default=1, ge=0)

    @property
    def torch_device(self) -> torch.device:
        """The device to compute on.

        Raises:
            ValueError: ``cuda`` was asked for and there is none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("runtime.device=cuda, but torch sees no CUDA device; use runtime.device=cpu")
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def apply(self) -> None:
        """Set the number of intra-op threads; without one given, to what it is.

        Setting it tells MKL to keep to it. Otherwise MKL takes fewer where the machine is busy, and sums in another
        order: the same run would then differ in the last bits.
        """
        torch.set_num_threads(self.threads or torch.get_num_threads())
