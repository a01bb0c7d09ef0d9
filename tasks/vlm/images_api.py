"""Images from an OpenAI-compatible images endpoint (the paper's GPT-4o baseline), as a generator that cannot learn.

Each image is asked for by POST /images/generations and is kept, as the provider sent it, by the content of the
question: model, form, prompt and a number that tells equal prompts apart. So a run that was killed pays for no
image twice, nor does another that asks for the same. A provider's model takes no seed: what was drawn once can
be read again but not drawn again.
"""

import base64
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tasks.images import Format, load_images, refuse_unreadable
from tasks.records import Digest, Usage
from tasks.store import write_atomic
from tasks.vlm.claims import ask_once
from tasks.vlm.endpoint import Call, Connection, Endpoint, served_models
from tasks.vlm.failures import BrokenReplyError
from tasks.vlm.kept import marked, unmarked
from tasks.vlm.pacing import Backoff
from tasks.vlm.replies import Images, understood
from tasks.vlm.transport import TransportSettings, VlmError

log = logging.getLogger("fscil.vlm")

WRITTEN_TOKENS = 4200
"""A first guess at the tokens of one image, for the budget; then the most that any image took."""


class ImagesApiSettings(TransportSettings):
    """Which provider's model draws, and how its images are kept.

    Attributes:
        model: the provider's name for it.
        ask_size: what the provider is asked for, such as ``1024x1024``.
        quality: the provider's name for it; None leaves it out.
        response_format: ``b64_json`` for models that else send an address; None leaves it out, as others insist.
        size: side in pixels of the images kept in the set: the centre square, resampled.
        format: of their files.
        batch: images asked for in one shard.
        every_epoch: whether each epoch asks for new images, or all epochs share those of the first.
        price_image: of one image, where it is not charged by tokens.
    """

    group: ClassVar[str] = "images_api"
    noun: ClassVar[str] = "image model"
    instead: ClassVar[str] = "use augmenter=fixed"
    longest_reply: ClassVar[int] = 64 * 2**20  # bytes of one image in base64

    model: str = Field(min_length=1)
    ask_size: str = Field(pattern=r"^(\d+x\d+|auto)$")
    quality: str | None
    response_format: Literal["b64_json"] | None
    size: int = Field(ge=8)
    format: Format
    batch: int = Field(ge=1)
    every_epoch: bool
    price_image: float | None = Field(ge=0)

    def cost(self, usage: Usage) -> float | None:
        """What this usage costs, by the image, by tokens or both; None where no price is known."""
        by_tokens = super().cost(usage)
        if self.price_image is None:
            return by_tokens
        return usage.calls * self.price_image + (by_tokens or 0.0)

    @property
    def question(self) -> dict[str, object]:
        """What every request says beside the prompt."""
        asked = {"quality": self.quality, "response_format": self.response_format}
        known = {name: value for name, value in asked.items() if value is not None}
        return {"model": self.model, "size": self.ask_size, "n": 1, **known}

    @property
    def identity(self) -> dict[str, object]:
        """What a stage that draws puts into its fingerprint."""
        kept = {
            "side": self.size,
            "format": self.format,
            "batch": self.batch,
            "every_epoch": self.every_epoch,
        }
        return {**self.question, **kept}

    @property
    def digest(self) -> Digest:
        """Stands where a generator's weights' digest stands: the provider's name for its model is all we know."""
        return Digest(f"api:{self.model}")


@dataclass(frozen=True)
class Drawn:
    """One image as the provider sent it, and what it cost."""

    data: bytes
    usage: Usage


