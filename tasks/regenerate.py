"""Stage 6, regenerate (paper: Implementation Details; Eq. 4).

Reads:   the slots of the next set (prompts and what they double), adapter k+1.
Returns: AugmentationSet - references to the images and to the manifest that can draw them again.
Writes:  images/<class name>/<slot>.<format>  manifest.jsonl, shard by shard, so that a kill loses at most one shard
"""

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from tqdm import tqdm

from tasks.augmentation import AugmenterSettings, Slot, first_slots, image_id, next_slots
from tasks.context import EpochContext
from tasks.images import Format, encoded
from tasks.loading import (
    DrawerSettings,
    augmented_images,
    drawer_for,
    generator_digest,
    generator_identity,
    price_of,
    redraws,
    session_of,
)
from tasks.records import ArtifactRef, AugmentationSet, AugmentedImage, Digest, StageRecord, Verdict
from tasks.seeding import seed_for
from tasks.store import StageFolder, digest_of, fingerprint, read_lines, write_lines

VERSION = 1


@task(name="regenerate", cache_policy=NO_CACHE, persist_result=False)
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

    def compute(work: StageFolder) -> AugmentationSet:
        rows, batch = _draw_shards(context, epoch, work.path, slots, seeds, generator, adapter)
        write_lines(work.path / "manifest.jsonl", rows)
        for shard in sorted(work.path.glob("shard-*.jsonl")):
            shard.unlink()
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
    rows: list[AugmentedImage] = []
    batch, start = _batch_so_far(folder, generator.batch), 0
    title = f"session {context.session} epoch {epoch}: drawing"
    with tqdm(total=len(slots), desc=title, unit="image", disable=None, leave=False) as bar:
        while start < len(slots):
            stop = min(start + generator.batch, len(slots))
            if not _marker(folder, batch, start).is_file():
                model = drawer_for(context, generator, adapter)
                model.batch = min(model.batch, batch)
                images = model.draw([slot.prompt for slot in slots[start:stop]], list(seeds[start:stop]))
                if model.batch < batch:
                    batch = model.batch
                    if start > 0:
                        rows, start = [], 0
                        bar.reset()
                        continue
                drawn = zip(slots[start:stop], seeds[start:stop], images, strict=True)
                kept = [_keep(context, epoch, folder, generator.format, *one) for one in drawn]
                write_lines(_marker(folder, batch, start), kept)
            rows += read_lines(_marker(folder, batch, start), AugmentedImage)
            bar.update(stop - start)
            start = stop
    return rows, batch


def _marker(folder: Path, batch: int, start: int) -> Path:
    return folder / f"shard-{batch}-{start:06d}.jsonl"


def _batch_so_far(folder: Path, wanted: int) -> int:
    """How many images an attempt that was killed drew at once in the end, else as many as wanted."""
    return min([wanted, *(int(shard.name.split("-")[1]) for shard in folder.glob("shard-*-*.jsonl"))])


def _keep(
    context: EpochContext, epoch: int, folder: Path, kind: Format, slot: Slot, seed: int, image: Tensor
) -> AugmentedImage:
    path = f"{context.class_names[slot.label]}/{slot.id}.{kind}"
    target = folder / "images" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(encoded(image, target.suffix))
    return AugmentedImage(
        id=image_id(context.session, epoch, slot.id),
        slot=slot.id,
        source_id=slot.source_id,
        label=slot.label,
        prompt=slot.prompt,
        seed=seed,
        path=path,
        digest=digest_of(target),
        parent_id=slot.parent_id,
    )
