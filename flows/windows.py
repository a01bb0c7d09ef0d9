"""Which denoising step settles what, measured for any generator.

That early steps decide what is shown and late ones how is the premise of the paper's "Preceptural Misalignment
Measurement".
``fscil windows`` draws images whose prompt is swapped after step k, for every k, with pairs of prompts that
differ in one thing (configs/windows), and writes ``windows.md``, ``windows.json``, ``windows.png`` and
``windows.svg``. What is measured is sealed in the state, so a second call draws nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from flows.config import WindowsConfig
from flows.reading import judged, named
from flows.study_plots import draw_windows
from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.swaps import KEPT, SwapSettings, differing, nearness, settled_at, swapped_images
from tasks.loading import generator_digest, generator_identity
from tasks.records import Frozen
from tasks.seeding import seed_for
from tasks.store import StageFolder, Store, digest_of, write_atomic, write_json

VERSION = 1


class Settling(Frozen):
    """How one thing settles along the chain.

    ``kept[k]`` is the share of images nearer to the first prompt's than to the second's when the prompt is
    swapped after k steps; ``read[k]`` the share in which the judge reads the first prompt's value, of the images
    in which it tells the two prompts' own apart. ``same``: images that both prompts drew alike, which are left out.
    """

    what: str
    images: int
    same: int
    kept: tuple[float, ...]
    read: tuple[float, ...] | None

    @property
    def settled(self) -> int | None:
        """The first k from which on at least half keep the first prompt's image; None: never, or no image."""
        return settled_at(self.kept)

    @property
    def settled_read(self) -> int | None:
        """The same by the judge's reading."""
        return settled_at(self.read) if self.read else None


class WindowsMeasure(Frozen):
    """What ``fscil windows`` found for one generator."""

    generator: str
    steps: int
    settlings: tuple[Settling, ...]

    @property
    def border(self) -> float | None:
        """The share of the steps after which everything measured is settled; None if nothing is, or not all.

        Rounded to a step, and at least one step is left on either side.
        """
        settled = [settling.settled for settling in self.settlings if settling.images]
        known = [k for k in settled if k is not None]
        if not known or len(known) < len(settled):
            return None
        return min(max(*known, 1), self.steps - 1) / self.steps


def measure_windows(config: WindowsConfig) -> WindowsMeasure:
    """Measure, or find sealed what was measured before with the same weights and settings.

    Raises:
        ValueError: no such generator or judge, or a generator that draws images of less than 11 pixels.
    """
    config.runtime.apply()
    settings, judge = config.windows, config.windows.judge

    def compute(_: StageFolder) -> WindowsMeasure:
        generator = StableDiffusion.from_settings(config.generator, config.runtime.torch_device)
        settlings = tuple(_settling(generator, settings, what) for what in settings.pairs)
        return WindowsMeasure(
            generator=Path(config.generator.path).name, steps=config.generator.steps, settlings=settlings
        )

    return (
        Store(config.runtime.state)
        .run(
            "windows",
            VERSION,
            settings={
                "windows": settings.model_dump(exclude={"judge"}),
                "generator": generator_identity(config.generator),
            },
            inputs={
                "generator": generator_digest(config.generator),
                "judge": digest_of(Path(judge)) if judge else None,
            },
            seed=settings.seed,
            output=WindowsMeasure,
            compute=compute,
        )
        .output
    )


def _settling(generator: StableDiffusion, settings: SwapSettings, what: str) -> Settling:
    firsts, seconds, seeds = [], [], []
    for first, second in settings.prompts(what):
        firsts += [first] * settings.images
        seconds += [second] * settings.images
        seeds += [seed_for(settings.seed, "windows", first, n) for n in range(settings.images)]
    size = generator.settings.batch
    near, counted = [], []
    right: list[Tensor] = []
    for start in tqdm(range(0, len(seeds), size), desc=f"windows: {what}", disable=None, leave=False):
        part = slice(start, start + size)
        images = swapped_images(generator, firsts[part], seconds[part], seeds[part])
        near.append(nearness(images))
        counted.append(differing(images, settings.least_change))
        if settings.judge:
            right += _read(Path(settings.judge), images, what, firsts[part], seconds[part])
    used = torch.cat(counted)
    return Settling(
        what=what,
        images=int(used.sum()),
        same=int((~used).sum()),
        kept=_shares(torch.cat(near, 1)[:, used] > KEPT),
        read=_told_apart(torch.cat(right, 1)[:, used]) if right else None,
    )


