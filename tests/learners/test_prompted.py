"""L2P and DualPrompt: who chooses which prompt, where it goes, and what is left alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tasks.classification.backbone import Backbone, BackboneSettings, load_backbone
from tasks.classification.tokens import heads_of, plain_vit
from tasks.learners.base import Learner
from tasks.learners.dualprompt import DualPromptSettings, Prefixes
from tasks.learners.factory import check_learner, make_learner
from tasks.learners.l2p import L2pSettings, PromptPool
from tests.learners.given import base_data, session_data
from tests.tiny_vit import save_tiny_vit, training

CPU = torch.device("cpu")
Make = Callable[..., L2pSettings | DualPromptSettings]
ALL = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> BackboneSettings:
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


def both(vit: BackboneSettings, head: str, mask: str) -> dict[str, object]:
    how = training(freeze="backbone").model_dump()
    return {
        "backbone": vit,
        "head": head,
        "mask": mask,
        "temperature": 16.0,
        "generated_weight": 0.5,
        "pull": 0.1,
        "prompt_range": 1.0,
        "base": how,
        "incremental": how,
    }


def l2p(vit: BackboneSettings, head: str = "linear", mask: str = "session", **changes: object) -> L2pSettings:
    own = {
        "kind": "l2p",
        "pool": 4,
        "chosen": 2,
        "length": 2,
        "selection": "each",
        "feature": "prompts",
    }
    return L2pSettings.model_validate(both(vit, head, mask) | own | changes)


def dual(
    vit: BackboneSettings, head: str = "linear", mask: str = "session", **changes: object
) -> DualPromptSettings:
    own = {
        "kind": "dualprompt",
        "pool": 3,
        "general_blocks": [0],
        "expert_blocks": [1],
        "general_length": 2,
        "expert_length": 3,
    }
    return DualPromptSettings.model_validate(both(vit, head, mask) | own | changes)


def taught(settings: L2pSettings | DualPromptSettings) -> Learner:
    learner = make_learner(settings, 5, CPU)
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(base_data(), seed=0)
    return learner


# ------------------------------------------------------------------------------------------ choosing


def test_each_picture_draws_the_prompts_whose_keys_are_nearest(vit: BackboneSettings) -> None:
    backbone = load_backbone(vit)
    queries = torch.zeros(3, backbone.width)
    queries[0, 0], queries[0, 1], queries[1, 2], queries[1, 3], queries[2, 2], queries[2, 3] = (
        2,
        1,
        1,
        3,
        1,
        2,
    )
    expected = {"each": [[0, 1], [3, 2], [3, 2]], "vote": [[2, 3]] * 3}
    for selection, picked in expected.items():
        pool = PromptPool(l2p(vit, selection=selection), backbone)
        with torch.no_grad():
            pool.keys[:, :4] = torch.eye(4)
        found, cosines = pool.choose(queries)
        if selection == "vote":
            found = found.sort(1).values
        assert found.tolist() == picked
        assert cosines.shape == (3, 2)
    alone = [PromptPool.choose(pool, query[None])[0].sort().values.tolist()[0] for query in queries]
    assert alone == [[0, 1], [2, 3], [2, 3]]  # a batch of one votes for itself: the vote depends on the batch


def test_a_session_trains_its_own_expert_and_test_finds_the_nearest_opened(vit: BackboneSettings) -> None:
    prefixes = Prefixes(dual(vit), load_backbone(vit))
    prefixes.open_session()
    with torch.no_grad():
        prefixes.keys[:, :3] = torch.eye(3)
        prefixes.experts[0] = 1.0
    queries = torch.eye(3, prefixes.width)
    assert prefixes.choose(queries, False)[0].tolist() == [0, 0, 0]  # the others have not been
    prefixes.open_session()
    assert torch.equal(prefixes.experts[1], prefixes.experts[0])
    assert torch.equal(prefixes.keys[1], prefixes.keys[0])
    with torch.no_grad():
        prefixes.keys[1] = torch.eye(3, prefixes.width)[1]
    assert prefixes.choose(queries, False)[0].tolist()[:2] == [0, 1]
    assert prefixes.choose(queries, True)[0].tolist() == [1, 1, 1]


def test_pools_that_are_too_small_are_refused(vit: BackboneSettings) -> None:
    with pytest.raises(ValueError, match="chosen=5 prompts cannot be drawn from a pool=4"):
        l2p(vit, chosen=5)
    names = [str(label) for label in ALL]
    check_learner(dual(vit), names, 3)
    with pytest.raises(ValueError, match=r"dualprompt can take 3 sessions, but the dataset has 4.*pool"):
        check_learner(dual(vit), names, 4)
    with pytest.raises(ValueError, match="block 7 is not among the 2 blocks"):
        check_learner(dual(vit, expert_blocks=[7]), names, 3)
    with pytest.raises(ValueError, match="block 1 is in general_blocks and in expert_blocks"):
        dual(vit, general_blocks=[1])


def test_a_network_without_tokens_is_refused() -> None:
    backbone = Backbone(nn.Conv2d(3, 4, 3), 16, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(
        ValueError, match=r"L2P reaches into the blocks of a plain ViT.*is a Conv2d; choose a ViT"
    ):
        plain_vit(backbone, "L2P")


# ------------------------------------------------------------------------------------------ where prompts go


def test_prefixes_go_to_the_blocks_they_are_for(vit: BackboneSettings) -> None:
    prefixes = Prefixes(dual(vit, general_blocks=[1], expert_blocks=[0]), load_backbone(vit))
    nn.init.normal_(prefixes.experts)
    nn.init.normal_(prefixes.general)
    picked = torch.tensor([2, 0])
    general, expert = prefixes.prefix(1, picked), prefixes.prefix(0, picked)
    assert general is not None
    assert expert is not None
    assert prefixes.prefix(2, picked) is None
    for which in (0, 1):  # keys, values
        assert torch.equal(general[which][1], prefixes.general[0, which])
        assert torch.equal(expert[which][0], prefixes.experts[2, 0, which])
        assert torch.equal(expert[which][1], prefixes.experts[0, 0, which])


def test_a_prefix_is_attended_to_as_keys_and_values(vit: BackboneSettings) -> None:
    attention = plain_vit(load_backbone(vit), "").blocks[0].attn
    tokens, keys, values = torch.randn(2, 5, 16), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    found = heads_of(attention, tokens, keys, values)
    projected = attention.qkv(tokens)
    for n in range(2):
        for head in range(2):
            own = [projected[n, :, 16 * part + 8 * head : 16 * part + 8 * head + 8] for part in range(3)]
            every_key = torch.cat([keys[n, head], own[1]])
            every_value = torch.cat([values[n, head], own[2]])
            weights = torch.softmax(own[0] @ every_key.T / 8**0.5, 1)
            torch.testing.assert_close(found[n, head], weights @ every_value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [l2p, dual])
def test_pictures_of_one_batch_do_not_mix(make: Make, vit: BackboneSettings) -> None:
    backbone, settings = load_backbone(vit), make(vit)
    prompts = (PromptPool if isinstance(settings, L2pSettings) else Prefixes)(settings, backbone)
    for _ in range(3):
        prompts.open_session()
    for parameter in prompts.parameters():
        nn.init.normal_(parameter)
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together: Tensor = prompts(backbone, images, False)[0]
        alone = torch.cat([prompts(backbone, image[None], False)[0] for image in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("make", [l2p, dual])
@pytest.mark.parametrize("head", ["linear", "prototype"])
def test_prompts_are_trained_and_the_network_is_not(make: Make, head: str, vit: BackboneSettings) -> None:
    learner = taught(make(vit, head=head))
    for name, weight in load_backbone(vit).state_dict().items():
        assert torch.equal(learner.backbone.state_dict()[name], weight), name
    before = {name: p.detach().clone() for name, p in learner.prompts.named_parameters()}
    learner.begin_session((3, 4), ALL)
    losses = learner.learn(session_data(), seed=1)
    assert len(losses) == 2
    moved = {name for name, p in learner.prompts.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)


@pytest.mark.parametrize(("mask", "moves"), [("session", False), ("seen", True)])
def test_the_mask_keeps_rows_of_other_sessions_out_of_the_loss(
    mask: str, moves: bool, vit: BackboneSettings
) -> None:
    learner = taught(l2p(vit, mask=mask))
    before = learner.head.weight.detach().clone()
    learner.begin_session((3, 4), ALL)
    learner.learn(session_data(), seed=1)
    assert torch.equal(learner.head.weight[:3], before[:3]) != moves
    assert not torch.equal(learner.head.weight[3:], before[3:])


def test_a_linear_head_s_shots_are_judged_by_weights_that_have_not_seen_them(
    vit: BackboneSettings, tmp_path: Path
) -> None:
    learner, shots = taught(l2p(vit, mask="seen")), session_data(3)
    learner.begin_session((3, 4), ALL)
    learner.learn(shots, seed=1)
    first = learner.predict_shots(shots, ALL)
    swapped = session_data(3)
    swapped.images[0] = 1 - swapped.images[0]  # the first shot of class 3
    second = learner.predict_shots(swapped, ALL)
    same_fold = torch.tensor([3])  # class 4's first shot, judged by the weights trained without either
    torch.testing.assert_close(first[same_fold], second[same_fold])
    assert not torch.allclose(first[0], second[0])
    assert not torch.allclose(first[1], second[1])  # its judges have seen the first shot
