"""A provider that dies, drips, floods, sends elsewhere or talks nonsense: it ends as configured, in one sentence.

And whatever was answered is kept and counted; nothing is asked for twice.
"""

import gzip
import json
import logging
import resource
import time
from pathlib import Path

import pytest
from fake_vlm import SETTINGS, FakeVlm, image, pair
from provider import Act, Provider, completion_of, providing, refusal
from test_openai_client import COST, ask, client, priced, questions

from tasks.records import Usage
from tasks.vlm.cache import CachedClient
from tasks.vlm.client import Reply, Request
from tasks.vlm.coordinator import Coordinator
from tasks.vlm.pacing import Backoff, retry_after
from tasks.vlm.prompts import COMPARE, DESCRIBE, clean_prompt
from tasks.vlm.transport import BudgetError, VlmError, VlmUnavailableError

KEY = "sk-planted-90b1d2"


# ------------------------------------------------------------------------------------------ how bytes come


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (Act(die=True), "no VLM answers at"),
        (Act(flood=16 * 2**20), "sent more than 4,194,304 bytes"),
        (Act(flood=16 * 2**20, chunked=True), "sent more than 4,194,304 bytes"),
        (Act(500, flood=16 * 2**20), "sent more than 4,194,304 bytes"),
        (Act(headers={"Content-Encoding": "gzip"}, body=gzip.compress(b" " * 10**7)), "sent a packed reply"),
    ],
    ids=["dies", "floods", "floods unannounced", "floods with an error", "packed"],
)
def test_broken_bodies_are_tried_again_within_patience_then_named(act: Act, says: str) -> None:
    with providing(act) as provider:
        assert client(provider.base_url).complete(ask()).text == "re: hello"
        assert provider.billed["hello"] == 1
    with providing(act, act) as provider:
        with pytest.raises(VlmError, match=says) as stop:
            client(provider.base_url, max_retries=1).complete(ask())
        assert len(provider.sent) == 2
        assert f"127.0.0.1:{provider.server_address[1]}" in str(stop.value)


def test_a_hundred_megabytes_are_neither_read_nor_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with providing(Act(flood=100 * 2**20)) as provider:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        vlm = CachedClient(client(provider.base_url, tmp_path / "paid", max_retries=0), tmp_path / "vlm")
        with pytest.raises(VlmError, match="sent more than"):
            vlm.complete(ask())
        assert provider.flooded < 50 * 2**20, "it was hung up on"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000, "KiB"
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []
    assert len(caplog.text) < 20_000


def test_a_reply_that_drips_ends_with_the_time_of_the_attempt() -> None:
    with providing(Act(drip=0.05), Act(drip=0.05)) as provider:
        began = time.monotonic()
        with pytest.raises(VlmUnavailableError, match=r"not answer within 0\.5 s; raise vlm\.timeout_s"):
            client(provider.base_url, timeout_s=0.5, max_retries=1).complete(ask())
        assert time.monotonic() - began < 5, "each byte came within the time, the whole would take 15 s"
        assert len(provider.sent) == 2