def _read(
    judge: Path, images: Tensor, what: str, firsts: Sequence[str], seconds: Sequence[str]
) -> list[Tensor]:
    """Whether the judge reads the first prompt's value, bool [k, n]; nothing where the prompts name none."""
    wanted, other = (named(prompts, what) for prompts in (firsts, seconds))
    if wanted is None or other is None or any(a == b for a, b in zip(wanted, other, strict=True)):
        return []
    read = judged(judge, images.flatten(0, 1), what)
    found = [value == wanted[i % len(wanted)] for i, value in enumerate(read)]
    return [torch.tensor(found).view(len(images), -1)]


def _told_apart(right: Tensor) -> tuple[float, ...] | None:
    """Shares over the images in which the judge tells the two prompts' own apart; None if there is none."""
    told = right[-1] & ~right[0]
    return _shares(right[:, told]) if told.any() else None


def _shares(found: Tensor) -> tuple[float, ...]:
    """Mean over images of a bool [k, n]; all 0 where n is 0."""
    return tuple(found.double().mean(1).nan_to_num().tolist())


# ------------------------------------------------------------------------------------------ writing


def write_windows(config: WindowsConfig, out: Path) -> list[Path]:
    """Measure, print the table and write it with its plot.

    Args:
        config: what to measure.
        out: folder, made if need be.

    Returns:
        The files written.
    """
    measure = measure_windows(config)
    show_windows(measure)
    write_json(out / "windows.json", measure)
    files: dict[str, str | bytes] = {
        "windows.md": f"{windows_table(measure)}\n\n{NOTE}\n\n{advice(measure)}\n",
        "windows.png": draw_windows(measure, "png"),
        "windows.svg": draw_windows(measure, "svg"),
    }
    for name, content in files.items():
        write_atomic(out / name, content)
    return [out / name for name in ("windows.json", *files)]


HEADINGS = ("what differs", "images", "settled after step", "read as settled", "share kept at step, %")


def show_windows(measure: WindowsMeasure, console: Console | None = None) -> None:
    """Print the table and what it says of the border."""
    console = console or Console()
    table = Table(box=SIMPLE_HEAD, show_edge=False, title=f"{measure.generator}: {measure.steps} steps")
    for heading in HEADINGS[:-1]:
        table.add_column(heading)
    for settling in measure.settlings:
        table.add_row(*_cells(settling)[:-1])
    console.print(table)
    console.print(advice(measure), markup=False, highlight=False, soft_wrap=True)


def windows_table(measure: WindowsMeasure) -> str:
    """The table as Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(_cells(settling) for settling in measure.settlings)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


NOTE = (
    "Prompts that differ in one thing are swapped after step k. Settled: from this k on at least half of the images "
    "are nearer (1 - SSIM) to the first prompt's own image than to the second's; read as settled: the same by a judge "
    "that reads the thing itself."
)


def _cells(settling: Settling) -> tuple[str, ...]:
    if not settling.images:
        return settling.what, f"0 ({settling.same} alike)", "–", "–", "–"
    shown = range(0, len(settling.kept), max(1, (len(settling.kept) - 1) // 10))
    kept = " ".join(f"{k}:{100 * settling.kept[k]:.0f}" for k in shown)
    images = f"{settling.images}" + (f" ({settling.same} alike)" if settling.same else "")
    read = "–" if settling.read is None else _step(settling.settled_read)
    return settling.what, images, _step(settling.settled), read, kept


def _step(k: int | None) -> str:
    return "never" if k is None else str(k)


def advice(measure: WindowsMeasure) -> str:
    """How to set the border between semantic and detail steps, in a sentence."""
    if measure.border is None:
        return (
            "Not everything settled, so no border follows from this: choose prompts that the generator tells apart, "
            "or keep the paper's half, tuning.border=0.5."
        )
    last = round(measure.border * measure.steps)
    late = [s.what for s in measure.settlings if s.images and (s.settled or 0) >= last]
    return (
        f"All of it is settled after step {last} of {measure.steps}, {' and '.join(late)} last: tuning.border="
        f"{measure.border:.3g} makes the steps up to there the semantic ones (the paper's half: 0.5, "
        f"step {measure.steps // 2})."
    )
