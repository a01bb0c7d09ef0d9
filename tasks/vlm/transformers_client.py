"""A local image-text-to-text model in this process: any that transformers' Auto classes load, by folder or hub.

Only safetensors are read and no code that comes with a model is run. Answers are greedy, so they are a
function of weights, type, dialogue and, in the last digits of a float, of the company in the batch; dialogues
with equal numbers of pictures are answered together, in the order of asking. A second sample of a question
is the first one again. The model is loaded once per process.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tasks.hub import HubError, hub_file
from tasks.images import READ_FORMATS
from tasks.records import Digest, Usage
from tasks.store import digest_of
from tasks.vlm.client import ChatClient, Message, OnReply, Picture, Reply, Request, Sampling, VlmSettings
from tasks.vlm.transport import VlmError, VlmUnavailableError


def model_digest(settings: VlmSettings) -> Digest:
    """The content id of a model: of its folder's files, or a hub's commit.

    Raises:
        VlmUnavailableError: neither a model's folder nor an ``owner/name`` that is here or at the hub.
    """
    folder = Path(settings.model)
    if folder.is_dir():
        _check_folder(folder)
        return digest_of(folder)
    if settings.model.count("/") != 1 or settings.model.startswith((".", "/")):
        raise VlmUnavailableError(
            f"vlm.model={settings.model!r} does not exist; give a model's folder or a hub's owner/name"
        )
    return Digest(f"hub:{settings.model}@{_commit(settings)}")


def _commit(settings: VlmSettings) -> str:
    """What a hub's model is now or, where this machine has it already, was when it was fetched."""
    remedy = "name a model's folder as vlm.model, or fetch it where there is a network"
    try:
        return hub_file(settings.model, "config.json", settings.revision, remedy).parent.name
    except HubError as error:
        raise VlmUnavailableError(f"cannot load vlm.model={settings.model!r}: {error}") from error


def _check_folder(folder: Path) -> None:
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "safetensors file")):
        if not any(folder.glob(pattern)):
            raise VlmUnavailableError(
                f"vlm.model={folder} holds no {what}; save the model there with save_pretrained, or use vlm=miniature"
            )


class TransformersClient(ChatClient):
    """Answers dialogues with a model in this process."""

    def __init__(self, settings: VlmSettings, device: torch.device) -> None:
        """Name the model by its content; it is loaded with the first question.

        Args:
            settings: which model, type and batch.
            device: where it computes.

        Raises:
            VlmUnavailableError: see :func:`model_digest`.
        """
        digest = model_digest(settings)
        mark = digest.removeprefix("hub:") if digest.startswith("hub:") else digest[:12]
        if digest.startswith("hub:"):  # what is loaded is what was named, whatever the hub has by then
            settings = settings.model_copy(update={"revision": digest.rpartition("@")[2]})
        name = f"{Path(settings.model).name}@{mark}, {settings.dtype}, batches of {settings.batch}"
        self._settings = settings
        self._sampling = settings.sampling.model_copy(update={"model": name})
        self._device = device

    @property
    def sampling(self) -> Sampling:
        """The settings', with a model's name that says which weights."""
        return self._sampling

    def check(self) -> None:
        """Find out whether the model is one that reads images and talks.

        Raises:
            VlmUnavailableError: it cannot be read or is none.
        """
        from transformers import (  # slow: only who asks one waits for it
            AutoConfig,
            AutoModelForImageTextToText,
        )

        s = self._settings
        try:
            config = AutoConfig.from_pretrained(s.model, revision=s.revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise _not_loaded(s, error) from error
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise VlmUnavailableError(
                f"vlm.model={s.model} is a {config.model_type} model, which does not read images and answer "
                "in words; name an image-text-to-text model"
            )

    def complete_all(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        """See :meth:`ChatClient.complete_all`."""
        replies: dict[int, Reply] = {}
        assert self._settings.batch is not None, "validated with the settings"
        for indices in _batches(requests, self._settings.batch):
            answered = self._answer([requests[index] for index in indices])
            for index, reply in zip(indices, answered, strict=True):
                replies[index] = reply
                if on_reply:
                    on_reply(index, reply)
        return [replies[index] for index in range(len(requests))]

    @torch.no_grad()
    def _answer(self, requests: Sequence[Request]) -> list[Reply]:
        processor, model = _loaded(self._settings, str(self._device))
        inputs = self._inputs(processor, requests).to(self._device, dtype=model.dtype)
        length = inputs["input_ids"].shape[1]
        written = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._settings.max_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
        )[:, length:]
        texts = processor.batch_decode(written, skip_special_tokens=True)
        read = inputs["attention_mask"].sum(1).tolist()
        wrote = (written != processor.tokenizer.pad_token_id).sum(1).tolist()
        return [
            Reply(
                text=text,
                usage=Usage(calls=1, prompt_tokens=tokens_in, completion_tokens=tokens_out),
                model=self._sampling.model,
            )
            for text, tokens_in, tokens_out in zip(texts, read, wrote, strict=True)
        ]

    def _inputs(self, processor: Any, requests: Sequence[Request]) -> Any:
        dialogues = [[_turn(message) for message in request.messages] for request in requests]
        shown = [
            [_decoded(p) for message in request.messages for p in message.pictures] for request in requests
        ]
        begin = processor.tokenizer.bos_token
        try:
            texts = processor.apply_chat_template(dialogues, add_generation_prompt=True, tokenize=False)
            return processor(
                text=texts,
                images=shown if any(shown) else None,
                add_special_tokens=not (
                    begin and texts[0].startswith(begin)
                ),  # else it would stand there twice
                padding=True,
                return_tensors="pt",
            )
        except (ValueError, TypeError) as error:
            raise VlmError(
                f"vlm.model={self._settings.model} cannot read this dialogue ({error}); "
                "name an instruction-tuned model with a chat template"
            ) from error


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    """Indices of dialogues with equally many pictures, at most ``size`` together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        groups[sum(len(message.pictures) for message in request.messages)].append(index)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _turn(message: Message) -> dict[str, Any]:
    pictures = [{"type": "image"} for _ in message.pictures]
    return {"role": message.role, "content": [*pictures, {"type": "text", "text": message.text}]}


def _decoded(picture: Picture) -> Image.Image:
    data = io.BytesIO(base64.b64decode(picture.url.split(",", 1)[1]))
    return Image.open(data, formats=READ_FORMATS).convert("RGB")


@lru_cache(maxsize=1)
def _loaded(settings: VlmSettings, device: str) -> tuple[Any, Any]:
    """The processor, padding on the left as generating needs, and the model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = {"revision": settings.revision, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(settings.model, **where)
        model = AutoModelForImageTextToText.from_pretrained(
            settings.model, dtype=getattr(torch, str(settings.dtype)), use_safetensors=True, **where
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(settings, error) from error
    if getattr(processor, "tokenizer", None) is None:
        raise VlmUnavailableError(
            f"vlm.model={settings.model} has no tokenizer; save its processor beside it"
        )
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor, model.eval().to(device)


def _not_loaded(settings: VlmSettings, error: Exception) -> VlmUnavailableError:
    said = " ".join(str(error).split())[:300]
    return VlmUnavailableError(
        f"cannot load vlm.model={settings.model!r}: {said}; give a folder in transformers' format with "
        "safetensors, or a hub's owner/name where there is a network"
    )
