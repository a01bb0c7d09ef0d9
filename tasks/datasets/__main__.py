"""Materialise a data set: ``python -m tasks.datasets digits --root data/digits``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tasks.datasets.digits import write_digits

WRITERS: dict[str, Callable[[Path], None]] = {"digits": write_digits}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the named data set below ``--root``; 0 when it is there, 1 and one sentence if it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tasks.datasets", description=__doc__)
    parser.add_argument("name", choices=sorted(WRITERS), help="data set to write")
    parser.add_argument("--root", type=Path, required=True, help="folder to write it to")
    parsed = parser.parse_args(arguments)
    try:
        WRITERS[parsed.name](parsed.root)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
