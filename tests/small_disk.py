"""A disk of a few KiB or MiB, where this process may mount one; and how to fill it."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A tmpfs at ``path``."""

    def __init__(self, path: Path, kib: int) -> None:
        self.path, self.kib = path, kib

    def grow(self, kib: int) -> None:
        """Make space."""
        self.kib += kib
        subprocess.run(["mount", "-o", f"remount,size={self.kib}k", str(self.path)], check=True)

    def make_read_only(self, yes: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'ro' if yes else 'rw'}", str(self.path)], check=True)

    def fill(self) -> Path:
        """Use up what is free; deleting the file that is returned makes space again."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                return ballast


@contextmanager
def small_disk(path: Path, kib: int) -> Iterator[SmallDisk]:
    """A tmpfs of so many KiB for as long as the block lasts; the test is skipped where none may be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "fscil-test", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(path, kib)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
