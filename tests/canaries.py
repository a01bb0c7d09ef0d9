"""Keys planted in the environment of a command, and where they are found afterwards: nowhere."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

CANARIES = {
    name: f"canary-{number}-8f3e-{name.lower().replace('_', '-')}"
    for number, name in enumerate(
        (
            "OPENAI_API_KEY", "SOME_VENDORS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
            "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DVC_STUDIO_TOKEN",
        )
    )
}  # fmt: skip


def holding(folder: Path) -> Iterator[tuple[str, str]]:
    """Files below a folder, and rows of its databases, that hold a planted key."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            text = path.read_bytes()
            yield from ((str(path), name) for name, key in CANARIES.items() if key.encode() in text)
        if path.suffix == ".db":
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
                dump = "\n".join(database.iterdump())
            yield from ((f"{path}, a row", name) for name, key in CANARIES.items() if key in dump)
