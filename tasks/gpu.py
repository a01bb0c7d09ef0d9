"""How many experiments share a GPU of this machine: each holds a slot of it for as long as it runs.

A slot is a file lock in the user's cache, named by the GPU's own id, so that clones and environments agree. The kernel
frees it when its holder dies, however it dies: nobody waits for a slot that a killed run still seems to hold, as they
would with a lease on a server.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import Timeout

from tasks.disk import Lock, writing
from tasks.runtime import RuntimeSettings

POLL_S = 1.0


@contextmanager
def gpu_held(runtime: RuntimeSettings, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a slot of the GPU to compute on; on the CPU, or without a limit, nothing is held.

    Args:
        runtime: its device, and how many experiments may use one GPU.
        say: told one sentence if this one has to wait.

    Raises:
        DiskError: the user's cache cannot be written to.
    """
    device = runtime.torch_device
    if device.type != "cuda" or runtime.gpu_runs is None:
        yield
        return
    gpu = torch.cuda.get_device_properties(device)
    with slot_held(slots_folder(), str(gpu.uuid), runtime.gpu_runs, gpu.name, say):
        yield


@contextmanager
def slot_held(folder: Path, gpu: str, limit: int, name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold one of a GPU's slots, the first that is or becomes free."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    slots = [Lock(folder / f"{gpu}-{number}.lock") for number in range(limit)]
    waiting = False
    while (slot := _first_free(slots)) is None:
        if not waiting:
            say(f"waits for the GPU ({name}): runtime.gpu_runs={limit} and so many experiments use it")
            waiting = True
        time.sleep(POLL_S)
    try:
        yield
    finally:
        slot.release()


def slots_folder() -> Path:
    """Below the user's cache, which all clones on this machine share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fscil" / "gpus"


def _first_free(slots: list[Lock]) -> Lock | None:
    for slot in slots:
        try:
            slot.acquire(blocking=False)
        except Timeout:
            continue
        return slot
    return None
