"""Replay: draw an epoch's images again from its adapter, prompts and seeds, and compare.

Works from a results folder alone: the manifest names every image's prompt and seed, the record names
the adapter by digest, and the adapter is found by that digest in the run's folders.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from prefect import flow
from tqdm import tqdm

from flows.config import stored_config
from tasks.diffusion.checkpoint import weights_digest
from tasks.diffusion.generator import StableDiffusion
from tasks.images import encoded, load_image
from tasks.records import AugmentationSet, AugmentedImage, Digest, EpochRecord, Frozen, StageRecord
from tasks.store import digest_of, read_json, read_lines

Set = StageRecord[AugmentationSet]


class ReplayError(RuntimeError):
    """The folder cannot be replayed; the message says what is missing."""


class Difference(Frozen):
    """One image that came out otherwise; ``psnr`` in dB, infinity if only the file's bytes differ."""

    image_id: str
    psnr: float


class ReplayReport(Frozen):
    """What a replay found."""

    folder: str
    images: int
    identical: int
    differences: tuple[Difference, ...]
    same_weights: bool

    @property
    def equal(self) -> bool:
        """Whether every image came out bit for bit."""
        return self.identical == self.images

    def sentence(self) -> str:
        """The report in words."""
        if self.equal:
            return f"identical: {self.images} of {self.images} images of {self.folder}"
        worst = min(d.psnr for d in self.differences)
        why = "" if self.same_weights else "; the base generator's weights are not those of the record"
        return f"differs: {self.identical} of {self.images} images identical, worst PSNR {worst:.1f} dB{why}"


@flow(name="replay", persist_result=False)
def replay(folder: Path) -> ReplayReport:
    """Draw the images of an epoch folder (or of a session's ``initial`` folder) again and compare.

    Raises:
        ReplayError: no record, no images or no adapter there.
    """
    drawn, config = _set_of(folder), stored_config(folder)
    if config.images_api is not None:
        raise ReplayError(
            f"the images of {folder} come from {config.images_api.model}, which takes no seed to draw by"
        )
    rows = read_lines(folder / "manifest.jsonl", AugmentedImage)
    settings = config.generator.model_copy(update={"batch": drawn.output.batch_shape[0]})
    generator = StableDiffusion.from_settings(settings, config.runtime.torch_device)
    generator.use_adapter(_adapter_folder(folder, drawn.output.adapter))
    same_weights = weights_digest(settings.source) == drawn.inputs["generator"]
    differences = []
    for row, image in _redrawn(generator, rows, settings.batch):
        if (difference := _compare(folder / "images" / row.path, row, image)) is not None:
            differences.append(difference)
    return ReplayReport(
        folder=str(folder),
        images=len(rows),
        identical=len(rows) - len(differences),
        differences=tuple(differences),
        same_weights=same_weights,
    )


def _set_of(folder: Path) -> Set:
    record = folder / "record.json"
    if not record.is_file():
        raise ReplayError(
            f"{folder} holds no record.json; give an epoch folder such as runs/.../session-00/epoch-000"
        )
    content = read_json(record)
    if content.get("stage") == "regenerate":
        return Set.model_validate(content)
    drawn = EpochRecord.model_validate(content).regenerate
    if drawn is None:
        raise ReplayError(
            f"{folder} drew no images: its augmenter has none, or it was the session's last epoch"
        )
    return drawn


def _adapter_folder(folder: Path, wanted: Digest | None) -> Path | None:
    if wanted is None:
        return None
    run = folder.resolve().parent.parent
    for candidate in sorted(run.glob("session-*/epoch-*/adapter")):
        if digest_of(candidate) == wanted:
            return candidate
    raise ReplayError(f"adapter {wanted} is in no epoch folder below {run}")


def _redrawn(
    generator: StableDiffusion, rows: list[AugmentedImage], batch: int
) -> Iterator[tuple[AugmentedImage, torch.Tensor]]:
    for start in tqdm(range(0, len(rows), batch), desc="redrawing", disable=None, leave=False):
        part = rows[start : start + batch]
        yield from zip(part, generator.draw([r.prompt for r in part], [r.seed for r in part]), strict=True)


def _compare(stored: Path, row: AugmentedImage, image: torch.Tensor) -> Difference | None:
    if stored.is_file() and stored.read_bytes() == encoded(image, stored.suffix):
        return None
    if not stored.is_file():
        return Difference(image_id=row.id, psnr=0.0)
    error = torch.mean((load_image(stored, None) - image) ** 2).item()
    return Difference(image_id=row.id, psnr=-10 * math.log10(error) if error else math.inf)
