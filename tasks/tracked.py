"""What of the records MLflow shows: metrics, tags, tables and contact sheets. Pure; knows no MLflow client.

The names made here are stable: charts, saved views and searches in MLflow refer to them.
"""

import hashlib
import json
import math
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from tasks.images import READ_FORMATS
from tasks.records import (
    AugmentationSet,
    AugmentedImage,
    EpochRecord,
    ExperimentRecord,
    Provenance,
    SessionAccuracy,
    Usage,
    Verdict,
)
from tasks.store import artifacts_of
from tasks.text import readable

STAGES = ("train", "evaluate", "mine", "compare", "tune", "regenerate")
LONGEST_NAME = 100  # characters of a class's name in a file's name, which holds more and ends at 255
CAPTION_CHARS = 2000  # of a VLM's caption in a table or on a page
_THUMBNAIL = 256  # pixels of the small copy that MLflow's UI shows beside each image

# ------------------------------------------------------------------------------------------ metrics


def stage_metrics(record: EpochRecord) -> dict[str, dict[str, float]]:
    """The metrics of each stage that ran, by their stable names.

    Accuracies are in [0, 1] and left out where nothing was counted; ``tune/<name>`` is the mean over the
    epoch's updates; values that are not finite are left out.
    """
    drawn = _drawn_metrics(record.regenerate.output) if record.regenerate else {}
    found: dict[str, Mapping[str, float]] = {
        "train": _train_metrics(record),
        "evaluate": _evaluate_metrics(record),
        "mine": _mine_metrics(record),
        "compare": _compare_metrics(record),
        "tune": _tune_metrics(record),
        "regenerate": drawn,
    }
    return {stage: _finite(metrics) for stage, metrics in found.items() if metrics}


def _drawn_metrics(drawn: AugmentationSet) -> dict[str, float]:
    asked = drawn.usage.model_dump() if drawn.usage.calls else {}
    return {"regenerate/images": drawn.count} | {f"regenerate/{name}": value for name, value in asked.items()}


def _train_metrics(record: EpochRecord) -> dict[str, float]:
    out = record.train.output
    losses = {"train/loss": out.losses[-1]} if out.losses else {}
    return losses | {"train/originals": out.originals, "train/generated": out.generated}


def _evaluate_metrics(record: EpochRecord) -> dict[str, float]:
    out = record.evaluate.output
    found: dict[str, float] = {}
    for name, accuracy in (("validation", out.validation), ("augmented", out.augmented)):
        if any(count.total for count in accuracy.counts):
            found[f"evaluate/{name}_accuracy"] = accuracy.overall
            found[f"evaluate/{name}_images"] = sum(count.total for count in accuracy.counts)
    return found


def _mine_metrics(record: EpochRecord) -> dict[str, float]:
    if record.mine is None:
        return {}
    out = record.mine.output
    failures, candidates = sum(out.failures.values()), sum(out.candidates.values())
    return {"mine/failures": failures, "mine/candidates": candidates, "mine/filtered": out.filtered}


def _compare_metrics(record: EpochRecord) -> dict[str, float]:
    if record.compare is None:
        return {}
    out = record.compare.output
    counts = {name: getattr(out, name) for name in ("semantic", "detail", "unparsed", "rewritten")}
    return {f"compare/{name}": value for name, value in (counts | out.usage.model_dump()).items()}


def _tune_metrics(record: EpochRecord) -> dict[str, float]:
    if record.tune is None:
        return {}
    out = record.tune.output
    means = {
        f"tune/{plain(name)}": sum(values) / len(values) for name, values in out.series.items() if values
    }
    return means | {"tune/updates": out.updates}


def accuracy_metrics(accuracy: SessionAccuracy) -> dict[str, float]:
    """Test accuracies after a session, in [0, 1]; novel and harmonic only once there are novel classes."""
    found = {
        "test/accuracy": accuracy.overall,
        "test/base": accuracy.base,
        "test/novel": accuracy.novel,
        "test/harmonic": accuracy.harmonic,
    }
    return {name: value for name, value in found.items() if value is not None}


def result_metrics(record: ExperimentRecord) -> dict[str, float]:
    """The experiment's summary: ``result/*`` in [0, 1] and ``budget/*`` as counts."""
    results = {"A_base": record.a_base, "A_last": record.a_last, "A_avg": record.a_avg, "PD": record.pd}
    budget = {"images_drawn": record.images_drawn, "epochs": record.epochs, **_usage(record.usage)}
    budget["vlm_unparsed"] = record.unparsed
    if record.drawing.calls:
        budget |= {f"drawing_{name}": value for name, value in record.drawing.model_dump().items()}
    return {f"result/{k}": v for k, v in results.items()} | {
        f"budget/{k}": float(v) for k, v in budget.items()
    }


def _usage(usage: Usage) -> dict[str, float]:
    return {f"vlm_{name}": value for name, value in usage.model_dump().items()}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def plain(name: str) -> str:
    """A name with only the characters that MLflow takes everywhere; others become ``-``."""
    return re.sub(r"[^A-Za-z0-9_\-. ]", "-", name)


