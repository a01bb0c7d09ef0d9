"""A VLM that follows written rules, counts what it is asked, and can fail on demand."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from tasks.records import Usage
from tasks.vlm.client import ChatClient, OnReply, Reply, Request, Sampling, VlmSettings
from tasks.vlm.coordinator import PairToJudge
from tasks.vlm.prompts import COMPARE, DESCRIBE
from tasks.vlm.transport import VlmError

SETTINGS = VlmSettings(
    kind="openai",
    model="fake-1",
    base_url=None,
    api_key_env=None,
    temperature=0.0,
    max_tokens=50,
    token_limit_field="max_tokens",
    timeout_s=5.0,
    max_retries=0,
    concurrency=4,
    detail="low",
    max_side=64,
    transcript=None,
    requests_per_minute=None,
    tokens_per_minute=None,
    price_in=None,
    price_out=None,
    max_cost=None,
    revision=None,
    dtype=None,
    batch=None,
)


class ScriptedVlm(ChatClient):
    """Answers by ``text``, keeps what it was asked, and dies before the request of number ``fail_at``."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[Request] = []
        self.fail_at = fail_at

    @property
    def sampling(self) -> Sampling:
        return SETTINGS.sampling

    def check(self) -> None:
        return

    @abstractmethod
    def text(self, request: Request) -> str:
        """What is answered."""

    def complete_all(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        replies = []
        for index, request in enumerate(requests):
            if self.fail_at == len(self.asked):
                raise VlmError("killed")
            self.asked.append(request)
            usage = Usage(calls=1, prompt_tokens=10, completion_tokens=2)
            replies.append(Reply(text=self.text(request), usage=usage, model="fake-1"))
            if on_reply:
                on_reply(index, replies[-1])
        return replies


class FakeVlm(ScriptedVlm):
    """Captions an image by name; says YES to equal captions; rewrites to ``like <caption>``."""

    def __init__(self, names: dict[str, str], answer: Callable[[str, str, int], str] | None = None) -> None:
        super().__init__()
        self.names = names  # caption by image digest
        self.answer = answer or (lambda a, b, _sample: "YES" if a == b else "NO")

    def text(self, request: Request) -> str:
        last = request.messages[-1]
        if last.text == DESCRIBE:
            return self.names[last.pictures[0].digest]
        first, second = request.messages[1].text, request.messages[3].text
        if last.text == COMPARE:
            return self.answer(first, second, request.sample)
        return f'"like {second}"'

    def count(self, text: str) -> int:
        """How many requests ended in this text."""
        return sum(request.messages[-1].text.startswith(text) for request in self.asked)


def image(value: int) -> torch.Tensor:
    """A plain image [3, 4, 4] that differs by its value in 0..255."""
    return torch.full((3, 4, 4), value / 255)


def pair(name: str, value: int, originals: dict[str, int], label: int = 0) -> PairToJudge:
    """A pair of plain images; the prompt is ``A picture of <label>``."""
    shown = [(original, image(v)) for original, v in originals.items()]
    return PairToJudge(name, image(value), f"A picture of {label}", label, shown)
