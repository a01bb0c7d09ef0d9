"""PriViLege's prompts, modulation, divergence and distillation, against cases worked by hand; names and labels."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from flows.config import load_config
from tasks.classification.backbone import BackboneSettings, load_backbone
from tasks.classification.tokens import embed, plain_vit
from tasks.learners.factory import make_learner
from tasks.learners.language import (
    LanguageError,
    LanguageSettings,
    aligned_names,
    fitted,
    language_digest,
    word_vectors,
)
from tasks.learners.privilege import (
    BasePrompt,
    Privilege,
    PrivilegeSettings,
    distillation,
    entropy_divergence,
)
from tests.learners.given import base_data, session_data
from tests.tiny_vit import save_tiny_vit, training

CPU = torch.device("cpu")
NAMES = ("three", "one", "two", "five", "four")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> BackboneSettings:
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def language() -> LanguageSettings:
    learner = load_config(["method=privilege"]).learner
    assert isinstance(learner, PrivilegeSettings)
    return learner.language


def privilege(vit: BackboneSettings, **changes: object) -> Privilege:
    settings = load_config(["method=privilege"]).learner.model_copy(
        update={"backbone": vit, "tuned_blocks": 1, "base": training(), "incremental": training(), **changes}
    )
    learner = make_learner(settings, 5, CPU, NAMES)
    assert isinstance(learner, Privilege)
    return learner


# ------------------------------------------------------------------------------------------ losses


def test_the_divergence_against_a_case_worked_by_hand() -> None:
    plain = torch.tensor([[9.0, math.log(2), 0.0]], dtype=torch.float64)
    vision = torch.tensor([[9.0, 0.0, 0.0]], dtype=torch.float64)
    apart = 2 * 0.25 * math.log(0.75) + 0.5 * math.log(1.5)  # (1/4, 1/2, 1/4) against three thirds
    known = math.log(1 + 3 * math.exp(-9)) + math.log(1 + 2 * math.exp(-9))
    expected = math.log(1 + known / apart)
    found = entropy_divergence(plain, vision, torch.tensor([0]))
    assert float(found) == pytest.approx(expected, rel=1e-3)


def test_the_divergence_falls_as_doubts_differ_and_as_the_class_is_known() -> None:
    label = torch.tensor([0])
    alike = entropy_divergence(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.9, 0.0]]), label)
    apart = entropy_divergence(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0, 1.0]]), label)
    surer = entropy_divergence(torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([[5.0, 0.0, 1.0]]), label)
    assert surer < apart < alike


def test_the_distillation_against_a_case_worked_by_hand() -> None:
    spoken, words = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    apart = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = distillation(spoken, words, torch.zeros(1, 2), torch.tensor([1]), 2.0, 0.2)
    assert float(found) == pytest.approx(apart + 0.2 * math.log(2), rel=1e-5)
    nothing = distillation(words, words, torch.zeros(1, 2), torch.tensor([1]), 2.0, 0.0)
    assert float(nothing) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------ prompts


def test_the_base_prompt_is_modulated_by_the_block_s_own_features(vit: BackboneSettings) -> None:
    backbone = load_backbone(vit)
    block = plain_vit(backbone, "").blocks[0]
    tokens = embed(backbone, torch.rand(2, 3, 16, 16)).detach().requires_grad_()
    prompt = BasePrompt(1, tokens.shape[1], 2, 16)
    with torch.no_grad():
        prompt.prompt[0, 0], prompt.prompt[0, 1] = 1.0, 2.0
        prompt.over_keys[0, 3], prompt.over_keys[1, 1] = 1.0, 1.0  # token 3 of head 0, token 1 of head 1
        prompt.over_values[2] = 0.5
    key, value = prompt.prefix(0, block, tokens)
    queries, keys, values = block.attn.qkv(block.norm1(tokens)).chunk(3, 2)
    for head, token in ((0, 3), (1, 1)):
        own = slice(8 * head, 8 * head + 8)
        weights = torch.softmax(queries[0, token, own] @ keys[0, :, own].T / 8**0.5, 0)
        torch.testing.assert_close(key[0, own], weights @ values[0, :, own], atol=1e-5, rtol=1e-4)
    after = tokens + block.attn(block.norm1(tokens))
    torch.testing.assert_close(value, block.mlp(block.norm2(after))[:, 2], atol=1e-5, rtol=1e-4)
    (key.sum() + value.sum()).backward()
    assert tokens.grad is None  # no gradient reaches what modulates
    assert prompt.prompt.grad is not None


def test_the_base_session_tunes_the_first_blocks_and_later_ones_the_tokens_and_rows(
    vit: BackboneSettings,
) -> None:
    learner = privilege(vit)
    start = {name: weight.clone() for name, weight in learner.backbone.state_dict().items()}
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(base_data(), seed=0)
    held = learner.backbone.state_dict()
    changed = {name.split(".")[2] for name in held if not torch.equal(held[name], start[name])}
    assert changed == {"0"}  # of blocks 0 and 1
    before = {name: tensor.detach().clone() for name, tensor in learner._tensors().items()}
    learner.begin_session((3, 4), (0, 1, 2, 3, 4))
    learner.learn(session_data(), seed=1)
    after = learner._tensors()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"learned.tokens", "learned.rows", "prototypes"} <= moved
    assert not [name for name in moved if name.startswith(("base_prompt", "tuned"))]
    assert torch.equal(after["prototypes"][:3], before["prototypes"][:3])


# ------------------------------------------------------------------------------------------ names


def test_each_label_is_taught_with_its_own_name(vit: BackboneSettings, language: LanguageSettings) -> None:
    learner = privilege(vit)
    for label, name in enumerate(NAMES):
        alone = fitted(word_vectors(language, (name,)), 16)[0]
        torch.testing.assert_close(learner.words[label], alone, atol=1e-4, rtol=1e-4)
    apart = torch.cdist(learner.words, learner.words) + 9 * torch.eye(5)
    assert float(apart.min()) > 0.01


def test_the_released_code_s_names_are_out_of_step() -> None:
    assert aligned_names(NAMES, "correct") == NAMES
    assert aligned_names(NAMES, "as_released") == ("fiv", "fou", "on", "thre", "tw")


def test_vectors_of_another_width_keep_lengths_where_they_can() -> None:
    vectors = torch.randn(4, 6)
    assert torch.equal(fitted(vectors, 6), vectors)
    torch.testing.assert_close(fitted(vectors, 9).norm(dim=1), vectors.norm(dim=1))
    assert fitted(vectors, 3).shape == (4, 3)


def test_an_encoder_that_a_package_carries_is_found_without_running_it(
    language: LanguageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert language.tokenizer
    package = tmp_path / "words_of_ours"
    shutil.copytree(language.model, package / "model")
    shutil.copytree(language.tokenizer, package / "tokens")
    (package / "__init__.py").write_text("raise RuntimeError('nobody asked for this code')\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = "package:words_of_ours/"
    packaged = language.model_copy(update={"model": f"{name}model", "tokenizer": f"{name}tokens"})
    assert torch.equal(word_vectors(packaged, NAMES), word_vectors(language, NAMES))
    assert language_digest(packaged) == language_digest(language)
    missing = language.model_copy(update={"model": "package:words_of_nobody/model"})
    with pytest.raises(LanguageError, match="no package 'words_of_nobody' is installed"):
        language_digest(missing)


def test_mean_pooling_is_the_mean_of_the_last_states(language: LanguageSettings) -> None:
    assert language.tokenizer
    mean = word_vectors(language.model_copy(update={"pooling": "mean"}), NAMES[:1])[0]
    tokens = AutoTokenizer.from_pretrained(language.tokenizer)("a picture of a three", return_tensors="pt")
    states = AutoModel.from_pretrained(language.model, use_safetensors=True)(**tokens).last_hidden_state[0]
    torch.testing.assert_close(mean, states.mean(0).detach())
    assert not torch.equal(mean, word_vectors(language, NAMES[:1])[0])


def test_what_cannot_be_read_is_refused(vit: BackboneSettings, language: LanguageSettings) -> None:
    with pytest.raises(LanguageError, match=r"'no/such/folder' cannot be read.*learner.language.model="):
        word_vectors(language.model_copy(update={"model": "no/such/folder", "tokenizer": None}), NAMES)
    with pytest.raises(ValueError, match=r"has no .. for the class name"):
        word_vectors(language.model_copy(update={"sentence": "a picture"}), NAMES)
    settings = load_config(["method=privilege"]).learner.model_copy(update={"backbone": vit})
    with pytest.raises(ValueError, match="reads the name of each class: 5, got 4"):
        make_learner(settings, 5, CPU, NAMES[:4])
    with pytest.raises(ValueError, match="tuned_blocks=3, but the ViT has 2 blocks"):
        privilege(vit, tuned_blocks=3)
