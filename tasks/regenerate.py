"""Stage 6, regenerate (paper: Implementation Details; Eq. 4).

Reads:   the slots of the next set (prompts and what they double), adapter k+1.
Returns: AugmentationSet - references to the images and to the manifest that can draw them again.
Writes:  images/<class name>/<slot>.<format>  manifest.jsonl, shard by shard, so that a kill loses at most one shard
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.augmentation import AugmenterSettings, Slot, first_slots, image_id, next_slots
from tasks.collapse import refuse_collapse
from tasks.context import EpochContext
from tasks.images import Format
from tasks.loading import (
    DrawerSettings,
    augmented_images,
    drawn_tensors,
    generator_digest,
    generator_identity,
    price_of,
    redraws,
    session_of,
)
from tasks.memory import within_memory
from tasks.progress import stage_bar
from tasks.records import ArtifactRef, AugmentationSet, AugmentedImage, Digest, StageRecord, Verdict
from tasks.seeding import seed_for
from tasks.shards import Order, Shard, draw_shards
from tasks.store import StageFolder, StoreError, digest_of, fingerprint, read_lines, write_lines

VERSION = 1

log = logging.getLogger("fscil.regenerate")


@task(
    name="regenerate",
    task_run_name="regenerate · session {context.session} · A_{epoch}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def regenerate(
    context: EpochContext,
    epoch: int,
    augmenter: AugmenterSettings,
    generator: DrawerSettings,
    adapter: ArtifactRef | None,
    verdicts: ArtifactRef | None,
) -> StageRecord[AugmentationSet]:
    """Draw A_epoch: A_0 from the session's classes, later sets from the slots and verdicts of the one before.

    Args:
        context: the epoch that ends (or, for A_0, the session's first).
        epoch: whose set is drawn.
        augmenter: how many images and which first prompt.
        generator: what draws them.
        adapter: the LoRA to draw with; None for the base generator.
        verdicts: rewritten prompts, if the VLM was asked.
    """
    slots = slots_of(context, epoch, augmenter, verdicts)
    place = (context.session, epoch) if redraws(generator) else (0, 0)
    seeds = [seed_for(context.seed, *place, "regenerate", slot.id) for slot in slots]
    inputs: dict[str, Digest | None] = {
        "slots": _slots_digest(slots, context.class_names),
        "adapter": adapter.digest if adapter else None,
        "generator": generator_digest(generator),
    }

    @within_memory("generator.size")
    def compute(work: StageFolder) -> AugmentationSet:
        rows, batch = _draw_shards(context, epoch, work.path, slots, seeds, generator, adapter)
        seen = drawn_tensors(context, work.path / "images", rows)
        refuse_collapse(seen, rows, context.class_names, adapted=adapter is not None)
        write_lines(work.path / "manifest.jsonl", rows)
        return AugmentationSet(
            epoch=epoch,
            adapter=adapter.digest if adapter else None,
            images=work.ref("images", "images"),
            manifest=work.ref("manifest.jsonl", "manifest"),
            count=len(rows),
            batch_shape=(batch, 3, generator.size, generator.size),
            usage=price_of(context, generator, rows),
        )

    return context.store.run(
        "regenerate",
        VERSION,
        settings={"generator": generator_identity(generator), "session": context.session, "epoch": epoch},
        inputs=inputs,
        seed=context.seed,
        output=AugmentationSet,
        compute=compute,
        keep_partial=True,
        scrap="shard-*.jsonl",
    )


def slots_of(
    context: EpochContext, epoch: int, augmenter: AugmenterSettings, verdicts: ArtifactRef | None
) -> list[Slot]:
    """The slots of A_epoch, from the set the context starts with and the verdicts on it."""
    earlier = augmented_images(context)
    if epoch == 0:
        return first_slots(session_of(context), context.class_names, augmenter, earlier)
    rows = read_lines(context.store.locate(verdicts), Verdict) if verdicts else []
    return next_slots(earlier, {verdict.augmented_id: verdict for verdict in rows})


def _slots_digest(slots: Sequence[Slot], class_names: Sequence[str]) -> Digest:
    content = {"slots": [slot.model_dump() for slot in slots], "names": list(class_names)}
    return Digest(fingerprint("slots", 1, content, {}, 0))


def _draw_shards(
    context: EpochContext,
    epoch: int,
    folder: Path,
    slots: Sequence[Slot],
    seeds: Sequence[int],
    generator: DrawerSettings,
    adapter: ArtifactRef | None,
) -> tuple[list[AugmentedImage], int]:
    """The rows of all images, and how many were drawn at once.

    One number holds for the whole set, of which a batch that did not fit the memory leaves a smaller one: then the
    set is begun anew.
    """

    def row_of(number: int) -> AugmentedImage:
        return _row(context, epoch, folder, generator.format, slots[number], seeds[number])

    batch = _batch_so_far(folder, generator.batch)
    starts = range(0, len(slots), generator.batch)
    held = {start: range(start, min(start + generator.batch, len(slots))) for start in starts}
    _drop_damaged(folder, batch, held, row_of)
    order = Order(context=context, generator=generator, adapter=adapter)
    place = f"session {context.session} epoch {epoch}"
    with stage_bar("drawing", place, "image", len(slots)) as at:
        while missing := [start for start in starts if not _marker(folder, batch, start).is_file()]:
            kept = len(starts) - len(missing)
            at("", min(kept * generator.batch, len(slots)), len(slots))
            shards = [_shard(slots, seeds, start, generator.batch, batch) for start in missing]
            with closing(draw_shards(order, shards)) as drawing:
                for drawn in drawing:
                    anew = drawn.batch < batch and kept > 0
                    batch = min(batch, drawn.batch)
                    if anew:
                        break
                    if drawn.batch == batch:  # else a worker with more memory, to be asked again
                        numbers = range(drawn.start, drawn.start + len(drawn.files))
                        names = [_path_of(context, slots[number], generator.format) for number in numbers]
                        _keep(folder / "images", names, drawn.files)
                        write_lines(_marker(folder, batch, drawn.start), map(row_of, numbers))
                        kept += 1
                        at("", min(kept * generator.batch, len(slots)), len(slots))
    done = [read_lines(_marker(folder, batch, start), AugmentedImage) for start in starts]
    return [row for rows in done for row in rows], batch


def _shard(slots: Sequence[Slot], seeds: Sequence[int], start: int, size: int, batch: int) -> Shard:
    prompts = tuple(slot.prompt for slot in slots[start : start + size])
    return Shard(start=start, prompts=prompts, seeds=tuple(seeds[start : start + size]), batch=batch)


def _marker(folder: Path, batch: int, start: int) -> Path:
    return folder / f"shard-{batch}-{start:06d}.jsonl"


def _drop_damaged(
    folder: Path, batch: int, held: Mapping[int, range], row_of: Callable[[int], AugmentedImage]
) -> None:
    """Forget shards of an attempt that was cut off which are not what was drawn; they are drawn again."""
    for marker in folder.glob(f"shard-{batch}-*.jsonl"):
        start = int(marker.stem.split("-")[2])
        try:
            rows = read_lines(marker, AugmentedImage)
            whole = rows == [row_of(number) for number in held[start]]
        except (StoreError, KeyError):
            whole = False
        if not whole:
            log.warning("%s of an attempt that was cut off is damaged and will be drawn again", marker)
            marker.unlink()


def _batch_so_far(folder: Path, wanted: int) -> int:
    """How many images an attempt that was killed drew at once in the end, else as many as wanted."""
    return min([wanted, *(int(shard.name.split("-")[1]) for shard in folder.glob("shard-*-*.jsonl"))])


def _path_of(context: EpochContext, slot: Slot, kind: Format) -> str:
    return f"{context.class_names[slot.label]}/{slot.id}.{kind}"


def _keep(images: Path, names: Sequence[str], files: Sequence[bytes]) -> None:
    for name, content in zip(names, files, strict=True):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(content)


def _row(
    context: EpochContext, epoch: int, folder: Path, kind: Format, slot: Slot, seed: int
) -> AugmentedImage:
    """What the manifest says of an image whose file is there."""
    path = _path_of(context, slot, kind)
    return AugmentedImage(
        id=image_id(context.session, epoch, slot.id),
        slot=slot.id,
        source_id=slot.source_id,
        label=slot.label,
        prompt=slot.prompt,
        seed=seed,
        path=path,
        digest=digest_of(folder / "images" / path),
        parent_id=slot.parent_id,
    )
