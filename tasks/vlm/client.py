"""What a VLM client is: settings, messages, replies, and the identity of a request.

A client answers chat requests (:class:`ChatClient`). Wherever a request is stored, a picture is its md5, so
no cache and no transcript holds image data. A request's key is a sha256 of what can change the answer:
the model, the sampling, the messages and which of several samples is wanted. Time limits, retries,
concurrency and the address stay out, so a cached answer serves whichever machine asks.
"""

import base64
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from tasks.images import to_data_url
from tasks.records import Digest, Frozen, Usage
from tasks.text import readable
from tasks.vlm.transport import TransportSettings

Detail = Literal["low", "high", "auto"]
OnReply = Callable[[int, "Reply"], None]
"""Called with a request's index as soon as its reply is there, in any order."""


# ---------------------------------------------------------------------------------------- settings


class Sampling(Frozen):
    """The part of the settings that can change an answer, hence part of every request's key."""

    model: str
    temperature: float | None
    max_tokens: int
    detail: Detail


class VlmSettings(TransportSettings):
    """Which VLM is asked, and how.

    ``miniature`` is the server that the run starts for itself, ``openai`` any OpenAI-compatible endpoint,
    ``transformers`` a model in this process (``model`` is its folder or its name on a hub), ``cassette`` a
    recorded transcript. ``temperature=None`` leaves it to the provider, which some models insist on.
    ``revision``, ``dtype`` and ``batch`` are read only for ``transformers``.

    Raises:
        ValueError: a cassette without transcript, a transcript that nobody would read, a temperature where
            answers are the likeliest ones, or what :class:`TransportSettings` refuses.
    """

    kind: Literal["miniature", "openai", "transformers", "cassette"]
    model: str = Field(min_length=1)
    temperature: float | None = Field(ge=0)
    max_tokens: int = Field(ge=1)
    token_limit_field: Literal["max_tokens", "max_completion_tokens"]
    detail: Detail
    max_side: int = Field(ge=1)
    transcript: Path | None
    revision: str | None
    dtype: Literal["float32", "bfloat16"] | None
    batch: int | None = Field(ge=1)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.kind == "cassette" and self.transcript is None:
            raise ValueError(
                "vlm.kind=cassette replays a recording: set vlm.transcript to a transcript.jsonl"
            )
        if self.kind != "cassette" and self.transcript is not None:
            raise ValueError(
                f"vlm.transcript={self.transcript} is read only with vlm.kind=cassette, not {self.kind}; "
                "set it to null"
            )
        if self.kind == "transformers" and (self.temperature or self.dtype is None or self.batch is None):
            raise ValueError(
                f"vlm.kind=transformers gives the likeliest answer, in batches: set vlm.temperature=0 (it is "
                f"{self.temperature}), vlm.dtype (it is {self.dtype}) and vlm.batch (it is {self.batch})"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """What of these settings can change an answer."""
        return Sampling(
            model=self.model, temperature=self.temperature, max_tokens=self.max_tokens, detail=self.detail
        )

    @property
    def identity(self) -> dict[str, object]:
        """What a stage that asks the VLM puts into its fingerprint: nothing of where, how fast and at what price."""
        asked = {**self.sampling.model_dump(), "max_side": self.max_side}
        if self.kind != "transformers":
            return asked
        return {**asked, "model": Path(self.model).name, "dtype": self.dtype, "batch": self.batch}


# ---------------------------------------------------------------------------------------- messages


class Picture(Frozen):
    """An image as it is sent: a data URL, and the md5 of the file inside, which stands for it elsewhere."""

    digest: Digest
    url: str = Field(repr=False)

    @classmethod
    def of(cls, image: Tensor | Path, max_side: int) -> Self:
        """Encode [3, h, w] in [0, 1], or a picture file, with no side longer than ``max_side`` pixels."""
        url = to_data_url(image, max_side)
        data = base64.b64decode(url.split(",", 1)[1])
        return cls(digest=Digest(hashlib.md5(data, usedforsecurity=False).hexdigest()), url=url)


class Message(Frozen):
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: tuple[Picture, ...] = ()


class StoredMessage(Frozen):
    """A turn as it is kept: ``{"text": ...}`` and ``{"image": <md5>}``, never the image itself."""

    role: Literal["system", "user", "assistant"]
    content: tuple[dict[Literal["text", "image"], str], ...]


class Request(Frozen):
    """A dialogue to be continued. Another ``sample`` is another answer to the same dialogue."""

    messages: tuple[Message, ...] = Field(min_length=1)
    sample: int = Field(default=0, ge=0)

    @property
    def stored(self) -> tuple[StoredMessage, ...]:
        """The messages with digests in place of pictures."""
        return tuple(_stored(message) for message in self.messages)


def _stored(message: Message) -> StoredMessage:
    pictures = tuple({"image": str(picture.digest)} for picture in message.pictures)
    return StoredMessage(role=message.role, content=({"text": message.text}, *pictures))


class Reply(Frozen):
    """What came back. ``usage.calls`` is 1; ``model`` is the name that the server gave itself.

    Of either text only what :func:`~tasks.text.readable` leaves is kept, wherever it came from.
    """

    text: Annotated[str, BeforeValidator(readable)]
    usage: Usage
    model: Annotated[str, BeforeValidator(readable)]


class Exchange(Frozen):
    """A request and its reply, as caches and transcripts keep them."""

    key: str
    sampling: Sampling
    messages: tuple[StoredMessage, ...]
    sample: int
    reply: Reply

    @classmethod
    def of(cls, request: Request, sampling: Sampling, reply: Reply) -> Self:
        """Put a request and its reply together."""
        stored = request.stored
        key = key_of(stored, request.sample, sampling)
        return cls(key=key, sampling=sampling, messages=stored, sample=request.sample, reply=reply)


def key_of(messages: Sequence[StoredMessage], sample: int, sampling: Sampling) -> str:
    """The identity of a request: 64 hexadecimal digits of sha256 over canonical JSON."""
    identity = {
        "sampling": sampling.model_dump(),
        "messages": [message.model_dump() for message in messages],
        "sample": sample,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def request_key(request: Request, sampling: Sampling) -> str:
    """:func:`key_of` a request that has not been stored yet."""
    return key_of(request.stored, request.sample, sampling)


# ---------------------------------------------------------------------------------------- the client


class ChatClient(Protocol):
    """Answers dialogues. Implementations inherit from it."""

    @property
    @abstractmethod
    def sampling(self) -> Sampling:
        """How it is asked: part of every key."""

    @abstractmethod
    def check(self) -> None:
        """Find out whether it can answer, before anything expensive begins.

        Raises:
            VlmError: it cannot; the message is one sentence with the remedy.
        """

    @abstractmethod
    def complete_all(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        """Answer many requests, several at a time; replies in the order of the requests.

        If one fails, ``on_reply`` has seen every reply that came before.

        Raises:
            VlmError: a request was not answered.
        """

    def complete(self, request: Request) -> Reply:
        """Answer one request.

        Raises:
            VlmError: it was not answered.
        """
        return self.complete_all([request])[0]
