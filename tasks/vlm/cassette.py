"""A client that answers from a recorded transcript and from nothing else, so a replay needs no key.

A transcript is JSON lines of :class:`~tasks.vlm.client.Exchange`, in the order of asking.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tasks.store import StoreError, read_lines, write_lines
from tasks.vlm.client import (
    ChatClient,
    Exchange,
    OnReply,
    Reply,
    Request,
    Sampling,
    key_of,
    request_key,
)
from tasks.vlm.transport import VlmError


class MissingAnswerError(VlmError):
    """The transcript does not hold the answer to a question."""


class TranscriptError(VlmError):
    """The transcript is missing, damaged or of several samplings."""


def write_transcript(path: Path, exchanges: Iterable[Exchange]) -> None:
    """Write exchanges in the order given, atomically; equal exchanges give equal bytes."""
    write_lines(path, exchanges)


def read_transcript(path: Path) -> list[Exchange]:
    """Read a transcript back.

    Raises:
        TranscriptError: the file is missing, a line is no exchange, or its key does not fit its content.
    """
    try:
        exchanges = read_lines(path, Exchange)
    except StoreError as error:
        raise TranscriptError(f"{error}; set vlm.transcript to a recorded transcript.jsonl") from error
    for number, exchange in enumerate(exchanges, start=1):
        if exchange.key != key_of(exchange.messages, exchange.sample, exchange.sampling):
            raise TranscriptError(f"{path}, line {number}: the key does not fit the messages; record anew")
    return exchanges


class Cassette(ChatClient):
    """Replays a transcript, with the sampling it was recorded with, so a new transcript comes out equal."""

    def __init__(self, exchanges: Sequence[Exchange], sampling: Sampling, name: str) -> None:
        """Take a recording.

        Args:
            exchanges: what was recorded.
            sampling: stands in where nothing was recorded.
            name: what error messages call the transcript.

        Raises:
            TranscriptError: the exchanges were recorded with several samplings.
        """
        samplings = list(dict.fromkeys(exchange.sampling for exchange in exchanges))
        if len(samplings) > 1:
            raise TranscriptError(
                f"{name} mixes answers of {samplings[0]} and {samplings[1]}; replay each alone"
            )
        self._sampling = samplings[0] if samplings else sampling
        self._replies = {exchange.key: exchange.reply for exchange in exchanges}
        self._name = name

    @classmethod
    def from_file(cls, path: Path, sampling: Sampling) -> "Cassette":
        """Read a transcript file.

        Raises:
            TranscriptError: see :func:`read_transcript`.
        """
        return cls(read_transcript(path), sampling, str(path))

    @property
    def sampling(self) -> Sampling:
        """The recorded one."""
        return self._sampling

    def check(self) -> None:
        """Nothing to check: the transcript was read when this was made."""

    def complete_all(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        """Look replies up.

        Raises:
            MissingAnswerError: one was never recorded.
        """
        replies = [self._lookup(request) for request in requests]
        for index, reply in enumerate(replies):
            if on_reply:
                on_reply(index, reply)
        return replies

    def _lookup(self, request: Request) -> Reply:
        key = request_key(request, self._sampling)
        if key not in self._replies:
            asked = request.messages[-1].text
            raise MissingAnswerError(
                f"{self._name} holds no answer to {asked[:80]!r} (sample {request.sample}, key {key[:12]}); "
                f"it was recorded for other images or prompts: ask a VLM instead (vlm=miniature or openai)"
            )
        return self._replies[key]
