"""Many requests to one OpenAI-compatible address, through the official library.

A fixed number of workers draw from the list of requests, so that concurrency is bounded; each attempt keeps
the pace (requests and tokens per minute) and is tried again, with backoff or after the time that the server
asks for, where trying again may help. The library's own retries are off: they would not keep the pace.
An attempt ends after ``timeout_s`` in all, however slowly bytes drip, and no more is read than an answer can have.
When a request fails for good or the budget is used up, no new one is sent, those under way are waited for -
they are paid for - and then the error is raised. A failed attempt is taken to cost nothing.

The key is read from the environment when a connection is opened, is kept in no attribute of this project's,
and is blotted out of all that comes back, answers included.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from tasks.records import Usage
from tasks.vlm.budget import Budget
from tasks.vlm.failures import FAILURES, BrokenReplyError, headers_of, in_one_sentence, may_pass, moderated
from tasks.vlm.pacing import LONGEST_WAIT, Backoff, Pace, retry_after
from tasks.vlm.replies import ModelList, understood
from tasks.vlm.transport import BudgetError, TransportSettings, VlmError, VlmUnavailableError
from tasks.vlm.wire import NOT_PACKED, bounding

log = logging.getLogger("fscil.vlm")
logging.getLogger("httpcore2").setLevel(logging.INFO)  # its debug lines hold all headers

NO_KEY = "none"
"""Sent to servers that ask for no key, so that a key meant for another provider never reaches them."""

Connection = AsyncOpenAI
Send = Callable[[AsyncOpenAI], Awaitable[bytes]]


class Answered(Protocol):
    """What a call gives: it knows what it cost."""

    @property
    def usage(self) -> Usage:
        """Of this one answer."""


T = TypeVar("T")
A = TypeVar("A", bound=Answered)


@dataclass(frozen=True)
class Call(Generic[A]):
    """One request: how it is sent, how its reply is read, and at most what usage it will have.

    ``send`` gives the bytes of the reply. ``read`` is given them and a function that blots out the key; it raises
    :class:`BrokenReplyError` where there is nothing to be read. ``refused`` stands in for what moderation
    refuses; None makes that an error.
    """

    send: Send
    read: Callable[[bytes, Callable[[str], str]], A]
    worst: Callable[[], Usage]
    refused: Callable[[], A] | None = None


class Endpoint:
    """One provider's address."""

    def __init__(
        self,
        settings: TransportSettings,
        base_url: str | None = None,
        ledger: Path | None = None,
        *,
        direct: bool = False,
        backoff: Backoff | None = None,
    ) -> None:
        """Make ready; nothing is sent yet.

        Args:
            settings: address, limits, prices.
            base_url: in place of the settings' own.
            ledger: file of what the run has paid; None keeps no account beyond this object.
            direct: past any proxy that the environment names.
            backoff: how long to wait after failures.
        """
        self._settings = settings
        self._base_url = base_url or settings.base_url
        self._address = self._base_url or "the provider's address"
        self._direct = direct
        self._backoff = backoff or Backoff()
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._budget = Budget(settings, ledger)
        self._stopping: list[Exception] = []

    @property
    def address(self) -> str:
        """Who is asked."""
        return self._address

    @property
    def paid(self) -> Usage:
        """What the run has paid here so far."""
        return self._budget.paid

    def try_once(self, send: Callable[[AsyncOpenAI], Coroutine[Any, Any, T]]) -> T:
        """Send one request, without trying again and outside the budget.

        Raises:
            VlmError: see :meth:`answer_all`.
        """

        async def work(client: AsyncOpenAI) -> T:
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    return await send(client)
            except FAILURES as error:
                raise self._in_one_sentence(error) from None

        return self._connected(work)

    def answer_all(self, calls: Sequence[Call[A]], on_answer: Callable[[int, A], None]) -> list[A]:
        """Answers in the order of the calls; ``on_answer`` is told each with its index as it comes, then it is paid.

        Raises:
            VlmUnavailableError: no connection, no key, a refused key or an unknown model.
            BudgetError: the budget is used up.
            VlmError: a request was not answered.
        """
        answers: dict[int, A] = {}
        todo, self._stopping = iter(enumerate(calls)), []

        async def worker(client: AsyncOpenAI) -> None:
            for index, call in todo:
                if self._stopping:
                    return
                try:
                    await self._buy(client, call, lambda answer, i=index: keep(i, answer))  # type: ignore[misc]
                except Exception as error:  # raised by the first caller, below, when the others have finished
                    self._stopping.append(error)

        def keep(index: int, answer: A) -> None:
            answers[index] = answer
            on_answer(index, answer)

        async def work(client: AsyncOpenAI) -> None:
            await asyncio.gather(
                *(worker(client) for _ in range(min(self._settings.concurrency, len(calls))))
            )

        if calls:
            self._connected(work)
        if self._stopping:
            first = self._stopping[0]
            raise self._budget.used_up() if isinstance(first, BudgetError) else first
        return [answers[index] for index in range(len(calls))]

    # ------------------------------------------------------------------------------------ one request

    async def _buy(self, client: AsyncOpenAI, call: Call[A], keep: Callable[[A], None]) -> None:
        worst = call.worst()
        self._budget.reserve(worst)
        try:
            answer = await self._insist(client, call, worst)
        except BaseException:
            self._budget.release(worst)
            raise
        try:
            keep(answer)
        finally:  # what cannot be kept, on a full disk, is paid for all the same
            self._budget.settle(worst, answer.usage)

    async def _insist(self, client: AsyncOpenAI, call: Call[A], worst: Usage) -> A:
        attempt = 0
        while True:
            await asyncio.sleep(self._pace.reserve(worst.tokens))
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    data = await call.send(client)
                answer = call.read(data, self._without_key)
            except FAILURES as error:
                if call.refused is not None and moderated(error):
                    return call.refused()
                if (wait := self._wait(error, attempt)) is None:
                    raise self._in_one_sentence(error) from None
                attempt += 1
                log.info("%s, waiting %.1f s before retry %d", type(error).__name__, wait, attempt)
            else:
                self._pace.correct(worst.tokens, answer.usage.tokens)
                return answer
            await asyncio.sleep(wait)

    def _wait(self, error: Exception, attempt: int) -> float | None:
        """Seconds before the next attempt; None where there shall be none."""
        if attempt >= self._settings.max_retries or self._stopping or not may_pass(error):
            return None
        asked = retry_after(headers_of(error))
        if asked is None:
            return self._backoff.seconds(attempt)
        if asked > LONGEST_WAIT:
            return None
        self._pace.hold(asked)
        return max(
            asked + self._backoff.seconds(0) - self._backoff.first_s / 2, self._backoff.seconds(attempt)
        )

    # ------------------------------------------------------------------------------------ the connection

    def _connected(self, work: Callable[[AsyncOpenAI], Coroutine[Any, Any, T]]) -> T:
        async def connected() -> T:
            async with self._connect() as client:
                return await work(client)

        return _run_here(connected)

    def _connect(self) -> AsyncOpenAI:
        client = AsyncOpenAI(
            api_key=self._key(),
            base_url=self._base_url,
            timeout=self._settings.timeout_s,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(
                trust_env=not self._direct,
                follow_redirects=False,  # the key and the images go to one address alone
                headers=NOT_PACKED,
                event_hooks={"response": [bounding(self._settings.longest_reply)]},
            ),
        )
        client._custom_headers = {}  # OPENAI_CUSTOM_HEADERS may hold a key, of whoever, and would go to any address
        # nor is it another one's business who is meant at OpenAI
        if not f".{client.base_url.host}".endswith(".openai.com"):
            client.organization = client.project = None
        parts = urlsplit(str(client.base_url))  # the library's own, where the settings name none
        self._address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        return client

    def _key(self) -> str:
        s, name = self._settings, self._settings.api_key_env
        if name is None:
            return NO_KEY
        if not (key := os.environ.get(name, "").strip()):
            raise VlmUnavailableError(
                f"the environment variable {name} holds no key for the {s.noun}; export {name}=..., "
                f"set {s.group}.api_key_env=null for a server without keys, or {s.instead}"
            )
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise VlmUnavailableError(
                f"the environment variable {name} holds a line break, a blank or a letter outside of ASCII within the "
                f"key for the {s.noun}, which no key has; export {name}=... again, as the provider gave it"
            )
        return key

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self._settings.api_key_env or "", "").strip()
        return text.replace(key, "***") if key else text

    def _in_one_sentence(self, error: Exception) -> VlmError:
        return in_one_sentence(error, self._settings, self._address, self._without_key)


def _run_here(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end, also where an event loop already runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_quiet_at_the_end(work))
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(_quiet_at_the_end(work))).result()


async def _quiet_at_the_end(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """A coroutine; of an interrupt that ends it asyncio prints no traceback beside the one sentence of the command."""

    def told(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception", RuntimeError()), Exception):
            loop.default_exception_handler(context)

    asyncio.get_running_loop().set_exception_handler(told)
    return await work()


async def served_models(client: AsyncOpenAI) -> list[str]:
    """The models that a server lists; empty if it has no such list."""
    try:
        listed = await client.models.with_raw_response.list()
        return [model.id for model in understood(ModelList, listed.content).data or []]
    except (openai.NotFoundError, BrokenReplyError):
        return []
    except openai.APIStatusError as error:
        if error.status_code in (405, 501):
            return []
        raise
