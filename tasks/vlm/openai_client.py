"""The chat client of any OpenAI-compatible endpoint: dialogues to request bodies, completions to replies.

Chat Completions is the subset that hosted and local servers share. How requests travel, are repeated, paced
and paid for is :mod:`tasks.vlm.endpoint`'s.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.records import Usage
from tasks.text import shortened
from tasks.vlm.client import ChatClient, Message, OnReply, Reply, Request, Sampling, VlmSettings
from tasks.vlm.endpoint import Call, Connection, Endpoint, served_models
from tasks.vlm.pacing import Backoff, Guess
from tasks.vlm.replies import Completion, understood

log = logging.getLogger("fscil.vlm")

IMAGE_TOKENS = {"low": 100, "auto": 800, "high": 800}
"""A first guess, by detail; providers count otherwise and say so with every answer."""

CHARS_PER_TOKEN, MODEL_CHARS = 16, 200
"""What a reply, and the name that a server gives itself, are cut to: more than any that keeps its limit."""


class OpenAiClient(ChatClient):
    """Asks one model at one address."""

    def __init__(
        self,
        settings: VlmSettings,
        base_url: str | None = None,
        ledger: Path | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        """Make ready; nothing is sent yet.

        Args:
            settings: model and limits.
            base_url: in place of ``settings.base_url``.
            ledger: file of what the run has paid so far; None keeps no account beyond this object.
            backoff: how long to wait after failures.
        """
        self._settings = settings
        self._endpoint = Endpoint(
            settings, base_url, ledger, direct=settings.kind == "miniature", backoff=backoff
        )
        self._guess = Guess(IMAGE_TOKENS[settings.detail])
        self._told: set[str] = set()

    @property
    def sampling(self) -> Sampling:
        """The settings' own."""
        return self._settings.sampling

    @property
    def paid(self) -> Usage:
        """What the run has paid so far."""
        return self._endpoint.paid

    def check(self) -> None:
        """Reach the server, and find the model among those it lists, or else try it with one word.

        Raises:
            VlmUnavailableError: no connection, no key, a refused key or an unknown model.
        """
        if self._settings.model not in self.served_models():
            self._endpoint.try_once(self._ping)

    def served_models(self) -> list[str]:
        """The models that the server lists; empty if it has no such list.

        Raises:
            VlmUnavailableError: nobody answers at the address, or the key is refused.
        """
        return self._endpoint.try_once(served_models)

    def complete_all(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        """See :meth:`ChatClient.complete_all`; what the provider's moderation refuses has an empty reply."""
        calls = [self._call(request.messages) for request in requests]
        return self._endpoint.answer_all(calls, on_reply or (lambda _index, _reply: None))

    def _call(self, messages: Sequence[Message]) -> Call[Reply]:
        size = sum(len(m.text) for m in messages), sum(len(m.pictures) for m in messages)

        async def send(client: Connection) -> bytes:
            return (await client.chat.completions.with_raw_response.create(**self._body(messages))).content

        def read(data: bytes, blot: Callable[[str], str]) -> Reply:
            reply = self._reply(understood(Completion, data), blot)
            self._guess.learn(*size, reply.usage.prompt_tokens)
            return reply

        def worst() -> Usage:
            return Usage(
                calls=1,
                prompt_tokens=self._guess.tokens(*size),
                completion_tokens=self._settings.max_tokens,
            )

        def refused() -> Reply:
            return Reply(text="", usage=self._settings.priced(Usage(calls=1)), model=self._settings.model)

        return Call(send, read, worst, refused)

    async def _ping(self, client: Connection) -> None:
        hello = Message(role="user", text="Answer with one word: YES.")
        sent = await client.chat.completions.with_raw_response.create(**self._body([hello]))
        understood(Completion, sent.content)

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        s = self._settings
        body: dict[str, Any] = {
            "model": s.model,
            "messages": [{"role": m.role, "content": _content(m, s.detail)} for m in messages],
            s.token_limit_field: s.max_tokens,
        }
        return body if s.temperature is None else {**body, "temperature": s.temperature}

    def _reply(self, completion: Completion, blot: Callable[[str], str]) -> Reply:
        said = completion.choices[0].message
        model = shortened(blot(completion.model or self._settings.model), MODEL_CHARS)
        self._tell_of(model)
        most = CHARS_PER_TOKEN * max(self._settings.max_tokens, 1000)
        text = shortened(blot(said.content or said.refusal or ""), most)
        return Reply(text=text, usage=self._settings.priced(completion.used), model=model)

    def _tell_of(self, model: str) -> None:
        """Say once that another model answers; names with an owner or a date more are the same model."""
        asked = self._settings.model
        if model not in self._told and asked not in model and model not in asked:
            self._told.add(model)
            log.warning(
                "the VLM at %s answers as %r, and vlm.model is %r; its answers are taken",
                self._endpoint.address, model[:100], asked,
            )  # fmt: skip


def _content(message: Message, detail: str) -> str | list[dict[str, Any]]:
    if not message.pictures:
        return message.text
    images = [{"type": "image_url", "image_url": {"url": p.url, "detail": detail}} for p in message.pictures]
    return [{"type": "text", "text": message.text}, *images]
