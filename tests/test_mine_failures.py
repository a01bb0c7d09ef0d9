"""Stage 3 on photographs: who becomes a positive, who a negative, judged by scikit-image and by hand."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor

from flows.config import load_config
from tasks.context import EpochContext
from tasks.images import load_image, save_png
from tasks.mine_failures import mine_failures
from tasks.records import (
    ArtifactRef,
    AugmentationSet,
    AugmentedImage,
    Cluster,
    FailurePair,
    ImageRef,
    LoopState,
    Mining,
    Prediction,
    Session,
    Triplet,
)
from tasks.store import digest_of, read_lines, write_json, write_lines

SIDE, CLASSES, ORIGINALS, GENERATED, NEGATIVES = 32, 2, 4, 9, 3


def crop(n: int) -> Tensor:
    """One of many pieces of two photographs."""
    picture = (data.astronaut, data.coffee)[n % 2]()
    top, left = 29 * n % 300, 53 * n % 300
    piece = torch.tensor(picture[top : top + SIDE, left : left + SIDE] / 255.0, dtype=torch.float32)
    return piece.permute(2, 0, 1)


def right(n: int) -> bool:
    """Which pictures the classifier reads rightly: neither all nor none of any kind."""
    return n % 3 != 0


def prediction(n: int, name: str, label: int) -> Prediction:
    return Prediction(image_id=name, label=label, predicted=label if right(n) else 1 - label, margin=0.0)


class World:
    """Originals in a folder, a generated set and predictions in a store, as the stages before leave them."""

    def __init__(self, root: Path) -> None:
        self.root, self.state = root, root / "state" / "stages" / "before" / "0"
        self.originals = [self._original(n) for n in range(CLASSES * ORIGINALS)]
        self.generated = [self._generated(n) for n in range(CLASSES * GENERATED)]
        both = [prediction(n, image.id, image.label) for n, image in enumerate(self.originals)]
        both += [prediction(n, image.id, image.label) for n, image in enumerate(self.generated)]
        write_lines(self.state / "predictions.jsonl", both)
        write_lines(self.state / "manifest.jsonl", self.generated)
        session = Session(
            index=0, new_classes=(0, 1), seen_classes=(0, 1), train=(), val=tuple(self.originals), test=(),
            val_rule="holdout",
        )  # fmt: skip
        write_json(self.state / "session.json", session)

    def _original(self, n: int) -> ImageRef:
        save_png(crop(n), self.root / "data" / f"{n}.png")
        digest = digest_of(self.root / "data" / f"{n}.png")
        return ImageRef(id=f"original-{n}", path=f"{n}.png", digest=digest, label=n % CLASSES)

    def _generated(self, n: int) -> AugmentedImage:
        save_png(crop(n + 100), self.state / "images" / f"{n}.png")
        digest = digest_of(self.state / "images" / f"{n}.png")
        return AugmentedImage(
            id=f"generated-{n}", slot=f"slot-{n}", source_id=None, label=n % CLASSES, prompt="p", seed=n,
            path=f"{n}.png", digest=digest, parent_id=None,
        )  # fmt: skip

    def ref(self, name: str, kind: str) -> ArtifactRef:
        return ArtifactRef(path=f"before/0/{name}", digest=digest_of(self.state / name), kind=kind)

    def mine(self, *overrides: str) -> tuple[Mining, EpochContext]:
        config = load_config(
            [f"dataset.root={self.root / 'data'}", f"dataset.size={SIDE}", f"runtime.state={self.root / 'state'}",
             f"mining.negatives={NEGATIVES}", "mining.min_contrast=0", *overrides]
        )  # fmt: skip
        drawn = AugmentationSet(
            epoch=0, adapter=None, images=self.ref("images", "images"), manifest=self.ref("manifest.jsonl", "manifest"),
            count=len(self.generated), batch_shape=(1,),
        )  # fmt: skip
        context = EpochContext(
            run="r", seed=0, session=0, epoch=0, session_ref=self.ref("session.json", "session"),
            start=LoopState(augmentation=drawn), class_names=("a", "b"), n_base=2, dataset=config.dataset,
            runtime=config.runtime,
        )  # fmt: skip
        return mine_failures.fn(
            context, self.ref("predictions.jsonl", "predictions"), config.mining
        ).output, context

    def expected_negatives(self, original: ImageRef, label: int) -> tuple[str, ...]:
        """The most similar of the pictures of the class that were read rightly, by scikit-image."""
        shown = self.pixels(self.root / "data" / original.path)
        rivals = [(n, g) for n, g in enumerate(self.generated) if g.label == label and right(n)]
        scores = {g.id: similarity(shown, self.pixels(self.state / "images" / g.path)) for _, g in rivals}
        return tuple(sorted(scores, key=lambda name: -scores[name])[:NEGATIVES])

    @staticmethod
    def pixels(path: Path) -> Tensor:
        return load_image(path, SIDE)


def similarity(x: Tensor, y: Tensor) -> float:
    a, b = (image.permute(1, 2, 0).double().numpy() for image in (x, y))
    return structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    (root / "data").mkdir()
    (root / "state" / "stages" / "before" / "0" / "images").mkdir(parents=True)
    return World(root)


def names(images: Sequence[ImageRef | AugmentedImage], correct: bool, label: int | None = None) -> set[str]:
    return {i.id for n, i in enumerate(images) if right(n) == correct and label in (None, i.label)}


def test_positives_are_the_wrong_originals_and_negatives_the_nearest_right_generations_of_their_class(
    world: World,
) -> None:
    mining, context = world.mine()
    triplets = read_lines(context.store.locate(mining.triplets), Triplet)
    assert {t.positive.id for t in triplets} == names(world.originals, correct=False)
    for triplet in triplets:
        label = triplet.positive.label
        assert triplet.label == label
        assert set(triplet.negatives) <= names(world.generated, correct=True, label=label)
        assert triplet.negatives == world.expected_negatives(triplet.positive, label)
        assert triplet.ssims == tuple(sorted(triplet.ssims, reverse=True))


@pytest.mark.parametrize("inherit", ["correct", "all"])
def test_only_right_generations_are_compared_and_the_wrong_ones_inherit_if_so_set(
    world: World, inherit: str
) -> None:
    mining, context = world.mine("mining.centres=2", f"mining.inherit={inherit}")
    clusters = read_lines(context.store.locate(mining.clusters), Cluster)
    pairs = read_lines(context.store.locate(mining.pairs), FailurePair)
    assert (
        {p.augmented_id for p in pairs}
        == {c.centre for c in clusters}
        <= names(world.generated, correct=True)
    )
    members = [name for cluster in clusters for name in cluster.members]
    everyone = {g.id for g in world.generated}
    assert sorted(members) == sorted(everyone if inherit == "all" else names(world.generated, correct=True))
    assert all(p.original.label == p.label for p in pairs)
