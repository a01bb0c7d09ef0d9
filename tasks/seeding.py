"""Randomness enters by argument: seeds are derived by content, never counted and never global.

``seed_for(run_seed, session, epoch, stage, item)`` is a sha256 of its arguments, so that resuming,
sharding or reordering work cannot shift a seed, and ``PYTHONHASHSEED`` changes nothing.
"""

import hashlib
import json

import torch

SEED_BITS = 63


def seed_for(*parts: int | str) -> int:
    """Derive a seed in [0, 2**63) from the run's seed and the names of what is drawn.

    Args:
        parts: run seed, session, epoch, stage, item - whatever names the draw, in that order.

    Raises:
        ValueError: no parts, or a part that is neither int nor str.
    """
    if not parts:
        raise ValueError("seed_for needs at least one part, got none")
    for part in parts:
        if not isinstance(part, int | str):
            raise ValueError(f"seed_for takes ints and strings, got {part!r} of {type(part).__name__}")
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> (64 - SEED_BITS)


def torch_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``seed_for(*parts)``; CPU noise is the same on every device."""
    return torch.Generator("cpu").manual_seed(seed_for(*parts))