class ImagesApi:
    """Draws by asking. ``batch`` is as the settings say."""

    def __init__(
        self,
        settings: ImagesApiSettings,
        cache: Path,
        ledger: Path | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        """Args: settings; cache: folder of what was drawn; ledger: file of what the run has paid; backoff."""
        self.settings = settings
        self.batch = settings.batch
        self._cache = cache
        self._endpoint = Endpoint(settings, None, ledger, backoff=backoff)
        self._most_written = 0

    @property
    def paid(self) -> Usage:
        """What the run has paid so far."""
        return self._endpoint.paid

    def check(self) -> None:
        """Find out whether the provider answers and takes the key; no image is paid for.

        Raises:
            VlmUnavailableError: it does not.
        """
        self._endpoint.try_once(served_models)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 size size"]:
        """One image for each prompt and seed; a seed only tells equal prompts apart.

        Args:
            prompts: n texts.
            seeds: n numbers.

        Returns:
            float32 [n, 3, size, size] in [0, 1].

        Raises:
            VlmError: an image was not sent; those that were are kept.
            BudgetError: the budget is used up; all that was drawn is kept.
        """
        keys = [self._key(*one) for one in zip(prompts, seeds, strict=True)]
        prompt_of = dict(zip(keys, prompts, strict=True))

        def known(key: str) -> bool:
            return self._kept(key) is not None

        def ask(wanted: Sequence[str], kept: Callable[[str], None]) -> None:
            def keep(index: int, drawn: Drawn) -> None:
                self._keep(wanted[index], drawn)
                kept(wanted[index])

            self._endpoint.answer_all([self._call(prompt_of[key]) for key in wanted], keep)

        if missing := [key for key in prompt_of if not known(key)]:
            ask_once(self._cache, missing, known, ask)
        return load_images([self._file(key, ".image") for key in keys], self.settings.size)

    def usage_of(self, prompts: Sequence[str], seeds: Sequence[int]) -> Usage:
        """What these images, drawn before, cost when they were bought."""
        keys = dict.fromkeys(self._key(*one) for one in zip(prompts, seeds, strict=True))
        return Usage.total(usage for key in keys if (usage := self._kept(key)) is not None)

    # ------------------------------------------------------------------------------------ one image

    def _call(self, prompt: str) -> Call[Drawn]:
        async def send(client: Connection) -> bytes:
            asked: Any = {"prompt": prompt, **self.settings.question}
            return (await client.images.with_raw_response.generate(**asked)).content

        def read(reply: bytes, blot: Callable[[str], str]) -> Drawn:
            drawn = self._read(understood(Images, reply))
            self._most_written = max(self._most_written, drawn.usage.completion_tokens)
            return drawn

        def worst() -> Usage:
            written = self._most_written or WRITTEN_TOKENS
            return Usage(calls=1, prompt_tokens=16 + len(prompt) // 3, completion_tokens=written)

        return Call(send, read, worst)

    def _read(self, reply: Images) -> Drawn:
        if not reply.data[0].b64_json:
            raise VlmError(
                f"the image model {self.settings.model!r} sent an address in place of the image; "
                "set images_api.response_format=b64_json"
            )
        try:
            data = base64.b64decode(reply.data[0].b64_json, validate=True)
            refuse_unreadable(data, "reply")
        except ValueError as error:
            raise BrokenReplyError("something that is no picture that can be read") from error
        return Drawn(data, self.settings.priced(reply.used))

    # ------------------------------------------------------------------------------------ what was drawn

    def _key(self, prompt: str, seed: int) -> str:
        content = json.dumps([self.settings.question, prompt, seed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _file(self, key: str, suffix: str) -> Path:
        return self._cache / key[:2] / f"{key}{suffix}"

    def _keep(self, key: str, drawn: Drawn) -> None:
        write_atomic(self._file(key, ".image"), drawn.data)
        write_atomic(self._file(key, ".json"), marked(drawn.usage.model_dump_json(), drawn.data))

    def _kept(self, key: str) -> Usage | None:
        """What an image cost that is here as it was kept; None where it has to be bought."""
        image, paid = self._file(key, ".image"), self._file(key, ".json")
        if not paid.is_file():
            return None
        try:
            return Usage.model_validate_json(unmarked(paid.read_bytes(), image.read_bytes()))
        except (FileNotFoundError, ValueError):
            log.warning("the image %s, which was paid for, is damaged and will be asked for again", image)
            return None
