"""Farthest points against brute force and known answers; clusters, negatives, broken images."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tasks.similarity.selection import (
    MiningSettings,
    assign_clusters,
    compared_with,
    farthest_points,
    hardest_negatives,
    is_broken,
    prepare,
    start_index,
)
from tasks.similarity.ssim import SsimRows


def on_a_line(*places: float) -> Callable[[int], Tensor]:
    """Similarities of points on a line: 1 - distance."""
    x = torch.tensor(places)
    return lambda i: 1 - (x - x[i]).abs()


def brute_force(distances: Tensor, start: int, k: int, gap: float) -> list[int]:
    """Every candidate's smallest distance to the picks so far, computed anew each time."""
    picks = [start]
    while len(picks) < min(k, len(distances)):
        best, score = -1, gap
        for i in range(len(distances)):
            nearest = min(float(distances[i, p]) for p in picks)
            if nearest > score:
                best, score = i, nearest
        if best < 0:
            break
        picks.append(best)
    return picks


def test_known_answer_on_a_line() -> None:
    rows = on_a_line(0.0, 0.1, 0.45, 0.9, 1.0)
    assert farthest_points(rows, 5, start=0, k=3, gap=0) == [0, 4, 2]
    assert assign_clusters(rows, 5, [0, 4, 2]).tolist() == [0, 0, 2, 1, 1]


@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randint(0, 6, (9, 9), generator=generator).float() / 5  # coarse values: many ties
    distances = torch.triu(distances, 1) + torch.triu(distances, 1).T
    for start, k in itertools.product(range(9), (1, 3, 9, 20)):
        picks = farthest_points(lambda i: 1 - distances[i], 9, start, k, 0.2)
        assert picks == brute_force(1 - (1 - distances), start, k, 0.2)
        assert len(set(picks)) == len(picks)


def test_ties_go_to_the_lowest_index() -> None:
    rows = on_a_line(0.5, 1.0, 0.0, 1.0, 0.0)
    assert farthest_points(rows, 5, start=0, k=2, gap=0) == [0, 1]
    assert assign_clusters(on_a_line(0.5, 1.0, 0.0), 3, [2, 1]).tolist() == [0, 1, 0]


def test_more_centres_than_images_takes_all_and_duplicates_stop_it() -> None:
    assert sorted(farthest_points(on_a_line(0.0, 0.2, 0.7), 3, 1, 99, 0)) == [0, 1, 2]
    assert farthest_points(on_a_line(0.3, 0.3, 0.3), 3, 0, 3, 0) == [0]
    assert farthest_points(on_a_line(0.0, 0.04, 1.0), 3, 0, 3, 0.05) == [0, 2]


def test_rows_are_asked_once_for_each_centre() -> None:
    asked: list[int] = []
    rows = on_a_line(*(i / 100 for i in range(100)))

    def counting(i: int) -> Tensor:
        asked.append(i)
        return rows(i)

    picks = farthest_points(counting, 100, 0, 5, 0)
    assert asked == picks
    assert len(picks) == 5


def test_on_images_the_picks_are_deterministic_and_own_themselves() -> None:
    images = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    start = start_index(images)
    picks = farthest_points(SsimRows(images).row, 12, start, 4, 0)
    assert picks == farthest_points(SsimRows(images).row, 12, start, 4, 0)
    assert picks[0] == start
    owner = assign_clusters(SsimRows(images).row, 12, picks)
    assert [int(owner[p]) for p in picks] == [0, 1, 2, 3]


def test_nan_is_refused() -> None:
    bad = torch.tensor([1.0, torch.nan, 0.2])
    with pytest.raises(ValueError, match="NaN"):
        farthest_points(lambda i: bad, 3, 0, 2, 0)
    with pytest.raises(ValueError, match="NaN"):
        hardest_negatives(bad[None], 2)
    with pytest.raises(ValueError, match="NaN"):
        start_index(torch.full((2, 1, 4, 4), torch.nan))


@pytest.mark.parametrize(("n", "start", "k"), [(0, 0, 1), (3, 3, 1), (3, -1, 1), (3, 0, 0)])
def test_impossible_requests_are_refused(n: int, start: int, k: int) -> None:
    with pytest.raises(ValueError, match="farthest_points needs"):
        farthest_points(on_a_line(0.0, 0.5, 1.0), n, start, k, 0)


def test_centres_must_exist() -> None:
    for centres in ([], [3]):
        with pytest.raises(ValueError, match="centres within"):
            assign_clusters(on_a_line(0.0, 0.5, 1.0), 3, centres)


def test_start_is_the_image_nearest_to_the_mean() -> None:
    levels = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])  # mean 0.52
    assert start_index(levels.view(5, 1, 1, 1).expand(5, 3, 12, 12)) == 2


def test_negatives_are_the_most_similar_in_order_with_ties_by_index() -> None:
    similarities = torch.tensor([[0.1, 0.9, 0.4, 0.9], [0.3, 0.3, 0.3, 0.3]])
    assert hardest_negatives(similarities, 3) == [[1, 3, 2], [0, 1, 2]]
    assert hardest_negatives(similarities, 8) == [[1, 3, 2, 0], [0, 1, 2, 3]]
    assert hardest_negatives(similarities[:, :0], 8) == [[], []]


def test_pairs_to_compare_are_all_or_each_ones_nearest_with_ties_by_index() -> None:
    similarities = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.4, 0.5], [0.9, 0.4, 0.5]])  # 3 failures, 3 centres
    assert compared_with(similarities, "all") == [[0, 1, 2]] * 3
    assert compared_with(similarities, "nearest") == [[0, 2], [1], [0, 1]]
    with pytest.raises(ValueError, match="NaN"):
        compared_with(torch.full((1, 1), torch.nan), "nearest")


def test_broken_images_are_constant_in_every_channel() -> None:
    colour = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 12, 12)
    half = torch.zeros(1, 3, 12, 12)
    half[:, 0, :6] = 1
    faint = 0.5 + 0.001 * torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert is_broken(torch.cat([colour, half, faint]), 0.02).tolist() == [True, False, True]
    assert is_broken(half[:0], 0.02).shape == (0,)


def test_images_are_compared_at_the_size_and_in_the_colours_set() -> None:
    settings = MiningSettings(
        centres=1, negatives=1, ssim_size=16, min_contrast=0, greyscale=True, gap=0, inherit="all", pairs="all"
    )  # fmt: skip
    images = torch.rand(2, 3, 40, 40)
    assert prepare(images, settings).shape == (2, 1, 16, 16)
    assert prepare(images[:0], settings).shape == (0, 1, 16, 16)
    same = settings.model_copy(update={"greyscale": False, "ssim_size": 40})
    assert torch.equal(prepare(images, same), images)


def test_the_start_is_the_whole_formulas_however_many_images_and_pixels_there_are() -> None:
    images = torch.rand(150, 3, 15, 15, generator=torch.Generator().manual_seed(2))
    flat = images.flatten(1).double()
    assert start_index(images) == int((flat - flat.mean(0)).norm(dim=1).argmin())
