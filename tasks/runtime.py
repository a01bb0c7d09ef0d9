"""Where and how fast things run. Nothing here may change a result that is recorded as equal."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from tasks.records import Frozen


class RuntimeSettings(Frozen):
    """Device, threads, folders, and how many MiB of decoded pictures are kept; no fingerprint covers them.

    Attributes:
        replace: an earlier run of other settings in the same folder makes way, in place of an error.
        shards: where images are drawn: in this ``process``, or on a ``ray`` cluster.
        address: of a Ray cluster that runs; None for one of this machine, for as long as the run lasts.
        workers: shards under way at once on this machine's own cluster; None: one for each core.
        gpu_runs: experiments that may use one GPU of this machine at once, the others wait; None: no limit.
        gpus_per_shard: GPUs that a shard takes where the cluster has any; 0.5 puts two on one.
    """

    device: Literal["auto", "cpu", "cuda"]
    threads: int | None
    image_cache: int = Field(default=2048, ge=0)
    state: Path
    runs: Path
    replace: bool = False
    gpu_runs: int | None = Field(default=1, ge=1)
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
        """Set the number of intra-op threads, and on the CPU only algorithms whose sums have one order.

        Among the others is the gradient of indexing: its threads add to one row in the order in which they come, so
        that the last bits depend on how busy the machine is. Without ``threads`` the number stays what it is, but is
        set, which tells MKL to keep to it too.
        """
        torch.set_num_threads(self.threads or torch.get_num_threads())
        if self.torch_device.type == "cpu":
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