def distinct(name: str) -> str:
    """:func:`plain` and short, with a mark of the whole name where something was lost: ``é`` and ``ü`` stay two."""
    shown = plain(name)[:LONGEST_NAME]
    return shown if shown == name else f"{shown}-{content_id(name)[:6]}"


# ------------------------------------------------------------------------------------------ params, tags


def flat(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``group.name`` to text; lists as JSON, None as ``null``."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[plain(f"{prefix}{key}")] = (
                value if isinstance(value, str) else json.dumps(value, default=str)
            )
    return found


def provenance_tags(origin: Provenance) -> dict[str, str]:
    """Who and what made a run, as tags; what is unknown is left out."""
    tags = {
        "mlflow.source.git.commit": origin.git_commit,
        "git.dirty": None if origin.git_dirty is None else str(origin.git_dirty).lower(),
        "digest.config": origin.config_digest,
        "digest.data": origin.data_digest,
        "command": " ".join(origin.command),
    }
    tags |= {f"digest.weights.{name}": digest for name, digest in origin.weights_digests.items()}
    tags |= {f"package.{name}": version for name, version in origin.packages.items()}
    return {key: value for key, value in tags.items() if value is not None}


# ------------------------------------------------------------------------------------------ tables and grids


def prompt_table(rows: Iterable[AugmentedImage]) -> dict[str, object]:
    """One line a generated image, in the layout that MLflow's table view reads."""
    columns = ["class", "slot", "prompt", "seed", "image", "doubles"]
    data = [[class_of(row), row.slot, row.prompt, str(row.seed), row.path, row.source_id] for row in rows]
    return {"columns": columns, "data": data}


def verdict_table(verdicts: Iterable[Verdict], classes: Mapping[int, str]) -> dict[str, object]:
    """One line a verdict: level, the next prompt, and the comparison that decided it (Eq. 1, 2).

    Args:
        verdicts: the epoch's verdicts.
        classes: class name by label; a label that is not in it is shown as its number.
    """
    columns = [
        "class", "augmented", "level", "inherited from", "next prompt", "answers", "caption of generated",
        "caption of original",
    ]  # fmt: skip
    data: list[list[object]] = []
    for verdict in verdicts:
        shown = sorted(verdict.comparisons, key=lambda comparison: comparison.answer != "different")[:1]
        captions = [shown[0].caption_augmented, shown[0].caption_original] if shown else ["", ""]
        captions = [readable(caption, CAPTION_CHARS) for caption in captions]
        answers = " ".join(comparison.answer for comparison in verdict.comparisons)
        name = classes.get(verdict.label, str(verdict.label))
        data.append([
            name, verdict.augmented_id, verdict.level, verdict.inherited_from, verdict.prompt_next, answers,
            *captions,
        ])  # fmt: skip
    return {"columns": columns, "data": data}


def class_of(row: AugmentedImage) -> str:
    """The class's name, which is the folder of its images."""
    return row.path.split("/", 1)[0]


def by_class(rows: Iterable[AugmentedImage]) -> dict[str, list[AugmentedImage]]:
    """Images by class name, each class in slot order, so that a slot keeps its place through the epochs."""
    found: dict[str, list[AugmentedImage]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.slot):
        found[class_of(row)].append(row)
    return dict(sorted(found.items()))


def contact_sheet(paths: list[Path], side: int) -> Image.Image:
    """Tile images row by row into a sheet as square as may be; each tile is ``side`` pixels."""
    columns = math.ceil(math.sqrt(len(paths)))
    gap = max(1, side // 32)
    rows = math.ceil(len(paths) / columns)
    sheet = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), (128, 128, 128))
    for place, path in enumerate(paths):
        with Image.open(path, formats=READ_FORMATS) as opened:
            small = max(opened.size) < side
            tile = opened.convert("RGB").resize(
                (side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            )
        sheet.paste(tile, (place % columns * (side + gap), place // columns * (side + gap)))
    return sheet


def digest_tags(record: EpochRecord) -> dict[str, str]:
    """``dvc.md5.e003.adapter`` and so on: the ids by which DVC knows an epoch's files; images have theirs."""
    stages = [getattr(record, stage) for stage in STAGES if stage != "regenerate"]
    refs = [ref for sealed in stages if sealed is not None for ref in artifacts_of(sealed.output)]
    return {f"dvc.md5.e{record.epoch:03d}.{ref.kind}": ref.digest for ref in refs}


def save_series(
    sheet: Image.Image, folder: Path, key: str, images: AugmentationSet, timestamp_ms: int
) -> None:
    """Save a picture and its small copy under the names by which MLflow's UI makes a series of a key."""
    mark = uuid.UUID(hex=content_id(f"{key} {images.epoch} {images.images.digest}")[:32])
    stem = f"{key}+step+{images.epoch}+timestamp+{timestamp_ms}+{mark}"
    sheet.save(folder / f"{stem}.png")
    small = sheet.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    small.save(folder / f"{stem}+compressed.webp")


def content_id(text: str) -> str:
    """64 hexadecimal digits that name a text."""
    return hashlib.sha256(text.encode()).hexdigest()