# ------------------------------------------------------------------------------------------ elsewhere


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_key_nor_question_follows_a_redirect(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    with providing() as other, providing() as provider:
        to = f"{other.base_url.replace('127.0.0.1', 'localhost')}/chat/completions?{KEY}"
        provider.plan = [Act(status, {"Location": to}, body={})]
        with pytest.raises(
            VlmUnavailableError, match=r"sends on to http://localhost.*set vlm\.base_url"
        ) as stop:
            client(provider.base_url, api_key_env="SOME_KEY").complete(ask())
        assert (len(provider.sent), other.sent, other.seen, other.keys) == (1, [], [], set())
        assert KEY not in str(stop.value)
        provider.listing = Act(status, {"Location": f"{other.base_url}/models"}, body={})
        with pytest.raises(VlmUnavailableError, match="sends on to"):
            client(provider.base_url, api_key_env="SOME_KEY").check()
        assert other.seen == []


# ------------------------------------------------------------------------------------------ what is said

HTML = Act(headers={"Content-Type": "text/html"}, body="<!doctype html><title>Sign in</title>" * 1000)
GOOD = completion_of("fine")


def with_choices(*choices: object) -> Act:
    return Act(body={**GOOD, "choices": list(choices)})


def with_content(content: object) -> Act:
    return with_choices({"index": 0, "message": {"role": "assistant", "content": content}})


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (HTML, "no chat completion"),
        (Act(headers={"Content-Type": "text/html"}, body=""), "no chat completion"),
        (Act(body="null"), "no chat completion"),
        (Act(body=[]), "no chat completion"),
        (Act(body="[" * 200_000), "no chat completion"),
        (Act(body=b'{"choices": "\xff\xfe"}'), "no chat completion"),
        (Act(body='{"choices": ' + "9" * 5000 + "}"), "no chat completion"),
        (Act(body={"error": {"message": "no credit", "code": 402}}), "an error in place of an answer: no credit"),
        (Act(body={"error": "overloaded"}), "an error in place of an answer: overloaded"),
        (Act(body={"error": 7}), r"no chat completion \(choices: Field required"),
        (with_choices(), "no chat completion"),
        (with_choices({"message": None}), r"no chat completion \(choices\.0\.message"),
        (with_choices({}), "no chat completion"),
        (with_choices("fine"), "no chat completion"),
        (with_choices(GOOD["choices"][0], GOOD["choices"][0]), r"no chat completion \(choices"),
        (with_content(5), "no chat completion"),
        (with_content([{"type": "text", "text": "fine"}]), "no chat completion"),
        (Act(204, body=""), "no chat completion"),
    ],
)  # fmt: skip
def test_nonsense_is_tried_again_then_named(act: Act, says: str) -> None:
    with providing(act) as provider:
        assert client(provider.base_url).complete(ask()).text == "re: hello"
    with providing(act, act) as provider:
        with pytest.raises(VlmError, match=f"{says}.*check that vlm.base_url ends in /v1") as stop:
            client(provider.base_url, max_retries=1).complete(ask())
        assert len(provider.sent) == 2
        assert len(str(stop.value)) < 500


@pytest.mark.parametrize(
    "usage",
    [None, "many", [], {"prompt_tokens": "x", "completion_tokens": -5}, {"prompt_tokens": 10**30}],
)
def test_absurd_counts_cost_no_answer(usage: object) -> None:
    with providing(Act(body={**GOOD, "usage": usage})) as provider:
        reply = client(provider.base_url, tokens_per_minute=6000).complete(ask())
        assert (reply.text, reply.usage, len(provider.sent)) == ("fine", Usage(calls=1), 1)


def test_half_a_character_costs_no_answer() -> None:
    with providing(Act(body=json.dumps(GOOD).replace('"fine"', '"fine \\ud800"'))) as provider:
        assert client(provider.base_url).complete(ask()).text.strip() == "fine"
        assert len(provider.sent) == 1


def test_a_page_in_place_of_a_server_is_found_before_the_run() -> None:
    with providing(HTML) as provider:
        provider.listing = HTML
        with pytest.raises(VlmError, match=r"no chat completion.*ends in /v1"):
            client(provider.base_url).check()


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (refusal(400, "no such model", "model_not_found"), r"knows no model 'fake-1'.*correct vlm\.model"),
        (refusal(400, "max_tokens: no"), "BadRequestError: .*what was answered is kept: correct what it names in vlm"),
        (refusal(503, "down"), "InternalServerError: .*what was answered is kept: see that the server is well"),
        (refusal(503, retry_after="86400"), "asks to wait 86,400 s"),
        (refusal(429, retry_after="1e400"), "asks to wait inf s"),
        (refusal(502, "\x1b]0;owned\x07\x1b[2J down"), r"\]0;owned \[2J down"),
    ],
)  # fmt: skip
def test_each_error_has_its_remedy(act: Act, says: str) -> None:
    with providing(act) as provider:
        with pytest.raises(VlmError, match=says) as stop:
            client(provider.base_url, max_retries=0).complete(ask())
        assert str(stop.value).isprintable()
        assert provider.base_url in str(stop.value)


@pytest.mark.parametrize(
    "asked",
    ["Fri, 31 Dec 99999999999999999999 23:59:59 GMT", "Mon, 01 Jan 0001 00:00:00 +2359", "-1e99", "nan", "", "9" * 400],
)  # fmt: skip
def test_absurd_waits_are_read_or_left(asked: str) -> None:
    seconds = retry_after({"retry-after": asked}, now=1e9)
    assert seconds is None or seconds >= 0


def test_a_server_that_says_zero_is_not_hammered() -> None:
    busy = refusal(429, retry_after="0")
    with providing(busy, busy, busy) as provider:
        vlm = client(provider.base_url)
        vlm._endpoint._backoff = Backoff(first_s=0.2, draw=lambda: 1.0)
        vlm.complete(ask())
        waits = [after - before for before, after in zip(provider.times, provider.times[1:], strict=False)]
    assert [wait >= least for wait, least in zip(waits, (0.2, 0.4, 0.8), strict=True)] == [True] * 3


