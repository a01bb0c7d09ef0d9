import math

import pytest
import torch
from torch import nn

from tasks.classification.training import CosineHead, cosine_rate, fit, recolour, vary
from tests.tiny_vit import bars, training

STILL = {"rotate": 0.0, "scale": 0.0, "shift": 0.0, "grey": 0.0, "invert": 0.0}


def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 12), nn.Dropout(0.5))


def run(settings, seed=0, weights=None, network=None):
    network = network or backbone()
    images, labels = bars(6, 4, seed=1)
    head = CosineHead(torch.eye(4, 12), temperature=16.0)
    losses = fit(
        network, head, images, labels, torch.ones(24) if weights is None else weights, settings, seed
    )
    return losses, head.rows.detach(), network[1].weight.detach()


def test_cosine_schedule():
    assert [cosine_rate(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert cosine_rate(0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    rates = [cosine_rate(i / 20) for i in range(21)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_is_refused(progress):
    with pytest.raises(ValueError, match="progress lies in"):
        cosine_rate(progress)


def test_training_lowers_the_loss():
    losses, *_ = run(training(passes=15))
    assert len(losses) == 15
    assert losses[-1] < 0.3 * losses[0]


def test_one_seed_gives_equal_weights_and_another_does_not():
    (_, rows, weight), (_, rows_again, weight_again) = run(training()), run(training())
    assert torch.equal(rows, rows_again)
    assert torch.equal(weight, weight_again)
    assert not torch.equal(weight, run(training(), seed=1)[2])


def test_the_global_generator_plays_no_part():
    first = run(training())[2]
    torch.rand(3)
    state = torch.get_rng_state()
    assert torch.equal(run(training())[2], first)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_backbone_stays_and_the_head_moves():
    network = backbone()
    before = network[1].weight.detach().clone()
    _, rows, after = run(training(freeze="backbone"), network=network)
    assert torch.equal(before, after)
    assert not torch.equal(rows, torch.eye(4, 12))
    assert all(p.requires_grad for p in network.parameters())


def test_first_step_has_the_full_rate():
    """Adam's first step moves each weight by the rate times the sign of its gradient."""
    network = backbone()
    before = network[1].weight.detach().clone()
    *_, after = run(training(passes=1, batch=24, learning_rate=0.01), network=network)
    assert (after - before).abs().max() == pytest.approx(0.01, rel=1e-3)


def test_loss_of_the_first_pass_is_the_weighted_mean():
    network = backbone().eval()
    images, labels = bars(6, 4, seed=1)
    weights = torch.linspace(0.5, 1.5, 24)
    head = CosineHead(torch.eye(4, 12), 16.0)
    each = nn.functional.cross_entropy(head(network(images)), labels, reduction="none")
    expected = float((each * weights).sum().detach() / weights.sum())
    losses, *_ = run(training(passes=1, batch=24, **STILL), weights=weights)
    assert losses == pytest.approx([expected], rel=1e-5)


def test_no_passes_train_nothing():
    losses, rows, _ = run(training(passes=0))
    assert losses == []
    assert torch.equal(rows, torch.eye(4, 12))


def test_nothing_to_train_on_is_refused():
    head = CosineHead(torch.eye(4, 12), 16.0)
    with pytest.raises(ValueError, match="nothing to train on"):
        fit(backbone(), head, torch.zeros(0, 3, 16, 16), torch.zeros(0).long(), torch.zeros(0), training(), 0)


def test_divergence_is_an_error():
    network = backbone()
    nn.init.constant_(network[1].bias, float("nan"))
    with pytest.raises(ValueError, match="the loss is nan"):
        run(training(), network=network)


def test_progress_is_told_every_step():
    told = []
    images, labels = bars(6, 4, seed=1)
    head = CosineHead(torch.eye(4, 12), 16.0)
    fit(
        backbone(),
        head,
        images,
        labels,
        torch.ones(24),
        training(),
        0,
        lambda done, of: told.append((done, of)),
    )
    assert told == [(i, 6) for i in range(1, 7)]


def test_variation_within_range_and_off():
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    assert vary(images, training(**STILL), generator) is images
    varied = vary(images, training(), generator)
    assert varied.shape == images.shape
    assert 0 <= varied.min() <= varied.max() <= 1
    assert not torch.equal(varied[0], images[0])


def test_shift_stays_below_its_limit():
    """A bright column in the middle moves by no more than a quarter of the side, and does move."""
    images = torch.zeros(200, 1, 16, 16)
    images[..., 8] = 1
    varied = vary(images, training(rotate=0.0, scale=0.0, shift=0.25), torch.Generator().manual_seed(0))
    centre = (varied.mean((1, 2)) * torch.arange(16)).sum(1) / varied.mean((1, 2)).sum(1)
    assert 3 < (centre - 8).abs().max() <= 4.01


def test_rotation_by_a_right_angle_is_exact():
    """Of draws in [-90, 90] degrees the extreme ones turn a horizontal bar nearly upright."""
    images = torch.zeros(300, 1, 17, 17)
    images[:, :, 8] = 1
    varied = vary(images, training(rotate=90.0, scale=0.0, shift=0.0), torch.Generator().manual_seed(0))
    upright = varied[:, 0, :, 8].mean(1)
    assert upright.max() > 0.9
    assert upright.min() < 0.2


def test_recolour_gives_the_picture_its_grey_its_negative_or_both():
    images = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    still = training(**STILL)
    assert recolour(images, still, torch.Generator().manual_seed(0)) is images
    negative = recolour(images, training(**{**STILL, "invert": 1.0}), torch.Generator().manual_seed(0))
    assert torch.equal(negative, 1 - images)
    grey = recolour(images, training(**{**STILL, "grey": 1.0}), torch.Generator().manual_seed(0))
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert torch.allclose(grey, (images * weights).sum(1, keepdim=True).expand_as(images), atol=2e-3)
    mixed = recolour(
        images, training(**{**STILL, "grey": 0.5, "invert": 0.5}), torch.Generator().manual_seed(0)
    )
    kinds = [
        sum(torch.equal(m, k) for m, k in zip(mixed, kind, strict=True))
        for kind in (images, 1 - images, grey, 1 - grey)
    ]
    assert sum(kinds) == 64
    assert all(8 <= kind <= 24 for kind in kinds)
