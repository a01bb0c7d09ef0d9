"""WaRP: a rotation that changes nothing, a mask that only grows, and coefficients that stay where they were."""

import pytest
import torch
from torch import nn

from tasks.classification.backbone import BackboneSettings, load_backbone
from tasks.learners.warp import RotatedLinear, Warp, WarpSettings, most_important, second_moment_basis
from tests.learners.given import base_data, recipe, session_data
from tests.tiny_vit import save_tiny_vit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> BackboneSettings:
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


def warp(vit: BackboneSettings, **changes: object) -> Warp:
    values = {
        "kind": "warp",
        "backbone": vit,
        "temperature": 16.0,
        "generated_weight": 0.5,
        "blocks_share": 0.5,
        "layers": ["proj", "fc1"],
        "keep": 0.3,
        "batch": 4,
        "base": recipe(),
        "incremental": recipe(optimizer="sgd", momentum=0.9, learning_rate=0.05, weight_decay=0.01),
    }
    return Warp(WarpSettings.model_validate(values | changes), 5, CPU)


def rotated(width: int = 6, out: int = 4) -> tuple[nn.Linear, RotatedLinear, torch.Tensor]:
    layer = nn.Linear(width, out)
    mask = torch.arange(out * width).view(out, width) % 3 == 0
    basis = torch.linalg.qr(torch.randn(width, width)).Q
    return layer, RotatedLinear(layer, basis, mask), mask


def test_a_rotated_layer_computes_the_same_function() -> None:
    layer, turned, _ = rotated()
    inputs = torch.randn(7, 3, 6)
    torch.testing.assert_close(turned(inputs), layer(inputs), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(turned.weight(), layer.weight, atol=1e-5, rtol=1e-4)


def test_only_free_coefficients_get_a_gradient() -> None:
    _, turned, mask = rotated()
    turned(torch.randn(5, 6)).pow(2).sum().backward()
    assert {name for name, p in turned.named_parameters() if p.grad is not None} == {"free", "bias"}
    assert torch.all(turned.free.grad[mask] == 0)
    assert torch.all(turned.free.grad[~mask] != 0)


def test_the_most_important_are_the_largest_of_all_layers_together() -> None:
    found = most_important({"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([[4.0], [0.5], [6.0]])}, 0.6)
    assert found["a"].tolist() == [[True, False]]
    assert found["b"].tolist() == [[True], [False], [True]]


def test_the_basis_diagonalises_the_second_moment_of_the_inputs() -> None:
    layer = nn.Linear(3, 2)
    images = torch.randn(70, 1, 3)  # more than one batch
    basis = second_moment_basis({"x": layer}, layer, images, CPU)["x"]
    inputs = images.flatten(0, 1)
    turned = basis.T @ inputs.T @ inputs @ basis
    torch.testing.assert_close(turned, torch.diag(turned.diagonal()), atol=1e-3, rtol=0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)


def test_the_last_blocks_are_rotated(vit: BackboneSettings) -> None:
    assert warp(vit).paths == ["blocks.1.attn.proj", "blocks.1.mlp.fc1"]
    assert warp(vit, blocks_share=1.0, layers=["fc2"]).paths == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]


def test_a_session_moves_free_coefficients_alone_and_freezes_more(vit: BackboneSettings) -> None:
    learner = warp(vit)
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(base_data(), seed=0)
    frozen = {path: learner.mask[path].clone() for path in learner.paths}
    share = sum(int(m.sum()) for m in frozen.values()) / sum(m.numel() for m in frozen.values())
    assert share == pytest.approx(0.3, abs=0.01)
    before = {name: weight.clone() for name, weight in learner.backbone.state_dict().items()}
    for epoch in range(2):
        learner.begin_session((3, 4), (0, 1, 2, 3, 4))
        learner.learn(session_data(), seed=epoch)
    weights = {f"network.{path}.weight" for path in learner.paths}
    moved = {n for n, weight in learner.backbone.state_dict().items() if not torch.equal(weight, before[n])}
    assert moved == weights
    for path in learner.paths:
        name = f"network.{path}.weight"
        old, new = (
            before[name] @ learner.basis[path],
            learner.backbone.state_dict()[name] @ learner.basis[path],
        )
        mask = frozen[path]
        torch.testing.assert_close(new[mask], old[mask], atol=1e-5, rtol=1e-4)
        assert (new - old)[~mask].abs().max() > 1e-4
        assert torch.equal(learner.mask[path] & mask, mask)
    assert sum(int(m.sum()) for m in learner.mask.values()) > sum(int(m.sum()) for m in frozen.values())


def test_a_network_without_blocks_is_refused(vit: BackboneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    other = load_backbone(vit)
    other.network = nn.Conv2d(3, 4, 3)
    monkeypatch.setattr("tasks.learners.ncm_tuned.load_backbone", lambda _: other)
    monkeypatch.setattr(type(other), "width", 4)
    with pytest.raises(ValueError, match="WaRP reaches into the blocks of a plain ViT"):
        warp(vit)
