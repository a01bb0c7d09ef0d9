"""Which denoising steps a verdict tunes (paper, "Preceptural Misalignment Measurement").

Of the n steps of a chain the noisier half, indices 0 to n/2 - 1, decides what is shown (level ``semantic``);
the cleaner half decides how (level ``detail``). L_LDM draws its timestep from the same half.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from tasks.records import Level

Window = Level | Literal["any"]
StepsRule = Literal["guided", "random", "first"]


def step_window(level: Window, n_steps: int) -> range:
    """Indices of the steps that a level may tune; the two levels share the chain without overlap.

    Raises:
        ValueError: fewer than two steps, which have no halves, or an unknown level.
    """
    if n_steps < 2:
        raise ValueError(f"a chain needs at least 2 steps to have two halves, got {n_steps}")
    half = n_steps // 2
    windows = {"semantic": range(half), "detail": range(half, n_steps), "any": range(n_steps)}
    if level not in windows:
        raise ValueError(f"level {level!r} is unknown; it is one of {', '.join(windows)}")
    return windows[level]


def draw_step(level: Window, n_steps: int, generator: torch.Generator) -> int:
    """One step of the level's window, uniformly. Raises ValueError as :func:`step_window`."""
    window = step_window(level, n_steps)
    return window[int(torch.randint(len(window), (), generator=generator))]


def timestep_range(level: Window, timesteps: Sequence[int], n_train: int) -> range:
    """Training timesteps that belong to a level's half of the chain.

    Args:
        level: whose half.
        timesteps: the chain's timesteps, noisiest first.
        n_train: how many timesteps the model was trained on (1000).

    Returns:
        A range within 0..n_train-1 that holds the timesteps of the level's own steps.
    """
    border = int(timesteps[step_window("detail", len(timesteps))[0]]) + 1
    ranges = {"semantic": range(border, n_train), "detail": range(border), "any": range(n_train)}
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
