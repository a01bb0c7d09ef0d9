"""How a provider is reached, how politely it is asked and what it costs. Nothing here changes an answer.

So none of these settings enters a fingerprint or a request's key, and all but the address and the key's
name may be changed between two starts of one run: a higher ``max_cost`` resumes what the lower one stopped.
The key itself is in no setting, only the name of the environment variable that holds it.
"""

import re
from typing import ClassVar, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from tasks.records import Frozen, Usage

PACING = frozenset(
    {
        "timeout_s", "max_retries", "concurrency", "requests_per_minute", "tokens_per_minute",
        "price_in", "price_out", "price_image", "max_cost",
    }
)  # fmt: skip
"""Settings that a run's identity leaves out."""


class VlmError(RuntimeError):
    """A provider did not answer as it should; the message names what to change."""


class VlmUnavailableError(VlmError):
    """Nobody answers at the address, or it refuses the key or the model."""


class BudgetError(VlmError):
    """``max_cost`` is reached; every answer so far is kept."""


class TransportSettings(Frozen):
    """Address, patience, limits and prices of one provider.

    ``requests_per_minute``, ``tokens_per_minute`` and ``max_cost`` limit nothing where they are None.
    Prices are per million tokens, in any one currency, which is also that of ``max_cost``; None is unknown.

    Raises:
        ValueError: an address that is none or holds a secret, a key in the place of its variable's name, or
            a limit on costs without prices.
    """

    group: ClassVar[str] = "vlm"
    noun: ClassVar[str] = "VLM"
    instead: ClassVar[str] = "use vlm=miniature"
    longest_reply: ClassVar[int] = 4 * 2**20  # bytes; the list of models is the longest that is wanted

    base_url: str | None
    api_key_env: str | None
    timeout_s: float = Field(gt=0)
    max_retries: int = Field(ge=0)
    concurrency: int = Field(ge=1)
    requests_per_minute: int | None = Field(ge=1)
    tokens_per_minute: int | None = Field(ge=1)
    price_in: float | None = Field(ge=0)
    price_out: float | None = Field(ge=0)
    max_cost: float | None = Field(gt=0)

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.base_url is not None and not _is_address(self.base_url):
            raise ValueError(
                f"{self.group}.base_url must look like http://host:port/v1, without name, password, ? or #; "
                f"a key goes into the environment variable that {self.group}.api_key_env names"
            )
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise ValueError(
                f"{self.group}.api_key_env is the NAME of an environment variable, such as OPENAI_API_KEY, and "
                "what was given is none; export the key under such a name, and withdraw it if it was given here"
            )
        if self.max_cost is not None and self.cost(Usage(calls=1)) is None:
            raise ValueError(
                f"{self.group}.max_cost={self.max_cost:g} needs prices to count with: "
                f"set {self.group}.price_in and {self.group}.price_out per million tokens"
            )
        return self

    def cost(self, usage: Usage) -> float | None:
        """What this usage costs; None where the prices are unknown."""
        if self.price_in is None or self.price_out is None:
            return None
        return (usage.prompt_tokens * self.price_in + usage.completion_tokens * self.price_out) / 1e6

    def priced(self, usage: Usage) -> Usage:
        """The usage with its cost."""
        return usage.model_copy(update={"cost": self.cost(usage)})


def _is_address(url: str) -> bool:
    parts = urlsplit(url)
    more = "@" in parts.netloc or parts.query or parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not more
