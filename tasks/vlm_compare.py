"""Stage 4, vlm_compare (paper: The VLM Coordinator, Eq. 1 and 2, Figure 3).

Reads:   failure pairs and clusters, the images they name, the prompts of A_k.
Returns: Comparing - references to verdicts and transcript, counts, what was asked for.
Writes:  verdicts.jsonl transcript.jsonl; answers go to the state's cache one by one as they come
"""

from collections import defaultdict
from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.augmentation import AugmenterSettings
from tasks.context import EpochContext
from tasks.diffusion.generator import GeneratorSettings
from tasks.loading import (
    augmented_images,
    augmented_paths,
    generator_digest,
    generator_for,
    original_paths,
    vlm_digest,
    vlm_for,
)
from tasks.memory import within_memory
from tasks.progress import stage_bar
from tasks.records import Cluster, Comparing, FailurePair, ImageRef, Mining, StageRecord, Verdict
from tasks.store import StageFolder, read_lines, write_lines
from tasks.vlm.cassette import write_transcript
from tasks.vlm.client import VlmSettings
from tasks.vlm.coordinator import Coordinator, PairToJudge

VERSION = 2  # 2: with fixed prompts no rewriting is asked for


@task(
    name="vlm_compare",
    task_run_name="vlm_compare · session {context.session} · epoch {context.epoch}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def vlm_compare(
    context: EpochContext,
    mining: Mining,
    augmenter: AugmenterSettings,
    vlm: VlmSettings,
    generator: GeneratorSettings,
    vlm_url: str | None,
) -> StageRecord[Comparing]:
    """Let the VLM compare each centre with the failures of its class; members inherit its verdict."""

    @within_memory("vlm.batch or generator.size")
    def compute(work: StageFolder) -> Comparing:
        rewrites = augmenter.prompts == "rewritten"
        fits = generator_for(context, generator, context.start.adapter).fits if rewrites else None
        with stage_bar("comparing", f"session {context.session} epoch {context.epoch}", "answer") as at:
            result = Coordinator(vlm_for(context, vlm, vlm_url), vlm).judge_all(
                _pairs(context, mining), fits, at
            )
        clusters = read_lines(context.store.locate(mining.clusters), Cluster)
        verdicts = _inherited(result.verdicts, clusters)
        write_lines(work.path / "verdicts.jsonl", verdicts)
        write_transcript(work.path / "transcript.jsonl", result.exchanges)
        semantic = sum(verdict.level == "semantic" for verdict in verdicts)
        return Comparing(
            verdicts=work.ref("verdicts.jsonl", "verdicts"),
            transcript=work.ref("transcript.jsonl", "transcript"),
            semantic=semantic,
            detail=len(verdicts) - semantic,
            unparsed=result.unparsed,
            rewritten=_changed(verdicts, context),
            usage=result.usage,
        )

    augmentation = context.start.augmentation
    assert augmentation is not None, "comparing needs a generated set"
    return context.store.run(
        "vlm_compare",
        VERSION,
        settings={"vlm": vlm.identity, "prompts": augmenter.prompts},
        inputs={
            "pairs": mining.pairs.digest,
            "clusters": mining.clusters.digest,
            "images": augmentation.images.digest,
            "manifest": augmentation.manifest.digest,
            "generator": generator_digest(generator),
            "vlm": vlm_digest(vlm),
        },
        seed=0,
        output=Comparing,
        compute=compute,
    )


def _pairs(context: EpochContext, mining: Mining) -> list[PairToJudge]:
    """Each centre with all the originals that it is to be compared with."""
    against: dict[str, list[ImageRef]] = defaultdict(list)
    for pair in read_lines(context.store.locate(mining.pairs), FailurePair):
        against[pair.augmented_id].append(pair.original)
    centres = [image for image in augmented_images(context) if image.id in against]
    return [
        PairToJudge(
            augmented_id=centre.id,
            image=path,
            prompt=centre.prompt,
            label=centre.label,
            originals=[
                (original.id, file)
                for original, file in zip(
                    against[centre.id], original_paths(context, against[centre.id]), strict=True
                )
            ],
        )
        for centre, path in zip(centres, augmented_paths(context, centres), strict=True)
    ]


def _inherited(verdicts: Sequence[Verdict], clusters: Sequence[Cluster]) -> list[Verdict]:
    """The centres' verdicts, each followed by those of its cluster's members."""
    by_centre = {verdict.augmented_id: verdict for verdict in verdicts}
    rows: list[Verdict] = []
    for cluster in clusters:
        verdict = by_centre[cluster.centre]
        rows.append(verdict)
        rows += [
            verdict.model_copy(
                update={"augmented_id": name, "comparisons": (), "inherited_from": cluster.centre}
            )
            for name in cluster.members
            if name != cluster.centre
        ]
    return rows


def _changed(verdicts: Sequence[Verdict], context: EpochContext) -> int:
    prompts = {image.id: image.prompt for image in augmented_images(context)}
    return sum(verdict.prompt_next != prompts[verdict.augmented_id] for verdict in verdicts)
