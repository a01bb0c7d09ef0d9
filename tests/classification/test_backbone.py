import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tasks.classification.backbone import BackboneSettings, CheckpointError, load_backbone
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


def test_weights_file_of_a_timm_model(tmp_path):
    network = timm.create_model("test_vit", pretrained=False)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    settings = BackboneSettings(
        name="test_vit", checkpoint=str(tmp_path / "w.safetensors"), size=160, mean=None, std=None
    )
    backbone = load_backbone(settings)
    images = torch.rand(1, 3, 160, 160)
    expected = network.eval().forward_head(network.forward_features((images - 0.5) / 0.5), pre_logits=True)
    assert torch.allclose(backbone(images), expected, atol=1e-5)


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
    settings = BackboneSettings(name="vit_of_dreams", checkpoint=None, size=32, mean=None, std=None)
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
