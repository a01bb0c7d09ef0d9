"""The weights that come with the project, by digest: damaged ones are named before a run trains on them.

``digests.json`` beside them is written by ``make pretrain``. Weights from elsewhere have no digest to compare with;
theirs is in the run's provenance.
"""

import json
from pathlib import Path

from tasks.store import digest_of, write_json

SHIPPED = Path(__file__).resolve().parent / "weights"


def write_digests() -> None:
    """Write down what the files of all parts are now."""
    files = (path for path in sorted(SHIPPED.glob("*/**/*")) if path.is_file())
    digests = {path.relative_to(SHIPPED).as_posix(): digest_of(path) for path in files}
    write_json(SHIPPED / "digests.json", digests)


def refuse_damaged(path: Path) -> None:
    """See that a part that comes with the project, if ``path`` is one, is as it came.

    Args:
        path: a folder of weights, or a file; any other than the project's own is let pass.

    Raises:
        ValueError: a file is missing or is another; it is named.
    """
    for name, digest in json.loads((SHIPPED / "digests.json").read_text("utf-8")).items():
        file = SHIPPED / name
        if not file.is_relative_to(path.resolve()) or (file.is_file() and digest_of(file) == digest):
            continue
        what = "is not the file that came with the project" if file.is_file() else "is missing"
        raise ValueError(f"{file} {what} (MD5 {digest}): bring it back by `git checkout -- {file}`")
