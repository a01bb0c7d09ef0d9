"""When the next request may go out: limits per minute, what a server asks for, and waiting after failures."""

import email.utils
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MOST_TIMES, MOST_TOKENS = 10, 4096
"""What a server says that a request took counts for so many times the guess, or so many tokens, at most: some talk
nonsense, and a run that believed one would wait for days."""

LONGEST_WAIT = 300.0
"""Seconds. A server that asks for more is not waited for: the run stops and can be resumed."""


class Pace:
    """Spaces requests evenly, so that no minute sees more requests or tokens than allowed.

    Virtual scheduling: each request moves the time at which the next one may go out. The first one waits
    for nothing, and time that passed unused is not saved up.
    """

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: limits, None for none; clock: seconds."""
        self._per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock = clock
        self._requests_free = self._tokens_free = self._held_until = -math.inf

    def reserve(self, tokens: int) -> float:
        """Take a place in the queue for a request of so many tokens; seconds to wait before sending it."""
        now = self._clock()
        at = max(now, self._requests_free, self._tokens_free, self._held_until)
        self._requests_free = at + self._per_request
        self._tokens_free = at + tokens * self._per_token
        return at - now

    def correct(self, reserved: int, used: int) -> None:
        """Put right what :meth:`reserve` was told, now that the number of tokens is known."""
        self._tokens_free += (_likely(used, reserved) - reserved) * self._per_token

    def hold(self, seconds: float) -> None:
        """Send nothing more for so long: a server asked for it."""
        self._held_until = max(self._held_until, self._clock() + seconds)


class Guess:
    """How many tokens a request will read, before the server says so; learns from what it said.

    A first guess is three characters a token and ``per_image``; it is scaled by the largest excess seen.
    """

    def __init__(self, per_image: int) -> None:
        """Args: per_image: tokens of one image."""
        self._per_image = per_image
        self._scale = 1.0

    def tokens(self, characters: int, images: int) -> int:
        """An upper guess for a request."""
        return math.ceil(self._scale * self._plain(characters, images))

    def learn(self, characters: int, images: int, used: int) -> None:
        """Remember what such a request really read."""
        plain = self._plain(characters, images)
        self._scale = max(self._scale, _likely(used, plain) / plain)

    def _plain(self, characters: int, images: int) -> float:
        return 16 + characters / 3 + images * self._per_image


def _likely(used: float, guess: float) -> float:
    return min(used, max(MOST_TIMES * guess, MOST_TOKENS))


@dataclass(frozen=True)
class Backoff:
    """Exponential waiting with jitter: between half and all of ``first_s * 2**attempt``, at most ``limit_s``."""

    first_s: float = 0.5
    limit_s: float = 30.0
    draw: Callable[[], float] = random.random

    def seconds(self, attempt: int) -> float:
        """How long to wait after the attempt of this number, counted from 0."""
        full = min(self.limit_s, self.first_s * 2.0 ** min(attempt, 30))
        return full * (0.5 + self.draw() / 2)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, or ``retry-after`` as seconds or as a date.

    Args:
        headers: of the response, names in lower case.
        now: seconds since 1970; None reads the clock.

    Returns:
        At least 0; None where it does not ask, or not intelligibly.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if not math.isnan(seconds):
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, OverflowError):
        return None
    return max(0.0, date.timestamp() - (time.time() if now is None else now))
