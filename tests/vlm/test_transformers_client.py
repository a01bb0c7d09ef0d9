"""A local model through the Auto classes: a tiny, randomly initialised LLaVA that the test saves and loads back."""

from pathlib import Path

import pytest
import torch
from fake_vlm import SETTINGS, image, pair
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tasks.loading import vlm_digest
from tasks.vlm.client import Message, Picture, Request, VlmSettings
from tasks.vlm.coordinator import Coordinator
from tasks.vlm.factory import check_vlm, open_client
from tasks.vlm.prompts import COMPARE, DESCRIBE
from tasks.vlm.transformers_client import TransformersClient, model_digest
from tasks.vlm.transport import VlmError, VlmUnavailableError

CPU = torch.device("cpu")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *"abcdefghij", "YES", "NO", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def save_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>"))
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.ndim > 1:  # far from zero, so that answers depend on what is asked
            torch.nn.init.normal_(weight, std=1.0)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})
    LlavaProcessor(
        images, tokenizer(), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("local") / "tiny-llava")


def settings(model: object, **changes: object) -> VlmSettings:
    own = {"kind": "transformers", "model": str(model), "dtype": "float32", "batch": 3, "max_tokens": 6}
    return VlmSettings(**{**SETTINGS.model_dump(), **own, **changes})


def shown(value: int, text: str = "a b") -> Request:
    return Request(messages=(Message(role="user", text=text, pictures=(Picture.of(image(value), 64),)),))


def said(text: str) -> Request:
    return Request(messages=(Message(role="user", text=text),))


def test_dialogues_with_and_without_pictures_are_answered_in_their_order(folder: Path) -> None:
    asked = [
        shown(0),
        said("a b c d e f"),
        shown(250, "c"),
        said("j"),
        *(shown(60 * n, "e f") for n in range(4)),
    ]
    told: list[int] = []
    replies = TransformersClient(settings(folder), CPU).complete_all(asked, lambda i, _r: told.append(i))
    alone = [TransformersClient(settings(folder, batch=1), CPU).complete(request) for request in asked]
    assert [r.text for r in replies] == [r.text for r in alone]
    assert [r.usage for r in replies] == [r.usage for r in alone]
    assert sorted(told) == list(range(8))
    assert len({reply.text for reply in replies}) > 3
    assert replies[1].usage.prompt_tokens == 1 + 6  # role and words
    assert replies[0].usage.prompt_tokens == 1 + 4 + 2  # role, four patches, words
    assert all(1 <= reply.usage.completion_tokens <= 6 for reply in replies)


def test_the_coordinator_runs_on_it(folder: Path, tmp_path: Path) -> None:
    chosen = settings(folder)
    client = open_client(chosen, base_url=None, cache=tmp_path)
    pairs = [pair("a", 1, {"o": 200}), pair("b", 90, {"o": 200})]
    first = Coordinator(client, chosen).judge_all(pairs, lambda _prompt: True)
    assert Coordinator(client, chosen).judge_all(pairs, lambda _prompt: True) == first
    assert {e.messages[-1].content[0]["text"] for e in first.exchanges} >= {DESCRIBE, COMPARE}


def test_its_name_says_which_weights_and_its_path_is_in_no_record(folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "tiny-llava", seed=1)
    one, two = (TransformersClient(settings(f), CPU).sampling.model for f in (folder, other))
    assert one.startswith(f"tiny-llava@{model_digest(settings(folder))[:12]}, float32")
    assert one != two
    assert vlm_digest(settings(folder)) == model_digest(settings(folder)) != vlm_digest(settings(other))
    assert settings(folder).identity == settings(other).identity
    assert settings(folder).identity != settings(folder, dtype="bfloat16").identity


def test_a_hubs_model_is_the_commit_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its branch has become meanwhile; and without one here or there nothing begins."""
    asked: list[tuple[str, str | None]] = []

    def fetched(repo: str, name: str, revision: str | None, _remedy: str) -> Path:
        asked.append((repo, revision))
        return tmp_path / "snapshots" / "0a1b2c" / name

    with monkeypatch.context() as patched:
        patched.setattr("tasks.vlm.transformers_client.hub_file", fetched)
        for revision in (None, "main"):
            chosen = settings("owner/name", revision=revision)
            assert model_digest(chosen) == "hub:owner/name@0a1b2c"
            client = TransformersClient(chosen, CPU)
            assert client.sampling.model.startswith("name@owner/name@0a1b2c")
            assert client._settings.revision == "0a1b2c", "what is loaded is what was named"
    assert asked == [("owner/name", None)] * 2 + [("owner/name", "main")] * 2
    monkeypatch.setattr("tasks.hub.HfApi.model_info", refuse)
    with pytest.raises(VlmUnavailableError, match=r"owner/name.*not on this machine.*name a model's folder"):
        model_digest(settings("owner/name"))


def refuse(*_: object, **__: object) -> None:
    raise ConnectionError("no network")


@pytest.mark.parametrize("damage", ["no weights", "no config", "pickle only", "nowhere", "another kind"])
def test_what_cannot_be_loaded_is_found_before_any_work(damage: str, tmp_path: Path) -> None:
    model = tmp_path / "m"
    if damage != "nowhere":
        model.mkdir()
        kind = '{"model_type": "clip_text_model"}' if damage == "another kind" else '{"model_type": "llava"}'
        (model / "config.json").write_text(kind if damage != "no config" else "")
        (model / ("model.bin" if damage == "pickle only" else "model.safetensors")).write_text("")
        if damage == "no weights":
            (model / "model.safetensors").unlink()
        if damage == "no config":
            (model / "config.json").unlink()
    says = {
        "no weights": "holds no safetensors file",
        "no config": "holds no config.json",
        "pickle only": "holds no safetensors file",
        "nowhere": "does not exist; give a model's folder",
        "another kind": "does not read images and answer in words",
    }[damage]
    with pytest.raises(VlmUnavailableError, match=says), check_vlm(settings(model), serve=None):  # type: ignore[arg-type]
        raise AssertionError("must not be reached")


def test_a_good_model_passes_the_check(folder: Path) -> None:
    with check_vlm(settings(folder), serve=None) as address:  # type: ignore[arg-type]
        assert address is None


def test_a_model_without_a_chat_template_says_so(folder: Path, tmp_path: Path) -> None:
    bare = save_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(VlmError, match="instruction-tuned model with a chat template"):
        TransformersClient(settings(bare), CPU).complete(said("a"))


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"dtype": None}, {"batch": None}])
def test_settings_that_it_cannot_follow_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"vlm\.kind=transformers gives the likeliest answer"):
        settings("owner/name", **change)