# ------------------------------------------------------------------------------------------ whose answer


def test_another_models_answer_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def answering(model: str, count: int) -> list[Act]:
        return [Act(body={**GOOD, "model": model})] * count

    with providing(*answering("cheap-0", 3), *answering("org/fake-1-2024-11-20", 2)) as provider:
        client(provider.base_url, concurrency=1).complete_all(questions(5))
        told = [record.message for record in caplog.records if record.name == "fscil.vlm"]
    assert told == [
        f"the VLM at {provider.base_url} answers as 'cheap-0', and vlm.model is 'fake-1'; its answers are taken"
    ]


class Swapping(FakeVlm):
    """Gives a judgement where a caption was asked for, and a caption where a judgement was, the first time."""

    def text(self, request: Request) -> str:
        last = request.messages[-1].text
        if request.sample == 0 and last in (DESCRIBE, COMPARE):
            return "a seven, in ink" if last == COMPARE else "NO"
        return super().text(request)


def test_answers_of_another_kind_are_seen_and_asked_for_again() -> None:
    one = pair("a", 1, {"o": 2})
    names = {digest_of(value): f"a caption of {value}" for value in (1, 2)}
    result = Coordinator(Swapping(names), SETTINGS).judge_all([one], lambda _p: True)
    (comparison,) = result.verdicts[0].comparisons
    assert (comparison.caption_augmented, comparison.caption_original) == ("a caption of 1", "a caption of 2")
    assert (comparison.answer, result.unparsed) == ("different", 0)


class Stubborn(FakeVlm):
    """Says YES whatever is asked."""

    def text(self, request: Request) -> str:
        return "YES"


def test_a_caption_that_stays_a_judgement_is_none() -> None:
    result = Coordinator(Stubborn({}), SETTINGS).judge_all([pair("a", 1, {"o": 2})], lambda _p: True)
    assert (result.unparsed, result.verdicts[0].level) == (1, "detail")
    assert result.verdicts[0].comparisons[0].caption_augmented == ""


@pytest.mark.parametrize("text", ["YES", "No.", "**NO**", "Answer: yes"])
def test_a_judgement_is_no_prompt(text: str) -> None:
    assert clean_prompt(text, lambda _p: True, "A picture of a seven") == "A picture of a seven"


def digest_of(value: int) -> str:
    from tasks.vlm.client import Picture

    return Picture.of(image(value), SETTINGS.max_side).digest


# ------------------------------------------------------------------------------------------ what is paid


def test_an_answer_that_cannot_be_kept_is_counted_all_the_same(tmp_path: Path) -> None:
    def full(_index: int, _reply: Reply) -> None:
        raise OSError(28, "No space left on device")

    with providing() as provider:
        vlm = priced(provider.base_url, tmp_path / "paid")
        with pytest.raises(OSError, match="No space left"):
            vlm.complete_all(questions(1), full)
        assert priced(provider.base_url, tmp_path / "paid").paid.calls == sum(provider.billed.values()) == 1


def test_a_limit_holds_for_a_provider_that_tells_no_tokens(tmp_path: Path) -> None:
    untold = Act(body={**GOOD, "usage": None})
    with providing(*[untold] * 20) as provider:
        vlm = priced(provider.base_url, tmp_path / "paid", max_cost=2 * COST, concurrency=1)
        with pytest.raises(BudgetError, match=r"vlm\.max_cost"):
            vlm.complete_all(questions(20))
        assert 0 < len(provider.sent) < 20


def test_all_that_was_answered_before_trouble_is_kept_and_never_asked_again(tmp_path: Path) -> None:
    def kept(provider: Provider) -> CachedClient:
        return CachedClient(
            client(provider.base_url, tmp_path / "paid", concurrency=2, max_retries=0), tmp_path / "vlm"
        )

    troubles = [Act(die=True), Act(flood=8 * 2**20), HTML, with_choices(), refusal(503)]
    with providing() as provider:
        for trouble in troubles:
            provider.plan = [Act(), Act(), Act(), trouble]
            with pytest.raises(VlmError):
                kept(provider).complete_all(questions(40))
        replies = kept(provider).complete_all(questions(40))
        assert [reply.text for reply in replies] == [f"re: question {n}" for n in range(40)]
        assert set(provider.billed.values()) == {1}
    assert len((tmp_path / "paid").read_text().splitlines()) == 40
