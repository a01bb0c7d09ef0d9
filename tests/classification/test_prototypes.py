import numpy as np
import torch

from tasks.classification.prototypes import cosine_logits, leave_one_out_logits, only_seen, prototypes

REAL, GENERATED = False, True


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_prototypes_equal_a_numpy_computation():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    labels = np.arange(40) % 4
    generated = rng.random(40) < 0.4
    expected = []
    for c in range(4):
        real_mean = unit(features[(labels == c) & ~generated]).mean(0)
        generated_mean = unit(features[(labels == c) & generated]).mean(0)
        expected.append(0.3 * generated_mean + 0.7 * real_mean)
    found = prototypes(
        torch.from_numpy(features),
        torch.from_numpy(labels),
        torch.from_numpy(generated),
        4,
        generated_weight=0.3,
    )
    assert np.allclose(found.numpy(), unit(np.array(expected)), atol=1e-6)


def test_the_only_kind_there_is_counts_in_full():
    features = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    labels, generated = torch.tensor([0, 1]), torch.tensor([REAL, GENERATED])
    found = prototypes(features, labels, generated, 3, generated_weight=0.5)
    assert torch.equal(found, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))


def test_cosine_logits_ignore_lengths():
    features, rows = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    assert torch.allclose(cosine_logits(features, rows, 10.0), torch.tensor([[6.0, 8.0]]))


def test_leave_one_out_by_hand():
    """Two shots of class 0 at right angles: with itself each is at 45 degrees, without at 90."""
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8]])
    labels, generated = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.bool)
    rows = prototypes(features, labels, generated, 2, 0.5)
    with_itself = cosine_logits(features, rows, 1.0)
    without = leave_one_out_logits(features, labels, generated, rows, 0.5, 1.0)
    assert torch.allclose(with_itself[0, 0], torch.tensor(0.5).sqrt())
    assert torch.allclose(without, torch.tensor([[0.0, 0.6], [0.0, 0.8], [0.9899495, 1.0], [0.9899495, 1.0]]))


def test_leave_one_out_equals_removing_the_shot():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(18, 5, generator=generator)
    labels = torch.arange(18) % 3
    generated = torch.arange(18) >= 9
    rows = prototypes(features, labels, generated, 3, 0.4)
    found = leave_one_out_logits(features, labels, generated, rows, 0.4, 16.0)
    for i in range(9):
        rest = torch.arange(18) != i
        without = prototypes(features[rest], labels[rest], generated[rest], 3, 0.4)
        own = int(labels[i])
        expected = cosine_logits(features[i : i + 1], rows, 16.0)[0]
        expected[own] = cosine_logits(features[i : i + 1], without, 16.0)[0, own]
        assert torch.allclose(found[i], expected, atol=1e-5)


def test_a_single_shot_is_left_to_the_generated_pictures():
    features = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    labels, generated = torch.tensor([0, 0]), torch.tensor([REAL, GENERATED])
    rows = prototypes(features, labels, generated, 1, 0.5)
    assert torch.allclose(
        leave_one_out_logits(features, labels, generated, rows, 0.5, 1.0), torch.tensor([[0.6]])
    )


def test_a_single_shot_with_nothing_else_counts_as_unlike():
    features, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    rows = torch.tensor([[1.0, 0.0], [-0.8, 0.6]])
    found = leave_one_out_logits(features, labels, torch.tensor([REAL]), rows, 0.5, 16.0)
    assert torch.allclose(found, torch.tensor([[-16.0, -12.8]]))


def test_only_seen_hides_the_rest_and_leaves_its_argument():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert only_seen(logits, (1, 0)).tolist() == [[1.0, 2.0, float("-inf")]]
    assert logits.tolist() == [[1.0, 2.0, 3.0]]
