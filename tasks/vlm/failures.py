"""Why a provider did not answer: whether to ask again, and what to tell the user.

Beside :mod:`tasks.vlm.endpoint` the only import of the official library, for the kinds of its errors.
"""

from collections.abc import Callable, Mapping

import openai

from tasks.text import one_line
from tasks.vlm.pacing import LONGEST_WAIT, retry_after
from tasks.vlm.transport import TransportSettings, VlmError, VlmUnavailableError

OUT_OF_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
KEPT = "what was answered is kept"
MODERATED = ("content_filter", "content_policy_violation", "moderation_blocked")


class BrokenReplyError(Exception):
    """A reply that is none; asking again may help."""


FAILURES = (openai.OpenAIError, BrokenReplyError, TimeoutError)
"""All that can go wrong with a request."""


def may_pass(error: Exception) -> bool:
    """Whether the same request may be answered when it is sent again."""
    if isinstance(error, openai.APIStatusError):
        if (told := error.response.headers.get("x-should-retry")) in ("true", "false"):
            return told == "true"
        if _code(error) in OUT_OF_CREDIT:
            return False
        return error.status_code in (408, 409, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | BrokenReplyError | TimeoutError)


def moderated(error: Exception) -> bool:
    """Whether the provider refuses what was asked, not how or when."""
    return isinstance(error, openai.BadRequestError) and _code(error) in MODERATED


def headers_of(error: Exception) -> Mapping[str, str]:
    """The headers of the response, names in lower case; none where there was no response."""
    return error.response.headers if isinstance(error, openai.APIStatusError) else {}


def _code(error: Exception) -> str:
    return str(getattr(error, "code", None) or "")


def in_one_sentence(
    error: Exception, settings: TransportSettings, address: str, without_key: Callable[[str], str]
) -> VlmError:
    """The error for the user: who, what, and the remedy.

    Args:
        error: one of ``FAILURES``.
        settings: whose group and names the remedy uses.
        address: who was asked.
        without_key: blots the key out of what the provider said.
    """
    s, group, who = settings, settings.group, f"the {settings.noun} at {address}"
    said = one_line(without_key(str(getattr(error, "message", error))), 300)
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return VlmUnavailableError(
            f"{who} did not answer within {s.timeout_s:g} s; raise {group}.timeout_s or lower {group}.concurrency"
        )
    if isinstance(error, openai.APIConnectionError):
        cause = one_line(without_key(str(error.__cause__ or said)), 300)
        return VlmUnavailableError(
            f"no {s.noun} answers at {address} ({cause}); "
            f"start the server there, correct {group}.base_url, or {s.instead}"
        )
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return VlmUnavailableError(
            f"{who} refuses the key of {s.api_key_env or f'{group}.api_key_env=null'}: {said}; "
            f"put a valid key into the variable that {group}.api_key_env names"
        )
    if isinstance(error, openai.NotFoundError) or _code(error) == "model_not_found":
        return VlmUnavailableError(
            f"{who} knows no model {getattr(s, 'model', None)!r} or no such request: {said}; "
            f"correct {group}.model or {group}.base_url"
        )
    if isinstance(error, openai.RateLimitError):
        return VlmError(
            f"{who} takes no more requests for now{_asked_wait(error)}: {said}; {KEPT}: lower {group}.concurrency, "
            f"set {group}.requests_per_minute and {group}.tokens_per_minute to your account's, and run it again"
        )
    if isinstance(error, BrokenReplyError):
        return VlmError(f"{who} sent {said}; check that {group}.base_url ends in /v1")
    if isinstance(error, openai.APIStatusError) and error.response.is_redirect:
        to = one_line(without_key(error.response.headers.get("location", "")), 300)
        return VlmUnavailableError(
            f"{who} sends on to {to}, where neither key nor images are sent unasked; "
            f"if you trust that address, set {group}.base_url to it"
        )
    return VlmError(
        f"{who} did not answer: {type(error).__name__}{_asked_wait(error)}: {said}; {KEPT}: "
        f"{_remedy(error, group)}, and run it again"
    )


def _remedy(error: Exception, group: str) -> str:
    if isinstance(error, openai.APIStatusError) and error.status_code < 500:
        return f"correct what it names in {group}"
    return "see that the server is well"


def _asked_wait(error: Exception) -> str:
    asked = retry_after(headers_of(error))
    return f" and asks to wait {asked:,.0f} s" if asked is not None and asked > LONGEST_WAIT else ""
