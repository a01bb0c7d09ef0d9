"""Materialise a data set: ``python -m tasks.datasets cub200 --root data/cub200``, or ``make data DATASET=cub200``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.datasets import layouts
from tasks.datasets.digits import write_digits
from tasks.datasets.materialise import Origin, materialise
from tasks.datasets.sources import SOURCES
from tasks.disk import writing

VERSION_IT = "`dvc add data` puts it under version control"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the named data set below ``--root``; 0 when it is there, 1 and one sentence if it cannot be."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    origin = Origin(parsed.archive, parsed.lists, parsed.sha256)
    if parsed.name == "digits" and any(origin):
        parser.error("digits are not fetched: they ship with the installed packages")
    try:
        with writing(parsed.root):
            if parsed.name == "digits":
                write_digits(parsed.root)
            else:
                materialise(parsed.name, parsed.root, origin, print)
                print(VERSION_IT)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.datasets",
        description=__doc__,
        epilog=layouts.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(("digits", *SOURCES)), help="data set to write")
    parser.add_argument("--root", type=Path, required=True, help="folder to write it to")
    parser.add_argument(
        "--from", dest="archive", help="address or path of the archive, in place of the usual one"
    )
    parser.add_argument(
        "--lists", help="address or path of the folder of the session lists, in place of the usual"
    )
    parser.add_argument("--sha256", help="digest that the archive must have, in place of the published one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
