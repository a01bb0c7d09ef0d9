"""What one class gives to the VLM and to the tuner."""

import pytest
import torch

from tasks.records import AugmentedImage, Digest, ImageRef
from tasks.similarity import mining
from tasks.similarity.mining import mine_class
from tasks.similarity.selection import MiningSettings
from tasks.similarity.ssim import pairwise_ssim, ssim

SETTINGS = MiningSettings(
    centres=2, negatives=3, ssim_size=16, min_contrast=0.02, greyscale=True, gap=0.05, inherit="correct", pairs="all"
)  # fmt: skip


NONE = torch.zeros(0, 3, 16, 16)


def original(n: int, label: int = 4) -> ImageRef:
    return ImageRef(id=f"o{n}", path=f"{n}.png", digest=Digest(str(n)), label=label)


def generated(n: int, label: int = 4) -> AugmentedImage:
    return AugmentedImage(
        id=f"g{n}", slot=f"s{n}", source_id=None, label=label, prompt="p", seed=n, path="x", digest=Digest("d"), parent_id=None
    )  # fmt: skip


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_every_centre_meets_every_failure_and_every_candidate_has_one_centre(pictures: torch.Tensor) -> None:
    mined = mine_class(
        [original(0), original(1)],
        pictures[:2],
        [generated(n) for n in range(6)],
        pictures[2:],
        [],
        NONE,
        SETTINGS,
    )
    centres = [cluster.centre for cluster in mined.clusters]
    assert len(centres) == 2
    assert {(p.augmented_id, p.original.id) for p in mined.pairs} == {
        (c, o) for c in centres for o in ("o0", "o1")
    }
    members = [name for cluster in mined.clusters for name in cluster.members]
    assert sorted(members) == [f"g{n}" for n in range(6)]
    assert all(cluster.centre in cluster.members for cluster in mined.clusters)


def test_nearest_pairs_leave_no_failure_and_no_centre_out(pictures: torch.Tensor) -> None:
    nearest = SETTINGS.model_copy(update={"pairs": "nearest"})
    args = (
        [original(n) for n in range(4)],
        pictures[:4],
        [generated(n) for n in range(4)],
        pictures[4:],
        [],
        NONE,
    )
    every, mined = mine_class(*args, SETTINGS), mine_class(*args, nearest)
    assert [c.centre for c in mined.clusters] == [c.centre for c in every.clusters]
    assert mined.triplets == every.triplets
    score = {(p.augmented_id, p.original.id): p.ssim for p in every.pairs}
    centres, failures = {c for c, _ in score}, {o for _, o in score}
    wanted = {(c, max(failures, key=lambda o: score[c, o])) for c in centres}
    wanted |= {(max(centres, key=lambda c: score[c, o]), o) for o in failures}
    assert {(p.augmented_id, p.original.id): p.ssim for p in mined.pairs} == {
        pair: score[pair] for pair in wanted
    }
    assert len(wanted) < len(score)


def test_negatives_are_the_most_similar_of_the_class(pictures: torch.Tensor) -> None:
    grey = pictures.mean(1, keepdim=True)
    mined = mine_class(
        [original(0)], pictures[:1], [generated(n) for n in range(7)], pictures[1:], [], NONE, SETTINGS
    )
    from tasks.images import to_greyscale

    grey = to_greyscale(pictures)
    by_hand = [float(ssim(grey[:1], grey[n + 1 : n + 2])) for n in range(7)]
    expected = sorted(range(7), key=lambda n: -by_hand[n])[:3]
    (triplet,) = mined.triplets
    assert triplet.negatives == tuple(f"g{n}" for n in expected)
    assert triplet.ssims == pytest.approx([by_hand[n] for n in expected], abs=1e-5)


def test_constant_generations_are_left_out(pictures: torch.Tensor) -> None:
    pictures[2] = 0.5
    mined = mine_class(
        [original(0)], pictures[:1], [generated(n) for n in range(3)], pictures[1:4], [], NONE, SETTINGS
    )
    assert mined.filtered == 1
    assert "g1" not in {name for cluster in mined.clusters for name in cluster.members}


@pytest.mark.parametrize("n", [0, 1])
def test_no_usable_candidate_is_legal_and_gives_nothing(n: int) -> None:
    mined = mine_class(
        [original(0)],
        torch.rand(1, 3, 16, 16),
        [generated(i) for i in range(n)],
        torch.zeros(n, 3, 16, 16),
        [],
        NONE,
        SETTINGS,
    )
    assert (mined.pairs, mined.triplets, mined.clusters, mined.filtered) == ([], [], [], n)


def test_mixed_classes_are_refused(pictures: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"labels \[4, 5\]"):
        mine_class([original(0)], pictures[:1], [generated(0, label=5)], pictures[1:2], [], NONE, SETTINGS)


def test_wrongly_classified_generations_inherit_from_the_centre_they_resemble(pictures: torch.Tensor) -> None:
    every = SETTINGS.model_copy(update={"inherit": "all"})
    right, wrong = [generated(n) for n in range(4)], [generated(n) for n in range(4, 6)]
    arguments = ([original(0)], pictures[:1], right, pictures[1:5], wrong)
    twins = torch.stack([pictures[1], pictures[2]])
    closed = mine_class(*arguments, twins, SETTINGS)
    opened = mine_class(*arguments, twins, every)
    assert not {"g4", "g5"} & {name for cluster in closed.clusters for name in cluster.members}
    for twin, image in (("g4", "g0"), ("g5", "g1")):
        (home,) = [c.centre for c in opened.clusters if twin in c.members]
        if image in [c.centre for c in opened.clusters]:
            assert home == image
    assert (opened.pairs, opened.triplets) == (closed.pairs, closed.triplets)


def test_little_memory_gives_the_same_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(440, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    sizes: list[int] = []

    def watched(a: torch.Tensor, b: torch.Tensor, *, memory_mb: int) -> torch.Tensor:
        sizes.append(len(a))
        return pairwise_ssim(a, b, memory_mb=memory_mb)

    monkeypatch.setattr(mining, "pairwise_ssim", watched)
    mined = [
        mine_class(
            [original(n) for n in range(400)],
            images[:400],
            [generated(n) for n in range(40)],
            images[400:],
            [],
            NONE,
            SETTINGS.model_copy(update={"memory_mb": memory_mb}),
        )
        for memory_mb in (256, 4)
    ]
    assert mined[0] == mined[1]
    assert sizes[0] == 400 == sum(sizes[1:])
    assert len(sizes) > 2


def test_memory_is_no_part_of_what_is_recorded() -> None:
    assert "memory_mb" not in SETTINGS.model_dump()
