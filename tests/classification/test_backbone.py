import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tasks.classification.backbone import (
    BackboneSettings,
    CheckpointError,
    load_backbone,
    pretrained_digest,
)
from tasks.store import digest_of
from tests.tiny_vit import save_tiny_vit


def test_folder_gives_features_in_evaluation_mode(tmp_path):
    backbone = load_backbone(save_tiny_vit(tmp_path))
    assert not backbone.training
    assert backbone(torch.rand(3, 3, 16, 16)).shape == (3, backbone.width) == (3, 16)


def test_pictures_are_normalised_by_the_weights_own_statistics(tmp_path):
    settings = save_tiny_vit(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    backbone = load_backbone(settings)
    assert torch.allclose(backbone(images), backbone.network((images - 0.5) / 0.25))
    plain = load_backbone(settings.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3}))
    assert torch.allclose(plain(images), plain.network(images))


def test_other_sizes_are_resampled(tmp_path):
    backbone = load_backbone(save_tiny_vit(tmp_path))
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert torch.allclose(backbone(flat), backbone(torch.full((1, 3, 40, 40), 0.3)), atol=1e-5)


def test_loading_draws_nothing_from_the_global_generator(tmp_path):
    settings = save_tiny_vit(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_backbone(settings)
    assert torch.equal(torch.rand(1), expected)


def of_timm(name, checkpoint=None, **changes):
    values = {
        "name": name,
        "checkpoint": checkpoint and str(checkpoint),
        "size": None,
        "mean": None,
        "std": None,
    }
    return BackboneSettings.model_validate(values | changes)


def saved_network(name, file, dtype=torch.float32):
    torch.manual_seed(1)
    network = timm.create_model(name, pretrained=False).eval()
    network.to(dtype)
    save_file(network.state_dict(), file)
    return network.float()


MODELS = ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"]


@pytest.mark.parametrize("name", MODELS)
def test_weights_file_of_a_timm_model_a_vit_or_a_cnn(tmp_path, name):
    """Size, mean and deviation are timm's own for these weights; the head is left out wherever it is called."""
    network = saved_network(name, tmp_path / "w.safetensors")
    known = timm.data.resolve_model_data_config(network)
    backbone = load_backbone(of_timm(name, tmp_path / "w.safetensors"))
    side = known["input_size"][-1]
    assert backbone.size == side
    images = torch.rand(2, 3, side, side)
    mean, std = (torch.tensor(known[key]).view(3, 1, 1) for key in ("mean", "std"))
    normalised = (images - mean) / std
    expected = network.forward_head(network.forward_features(normalised), pre_logits=True)
    assert torch.allclose(backbone(images), expected, atol=1e-5)
    assert expected.shape == (2, backbone.width)


def test_half_weights_of_a_file_are_read(tmp_path):
    saved_network("test_vit", tmp_path / "half.safetensors", torch.float16)
    backbone = load_backbone(of_timm("test_vit", tmp_path / "half.safetensors"))
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_another_size_interpolates_a_vits_positions(tmp_path):
    saved_network("test_vit", tmp_path / "w.safetensors")
    backbone = load_backbone(of_timm("test_vit", tmp_path / "w.safetensors", size=96))
    assert backbone.network.patch_embed.img_size == (96, 96)
    assert backbone(torch.rand(1, 3, 96, 96)).shape == (1, backbone.width)


def test_a_published_models_own_folder(tmp_path):
    network = saved_network("test_vit", tmp_path / "model.safetensors")
    config = {
        "architecture": "test_vit",
        "pretrained_cfg": {**network.pretrained_cfg, "mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(of_timm("any label", tmp_path))
    assert backbone.size == 160
    assert torch.allclose(backbone.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub's cache of this test's own, without a network."""

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_published_weights_are_found_on_this_machine_and_known_by_their_content(cache):
    repository = cache / "models--timm--test_vit.r160_in1k"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    file = repository / "snapshots" / "abc" / "model.safetensors"
    network = saved_network("test_vit", file)
    settings = of_timm("test_vit.r160_in1k")
    found = load_backbone(settings).network.state_dict()
    assert all(torch.equal(weight, network.state_dict()[name]) for name, weight in found.items())
    assert pretrained_digest(settings) == digest_of(file)


@pytest.mark.parametrize("ask", [load_backbone, pretrained_digest])
def test_published_weights_that_cannot_be_had_are_one_sentence(cache, ask):
    with pytest.raises(CheckpointError, match=r"'timm/test_vit\.r160_in1k' is not on this machine") as told:
        ask(of_timm("test_vit.r160_in1k"))
    assert "classifier.checkpoint=" in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(
        CheckpointError, match=r"Invalid pretrained tag \(dreamt\) .* another tag in classifier\.name"
    ):
        ask(of_timm("test_vit.dreamt"))


def test_half_precision_computes_in_it_and_gives_float32_gradients(tmp_path):
    saved_network("test_vit", tmp_path / "w.safetensors")
    full, half = (
        load_backbone(of_timm("test_vit", tmp_path / "w.safetensors", precision=precision, size=64))
        for precision in ("float32", "bfloat16")
    )
    seen = []
    half.network.blocks[0].attn.qkv.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    images = torch.rand(2, 3, 64, 64)
    features = half(images)
    assert seen == [torch.bfloat16]
    assert features.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(features, full(images)).min() > 0.99
    features.sum().backward()
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.float32}


def test_checkpointing_changes_no_gradient(tmp_path):
    saved_network("test_vit", tmp_path / "w.safetensors")
    images, gradients = torch.rand(2, 3, 64, 64), []
    for checkpointing in (False, True):
        settings = of_timm("test_vit", tmp_path / "w.safetensors", checkpointing=checkpointing, size=64)
        backbone = load_backbone(settings)
        assert backbone.network.grad_checkpointing == checkpointing
        backbone(images).square().sum().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_missing_checkpoint(tmp_path):
    settings = save_tiny_vit(tmp_path).model_copy(update={"checkpoint": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match=r"no such checkpoint: .*nowhere"):
        load_backbone(settings)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_half_a_checkpoint(tmp_path, name):
    settings = save_tiny_vit(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"no such checkpoint: .*{name} is missing"):
        load_backbone(settings)


def test_unknown_timm_model():
    settings = of_timm("vit_of_dreams")
    with pytest.raises(CheckpointError, match="timm has no model 'vit_of_dreams'"):
        load_backbone(settings)


def test_another_size(tmp_path):
    settings = save_tiny_vit(tmp_path).model_copy(update={"size": 24})
    with pytest.raises(CheckpointError, match=r"side 16, but classifier\.size=24"):
        load_backbone(settings)


def test_another_architecture(tmp_path):
    with pytest.raises(CheckpointError, match=r"'ResNet'; only timm's VisionTransformer"):
        load_backbone(save_tiny_vit(tmp_path, architecture="ResNet"))


def test_config_that_lacks_a_field(tmp_path):
    settings = save_tiny_vit(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mean"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks 'mean'"):
        load_backbone(settings)


def test_weights_that_do_not_fit(tmp_path):
    settings = save_tiny_vit(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit the network: [\s\S]*norm\.weight"):
        load_backbone(settings)


def test_damaged_weights(tmp_path):
    settings = save_tiny_vit(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678 damaged")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_backbone(settings)
