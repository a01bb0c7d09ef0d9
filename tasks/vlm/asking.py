"""Asking a VLM many questions: each distinct one once, remembered in the order of asking."""

from collections import Counter
from collections.abc import Callable, Sequence

from tasks.records import Usage
from tasks.vlm.client import ChatClient, Exchange, Message, Reply, Request, request_key

Progress = Callable[[str, int, int], None]
"""Told the phase (captions, judgements, ...), how many of its answers are there, and of how many."""


class Asker:
    """Asks a client and keeps the exchanges."""

    def __init__(self, client: ChatClient, progress: Progress | None) -> None:
        """Args: client: who answers; progress: told as answers come in."""
        self._client = client
        self._progress = progress
        self._exchanges: dict[str, Exchange] = {}
        self._done: Counter[str] = Counter()

    @property
    def exchanges(self) -> list[Exchange]:
        """Every question with its answer, in the order of asking."""
        return list(self._exchanges.values())

    @property
    def usage(self) -> Usage:
        """What was asked for, also where a cache answered."""
        return Usage.total(exchange.reply.usage for exchange in self.exchanges)

    def ask(self, phase: str, requests: Sequence[Request], total: int) -> list[Reply]:
        """Replies in the order of the requests.

        Args:
            phase: what progress calls them.
            requests: equal ones are asked once.
            total: how many the phase will ask in all.

        Raises:
            VlmError: the VLM did not answer.
        """
        keys = [request_key(request, self._client.sampling) for request in requests]
        new = {k: r for k, r in zip(keys, requests, strict=True) if k not in self._exchanges}
        known = len(keys) - len(new)
        self._tell(phase, known, total)
        replies = self._client.complete_all(list(new.values()), lambda _i, _r: self._tell(phase, 1, total))
        for (key, request), reply in zip(new.items(), replies, strict=True):
            self._exchanges[key] = Exchange.of(request, self._client.sampling, reply)
        return [self._exchanges[key].reply for key in keys]

    def ask_until(
        self, phase: str, dialogues: Sequence[tuple[Message, ...]], good: Callable[[str], bool], total: int
    ) -> list[str]:
        """Ask; ask once more, as a second sample, where the reply is not good. Gives the last replies."""
        texts = [reply.text for reply in self.ask(phase, [Request(messages=d) for d in dialogues], total)]
        bad = [n for n, text in enumerate(texts) if not good(text)]
        again = self.ask(f"{phase}, again", [Request(messages=dialogues[n], sample=1) for n in bad], len(bad))
        for n, reply in zip(bad, again, strict=True):
            texts[n] = reply.text
        return texts

    def _tell(self, phase: str, more: int, total: int) -> None:
        self._done[phase] += more
        if self._progress and more:
            self._progress(phase, min(self._done[phase], total), total)
