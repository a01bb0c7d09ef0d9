"""What selection promises of any similarities: who is picked, who belongs to whom, who is compared, who is negative."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.similarity.selection import assign_clusters, compared_with, farthest_points, hardest_negatives


@st.composite
def similarities(draw: st.DrawFn) -> torch.Tensor:
    """Symmetric, 1 on the diagonal, few distinct values so that ties come."""
    n = draw(st.integers(1, 7))
    values = draw(
        st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]), min_size=n * n, max_size=n * n)
    )
    upper = np.triu(np.array(values, np.float32).reshape(n, n), 1)
    return torch.from_numpy(upper + upper.T + np.eye(n, dtype=np.float32))


@given(matrix=similarities(), k=st.integers(1, 9), gap=st.sampled_from([0.0, 0.5, 0.75, 1.0]), data=st.data())
def test_centres_are_apart_and_each_is_the_farthest_that_was_left(
    matrix: torch.Tensor, k: int, gap: float, data: st.DataObject
) -> None:
    n = len(matrix)
    start = data.draw(st.integers(0, n - 1))
    picks = farthest_points(lambda i: matrix[i].clone(), n, start, k, gap)
    distance = (1 - matrix).fill_diagonal_(0)
    assert picks[0] == start
    assert len(set(picks)) == len(picks) <= min(k, n)
    for place, pick in enumerate(picks[1:], start=1):
        nearest = distance[picks[:place]].min(0).values
        assert nearest[pick] == nearest.max() > gap
        assert not (nearest[:pick] == nearest.max()).any()  # ties go to the lowest index
    if len(picks) < min(k, n):
        assert distance[picks].min(0).values.max() <= gap
    owner = assign_clusters(lambda i: matrix[i].clone(), n, picks)
    assert [owner[pick].item() for pick in picks] == list(range(len(picks)))
    for i in set(range(n)) - set(picks):
        assert distance[picks[owner[i]], i] == distance[picks, i].min()


@given(m=st.integers(1, 6), n=st.integers(0, 6), k=st.integers(1, 8), data=st.data())
def test_negatives_are_the_most_similar_and_pairs_leave_nobody_out(
    m: int, n: int, k: int, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.sampled_from([-0.5, 0.0, 0.5, 0.75]), min_size=m * n, max_size=m * n))
    found = torch.tensor(values, dtype=torch.float32).view(m, n)
    for row, chosen in zip(found.tolist(), hardest_negatives(found, k), strict=True):
        assert chosen == sorted(range(n), key=lambda i: (-row[i], i))[:k]
    if n == 0:
        return
    for rule in ("all", "nearest"):
        compared = compared_with(found, rule)
        assert len(compared) == n
        assert {i for mine in compared for i in mine} == set(range(m))
        for centre, mine in enumerate(compared):
            assert mine == sorted(set(mine))
            assert found[:, centre].argmax() in mine or found[mine, centre].max() == found[:, centre].max()
