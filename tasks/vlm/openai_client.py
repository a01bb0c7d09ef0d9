"""A client of any OpenAI-compatible endpoint, through the official library: the only import of it.

Chat Completions is the subset that hosted and local servers share. The library does retries (with backoff,
honouring retry-after) and time limits; this file adds a bound on concurrency and errors in one sentence.
The key is read from the environment when a connection is opened, is kept in no attribute of this project's,
and is blotted out of messages.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from tasks.records import Usage
from tasks.vlm.client import (
    ChatClient,
    Message,
    OnReply,
    Reply,
    Request,
    Sampling,
    VlmError,
    VlmSettings,
    VlmUnavailableError,
)

T = TypeVar("T")
Work = Callable[[AsyncOpenAI], Coroutine[Any, Any, T]]

NO_KEY = "none"
"""Sent to servers that ask for no key, so that a key meant for another provider never reaches them."""


class OpenAiClient(ChatClient):
    """Asks one model at one address."""

    def __init__(self, settings: VlmSettings, base_url: str | None = None) -> None:
        """Args: settings: model and limits; base_url: in place of ``settings.base_url``."""
        self._settings = settings
        self._base_url = base_url or settings.base_url

    @property
    def sampling(self) -> Sampling:
        """The settings' own."""
        return self._settings.sampling

    def check(self) -> None:
        """Reach the server, and find the model among those it lists, or else try it with one word.

        Raises:
            VlmUnavailableError: no connection, no key, a refused key or an unknown model.
        """
        if self._settings.model not in self.served_models():
            self._run(self._ping, retries=0)

    def served_models(self) -> list[str]:
        """The models that the server lists; empty if it has no such list.

        Raises:
            VlmUnavailableError: nobody answers at the address, or the key is refused.
        """
        return self._run(_list_models, retries=0)

    def complete_all(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        """See :meth:`ChatClient.complete_all`; at most ``settings.concurrency`` are under way at once."""
        if not requests:
            return []

        async def work(client: AsyncOpenAI) -> list[Reply]:
            gate = asyncio.Semaphore(self._settings.concurrency)
            return await _all_or_none(
                [self._ask(client, gate, request, i, on_reply) for i, request in enumerate(requests)]
            )

        return self._run(work, retries=self._settings.max_retries)

    async def _ask(
        self,
        client: AsyncOpenAI,
        gate: asyncio.Semaphore,
        request: Request,
        index: int,
        on_reply: OnReply | None,
    ) -> Reply:
        async with gate:
            completion = await client.chat.completions.create(**self._body(request.messages))
        reply = _reply(completion, self._settings.model)
        if on_reply:
            on_reply(index, reply)
        return reply

    async def _ping(self, client: AsyncOpenAI) -> None:
        hello = Message(role="user", text="Answer with one word: YES.")
        await client.chat.completions.create(**self._body([hello]))

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        s = self._settings
        body: dict[str, Any] = {
            "model": s.model,
            "messages": [{"role": m.role, "content": _content(m, s.detail)} for m in messages],
            s.token_limit_field: s.max_tokens,
        }
        return body if s.temperature is None else {**body, "temperature": s.temperature}

    # ------------------------------------------------------------------------------------ the connection

    def _run(self, work: Work[T], retries: int) -> T:
        async def connected() -> T:
            async with self._connect(retries) as client:
                try:
                    return await work(client)
                except openai.OpenAIError as error:
                    raise self._in_one_sentence(error, str(client.base_url)) from None

        return _run_here(connected)

    def _connect(self, retries: int) -> AsyncOpenAI:
        local = self._settings.kind == "miniature"
        return AsyncOpenAI(
            api_key=self._key(),
            base_url=self._base_url,
            timeout=self._settings.timeout_s,
            max_retries=retries,
            http_client=DefaultAsyncHttpxClient(trust_env=False) if local else None,  # past any proxy
        )

    def _key(self) -> str:
        name = self._settings.api_key_env
        if name is None:
            return NO_KEY
        if not (key := os.environ.get(name, "").strip()):
            raise VlmUnavailableError(
                f"the environment variable {name} holds no key for the VLM; export {name}=..., "
                f"set vlm.api_key_env=null for a server without keys, or use vlm=miniature"
            )
        return key

    def _in_one_sentence(self, error: openai.OpenAIError, address: str) -> VlmError:
        s = self._settings
        said = self._without_key(" ".join(str(getattr(error, "message", error)).split()))[:300]
        if isinstance(error, openai.APITimeoutError):
            return VlmUnavailableError(
                f"the VLM at {address} did not answer within {s.timeout_s:g} s; "
                "raise vlm.timeout_s or lower vlm.concurrency"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = self._without_key(str(error.__cause__ or said))
            return VlmUnavailableError(
                f"no VLM answers at {address} ({cause}); "
                "start the server there, correct vlm.base_url, or use vlm=miniature"
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return VlmUnavailableError(
                f"the VLM at {address} refuses the key of {s.api_key_env or 'vlm.api_key_env=null'}: {said}; "
                "put a valid key into the variable that vlm.api_key_env names"
            )
        if isinstance(error, openai.NotFoundError):
            return VlmUnavailableError(
                f"the VLM at {address} knows no model {s.model!r} or no chat completions: {said}; "
                "correct vlm.model or vlm.base_url"
            )
        return VlmError(f"the VLM at {address} did not answer: {type(error).__name__}: {said}")

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self._settings.api_key_env or "", "").strip()
        return text.replace(key, "***") if key else text


def _content(message: Message, detail: str) -> str | list[dict[str, Any]]:
    if not message.pictures:
        return message.text
    images = [{"type": "image_url", "image_url": {"url": p.url, "detail": detail}} for p in message.pictures]
    return [{"type": "text", "text": message.text}, *images]


def _reply(completion: Any, model: str) -> Reply:
    if not getattr(completion, "choices", None):
        raise VlmError(f"the VLM {model!r} sent a reply without choices; check that vlm.base_url ends in /v1")
    message, usage = completion.choices[0].message, completion.usage
    tokens = Usage(
        calls=1,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )
    text = message.content or getattr(message, "refusal", None) or ""
    return Reply(text=text, usage=tokens, model=completion.model or model)


async def _list_models(client: AsyncOpenAI) -> list[str]:
    try:
        return [model.id for model in (await client.models.list()).data or []]
    except (openai.NotFoundError, openai.APIResponseValidationError):
        return []
    except openai.APIStatusError as error:
        if error.status_code in (405, 501):
            return []
        raise


async def _all_or_none(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _run_here(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end, also where an event loop already runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()
