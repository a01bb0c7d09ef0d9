"""The most memory that a piece of work held, resident in the process and on the GPU; and what to do where it runs out.

Linux keeps a high-water mark that can be reset; elsewhere, or where a container forbids it, nothing is known.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MARK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_MARK = "5"


class PeakMemory:
    """Peaks from its making on. One at a time: a second one starts the marks anew for both."""

    def __init__(self) -> None:
        """Reset both marks."""
        self._resettable = True
        try:
            _MARK.write_text(_RESET_MARK)
        except OSError:
            self._resettable = False
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()

    @property
    def mib(self) -> float | None:
        """MiB resident in this process at most; None where the system does not tell."""
        return resident_mib("VmHWM") if self._resettable else None

    @property
    def gpu_mib(self) -> float | None:
        """MiB allocated by torch on the current GPU at most; None without one in use."""
        cuda = _cuda()
        return None if cuda is None else cuda.max_memory_allocated() / 2**20


def resident_mib(key: str) -> float | None:
    """``VmRSS`` (now) or ``VmHWM`` (at most since the mark was reset) in MiB; None where there is no such line."""
    if not _STATUS.exists():
        return None
    found = re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text())
    return None if found is None else int(found[1]) / 1024


def _cuda() -> Any:
    """``torch.cuda``, if torch has been imported and computes on a GPU here."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


class MemoryShortageError(ValueError):
    """The memory of the machine or of its GPU does not suffice; the message says what to lower."""


@contextmanager
def within_memory(lower: str) -> Iterator[None]:
    """For a block or a function that may ask for more memory than there is.

    Args:
        lower: the settings that make it need less, such as ``tuning.batch or generator.size``.

    Raises:
        MemoryShortageError: Python, torch's CPU allocator or its GPU's had no more to give.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _ran_out(error):
            raise
        said = " ".join(str(error).split())[:200]
        raise MemoryShortageError(f"the memory does not suffice ({said}); lower {lower}") from error


def _ran_out(error: MemoryError | RuntimeError) -> bool:
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or on_gpu or "DefaultCPUAllocator" in str(error)
