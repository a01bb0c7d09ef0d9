"""Which denoising steps a verdict tunes (paper, "Preceptural Misalignment Measurement").

Of the n steps of a chain the noisier part, by default the half, indices 0 to n/2 - 1, decides what is shown
(level ``semantic``); the cleaner part decides how (level ``detail``). L_LDM draws its timestep from the same
part. Where the border really lies is a matter of the generator: ``fscil windows`` measures it.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from tasks.records import Level

Window = Level | Literal["any"]
StepsRule = Literal["guided", "random", "first"]


def step_window(level: Window, n_steps: int, border: float) -> range:
    """Indices of the steps that a level may tune; the two levels share the chain without overlap.

    Args:
        level: whose steps.
        n_steps: length of the chain.
        border: the semantic level's share of the steps, in (0, 1); rounded down, but each level has a step.

    Raises:
        ValueError: fewer than two steps, which cannot be shared, an unknown level, or a border out of range.
    """
    if n_steps < 2:
        raise ValueError(f"a chain needs at least 2 steps to have two parts, got {n_steps}")
    if not 0 < border < 1:
        raise ValueError(f"border must lie between 0 and 1, got {border}; the paper's half is 0.5")
    first = min(max(math.floor(border * n_steps + 1e-9), 1), n_steps - 1)
    windows = {"semantic": range(first), "detail": range(first, n_steps), "any": range(n_steps)}
    if level not in windows:
        raise ValueError(f"level {level!r} is unknown; it is one of {', '.join(windows)}")
    return windows[level]


def draw_step(level: Window, n_steps: int, border: float, generator: torch.Generator) -> int:
    """One step of the level's window, uniformly. Raises ValueError as :func:`step_window`."""
    window = step_window(level, n_steps, border)
    return window[int(torch.randint(len(window), (), generator=generator))]


def timestep_range(level: Window, timesteps: Sequence[int], border: float, n_train: int) -> range:
    """Training timesteps that belong to a level's part of the chain.

    Args:
        level: whose part.
        timesteps: the chain's timesteps, noisiest first.
        border: the semantic level's share of the steps, in (0, 1).
        n_train: how many timesteps the model was trained on (1000).

    Returns:
        A range within 0..n_train-1 that holds the timesteps of the level's own steps.
    """
    first = int(timesteps[step_window("detail", len(timesteps), border)[0]]) + 1
    ranges = {"semantic": range(first, n_train), "detail": range(first), "any": range(n_train)}
    return ranges[level]


def window_of(rule: StepsRule, level: Level) -> Window:
    """The window that a tuning rule gives an example: the verdict's, any step, or always the first half.

    Raises:
        ValueError: an unknown rule.
    """
    windows: dict[str, Window] = {"guided": level, "random": "any", "first": "semantic"}
    if rule not in windows:
        raise ValueError(f"steps_rule {rule!r} is unknown; it is one of {', '.join(windows)}")
    return windows[rule]
