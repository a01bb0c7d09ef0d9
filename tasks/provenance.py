"""Who and what made a run: git commit, package versions, digests of config, data and weights.

A file beside the records, never inside them, so that equal work has equal records whichever commit did it.
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tasks.records import Provenance
from tasks.store import canonical

PACKAGES = (
    "torch", "torchvision", "timm", "diffusers", "peft", "transformers", "openai", "prefect", "mlflow", "dvc",
    "hydra-core", "numpy", "pillow", "safetensors",
)  # fmt: skip


def provenance(
    config: Mapping[str, object],
    *,
    data_digest: str,
    weights: Mapping[str, str],
    command: tuple[str, ...],
    device: str,
    threads: int,
) -> Provenance:
    """Describe the code, its inputs and what it computes on as they are now."""
    commit, dirty = _git_state()
    return Provenance(
        git_commit=commit,
        git_dirty=dirty,
        packages=versions(),
        config_digest=config_digest(config),
        data_digest=data_digest,
        weights_digests=dict(weights),
        command=command,
        device=device,
        threads=threads,
    )


def config_digest(config: Mapping[str, object]) -> str:
    """The identity of an experiment's settings, as they stand in its config.json."""
    text = json.dumps(canonical(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The version of each package that can change a result, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def _git_state() -> tuple[str | None, bool | None]:
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
