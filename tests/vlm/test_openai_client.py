"""The client against a provider that misbehaves, over real HTTP."""

import json
import logging
import traceback
from pathlib import Path

import pytest
from fake_vlm import SETTINGS, image, pair
from provider import Act, completion_of, providing, refusal

from tasks.records import Usage
from tasks.vlm.cache import CachedClient
from tasks.vlm.client import Message, Picture, Request, VlmSettings
from tasks.vlm.coordinator import Coordinator
from tasks.vlm.openai_client import OpenAiClient
from tasks.vlm.pacing import Backoff
from tasks.vlm.prompts import COMPARE, DESCRIBE
from tasks.vlm.transport import BudgetError, VlmError, VlmUnavailableError

KEY = "sk-planted-7f3a9c"
AT_ONCE = Backoff(first_s=0.01, limit_s=0.02)
COST = (1000 * 2.0 + 100 * 10.0) / 1e6  # of one answer of the provider


def client(base_url: str, ledger: Path | None = None, **changes: object) -> OpenAiClient:
    settings = VlmSettings(
        **{**SETTINGS.model_dump(), "max_retries": 3, "timeout_s": 60, **changes, "base_url": base_url}
    )
    return OpenAiClient(settings, ledger=ledger, backoff=AT_ONCE)


def ask(text: str = "hello") -> Request:
    return Request(messages=(Message(role="user", text=text),))


def questions(count: int) -> list[Request]:
    return [ask(f"question {n}") for n in range(count)]


# ------------------------------------------------------------------------------------------ what passes


@pytest.mark.parametrize(
    "act",
    [
        refusal(429, retry_after="0"),
        refusal(500),
        refusal(503),
        refusal(408),
        refusal(418, x_should_retry="true"),
        Act(drop=True),
        Act(cut=True),
        Act(body={"object": "chat.completion", "choices": []}),
        Act(body={"object": "chat.completion", "choices": {"0": "YES"}}),
        Act(body={"object": "chat.completion", "choices": ["YES"]}),
        Act(body="upstream is busy"),
    ],
    ids=[
        "429",
        "500",
        "503",
        "408",
        "told to",
        "dropped",
        "truncated",
        "no choices",
        "a dict",
        "texts",
        "no JSON",
    ],
)
def test_what_may_pass_is_tried_again(act: Act) -> None:
    with providing(act, act) as provider:
        assert client(provider.base_url).complete(ask()).text == "re: hello"
        assert len(provider.sent) == 3
        assert provider.billed["hello"] == 1


def test_a_timeout_is_tried_again() -> None:
    with providing(Act(hang=2.5)) as provider:
        assert client(provider.base_url, timeout_s=1.5).complete(ask()).text == "re: hello"
        assert len(provider.sent) == 2


@pytest.mark.parametrize(
    "act",
    [
        refusal(429, retry_after="0.4"),
        refusal(429, retry_after_ms="400", retry_after="9"),
        Act(429, until=1.5),
    ],
    ids=["seconds", "milliseconds", "date"],
)
def test_the_server_is_waited_for_as_it_asks_and_nothing_else_is_sent_meanwhile(act: Act) -> None:
    with providing(act, Act(hang=0.2)) as provider:
        client(provider.base_url, concurrency=2).complete_all(questions(4))
        first, _second, *later = provider.times
    assert len(later) == 3
    assert min(later) - first >= 0.39


def test_a_server_that_asks_for_too_much_patience_ends_the_run() -> None:
    with providing(refusal(429, retry_after="9000")) as provider:
        with pytest.raises(VlmError, match=r"no more requests for now.*vlm\.requests_per_minute"):
            client(provider.base_url).complete(ask())
        assert len(provider.sent) == 1


@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (refusal(401, "bad key"), VlmUnavailableError, "refuses the key of vlm.api_key_env=null: .*bad key"),
        (refusal(403), VlmUnavailableError, "refuses the key"),
        (refusal(404), VlmUnavailableError, r"knows no model 'fake-1'.*correct vlm\.model"),
        (refusal(400, "too long"), VlmError, "BadRequestError: .*too long"),
        (refusal(429, "no credit", "insufficient_quota"), VlmError, "no credit"),
        (refusal(500, x_should_retry="false"), VlmError, "InternalServerError"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(act: Act, error: type[Exception], says: str) -> None:
    with providing(act) as provider:
        with pytest.raises(error, match=says):
            client(provider.base_url, concurrency=1).complete_all(questions(5))
        assert len(provider.sent) == 1


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (refusal(500), "InternalServerError"),
        (Act(drop=True), "no VLM answers at"),
        (Act(hang=2.0), r"not answer within 1 s; raise vlm\.timeout_s"),
        (Act(cut=True), "check that vlm.base_url ends in /v1"),
        (refusal(429, "slow down"), "slow down.*lower vlm.concurrency"),
    ],
    ids=["500", "dropped", "timeout", "truncated", "429"],
)
def test_patience_ends(act: Act, says: str) -> None:
    with providing(act, act, act) as provider:
        with pytest.raises(VlmError, match=says):
            client(provider.base_url, max_retries=2, timeout_s=1 if act.hang else 60).complete(ask())
        assert len(provider.sent) == 3


def test_answers_under_way_when_one_fails_are_kept() -> None:
    kept: list[int] = []
    with providing(Act(hang=0.2), Act(hang=0.2), refusal(400)) as provider:
        with pytest.raises(VlmError, match="BadRequestError"):
            client(provider.base_url, concurrency=3).complete_all(questions(9), lambda i, _r: kept.append(i))
        assert (len(provider.sent), len(kept)) == (3, 2)


# ------------------------------------------------------------------------------------------ strange answers


@pytest.mark.parametrize(
    "text",
    ["", "I'm sorry, I can't assist with that.", "Non, elles sont différentes.", "否", "\x00\n", "YES NO"],
)
def test_strange_answers_are_unparsed_and_counted(text: str) -> None:
    def answer(question: str) -> str:
        return text if question == COMPARE else f"a caption of {question[:3]}"

    with providing(answer=answer) as provider:
        vlm = client(provider.base_url)
        result = Coordinator(vlm, SETTINGS).judge_all([pair("a", 1, {"o": 2})], lambda _p: True)
    assert (result.unparsed, result.verdicts[0].level) == (1, "detail")


def test_a_refusal_in_its_own_field_and_a_moderated_request_are_answers() -> None:
    refused = Act(body=completion_of(None, refusal="I cannot help with that."))
    with providing(refused, refusal(400, "moderated", "content_filter")) as provider:
        replies = client(provider.base_url, concurrency=1).complete_all(questions(3))
    assert [reply.text for reply in replies] == ["I cannot help with that.", "", "re: question 2"]
    assert replies[1].usage == Usage(calls=1)


# ------------------------------------------------------------------------------------------ many, and how fast


def test_two_thousand_requests_at_concurrency_32_none_lost_or_doubled(tmp_path: Path) -> None:
    asked = questions(2000)
    troubles = [refusal(429, retry_after="0"), refusal(500), Act(drop=True), Act(cut=True)]
    with providing(*troubles * 5, *[Act(hang=0.3)] * 64) as provider:
        vlm = CachedClient(
            client(provider.base_url, tmp_path / "paid", concurrency=32, max_retries=9), tmp_path
        )
        replies = vlm.complete_all(asked)
        assert [reply.text for reply in replies] == [f"re: question {n}" for n in range(2000)]
        assert set(provider.billed.values()) == {1}
        assert len(provider.billed) == 2000
        assert len(provider.sent) == 2020
        assert 1 < provider.most_under_way <= 32
        assert vlm.complete_all(asked) == replies  # from the cache
        assert len(provider.sent) == 2020
    assert len((tmp_path / "paid").read_text().splitlines()) == 2000


def test_requests_per_minute_are_kept() -> None:
    with providing() as provider:
        client(provider.base_url, requests_per_minute=600).complete_all(questions(6))
        assert provider.times[-1] - provider.times[0] >= 0.4


def test_tokens_per_minute_are_kept_by_what_the_server_counted() -> None:
    with providing() as provider:  # 1,100 tokens an answer, 10,000 a second: three waits of 0.11 s
        client(provider.base_url, tokens_per_minute=600_000, concurrency=1).complete_all(questions(4))
        assert provider.times[-1] - provider.times[0] >= 0.28


# ------------------------------------------------------------------------------------------ cost


def priced(base_url: str, ledger: Path, **changes: object) -> OpenAiClient:
    return client(base_url, ledger, **{"price_in": 2.0, "price_out": 10.0, "max_tokens": 100, **changes})


def test_each_answer_knows_what_it_cost_and_unknown_prices_leave_no_trace(tmp_path: Path) -> None:
    with providing() as provider:
        reply = priced(provider.base_url, tmp_path / "paid").complete(ask())
        plain = client(provider.base_url).complete(ask())
    assert reply.usage == Usage(calls=1, prompt_tokens=1000, completion_tokens=100, cost=COST)
    assert "cost" not in plain.usage.model_dump_json()
    assert Usage.total([reply.usage, plain.usage, reply.usage]).cost == pytest.approx(2 * COST)


def test_the_budget_stops_the_run_which_a_higher_one_resumes_without_paying_twice(tmp_path: Path) -> None:
    asked, ledger = questions(30), tmp_path / "paid.jsonl"
    with providing() as provider:
        small = priced(provider.base_url, ledger, max_cost=10.5 * COST)
        with pytest.raises(
            BudgetError, match=r"max_cost=0\.0315 leaves no room.*raise vlm\.max_cost and"
        ) as stop:
            CachedClient(small, tmp_path / "vlm").complete_all(asked)
        answered = sum(provider.billed.values())
        assert f"on {answered} answers, which are kept" in str(stop.value)
        assert 6 <= answered <= 10
        assert small.paid.cost == pytest.approx(answered * COST)
        with pytest.raises(
            BudgetError, match=f"{small.paid.cost:.4g} on {answered} answers"
        ):  # counts the old ones too
            CachedClient(small, tmp_path / "vlm").complete_all(asked)
        large = priced(provider.base_url, ledger, max_cost=50 * COST)
        CachedClient(large, tmp_path / "vlm").complete_all(asked)
        assert set(provider.billed.values()) == {1}
        assert large.paid.calls == len(provider.billed) == 30


def test_a_damaged_ledger_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "paid").write_text(Usage(calls=1, cost=0.5).model_dump_json() + '\n{"calls": 1, "co')
    assert priced("http://127.0.0.1:9/v1", tmp_path / "paid").paid == Usage(calls=1, cost=0.5)


@pytest.mark.parametrize("cut", [b'{"calls": 1, "co', b"\xff\xfe\n"])
def test_what_is_paid_after_a_damaged_line_counts(tmp_path: Path, cut: bytes) -> None:
    (tmp_path / "paid").write_bytes(Usage(calls=1, cost=0.5).model_dump_json().encode() + b"\n" + cut)
    with providing() as provider:
        priced(provider.base_url, tmp_path / "paid").complete(questions(1)[0])
    assert priced("http://127.0.0.1:9/v1", tmp_path / "paid").paid.calls == 2


@pytest.mark.parametrize("known", [{}, {"price_in": 1.0}, {"price_out": 1.0}])
def test_a_limit_without_prices_is_refused(known: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"vlm\.max_cost=5 needs prices"):
        VlmSettings(**{**SETTINGS.model_dump(), "max_cost": 5.0, **known})


# ------------------------------------------------------------------------------------------ what is sent


def test_pictures_are_sent_small_and_with_the_chosen_detail() -> None:
    big = image(7).repeat(1, 40, 30)  # 160 x 120
    with providing() as provider:
        shown = Message(role="user", text=DESCRIBE, pictures=(Picture.of(big, 64),))
        client(provider.base_url, api_key_env=None).complete(Request(messages=(shown,)))
        part = provider.sent[0]["messages"][0]["content"][1]["image_url"]
        assert provider.keys == {"none"}
    assert part["detail"] == "low"
    assert Picture.of(big, 64).url == part["url"] != Picture.of(big, 512).url


# ------------------------------------------------------------------------------------------ the key


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
def test_a_key_that_the_server_echoes_is_nowhere_to_be_found(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    act = refusal(status, f"Incorrect API key: {KEY}", x_your_key=KEY)
    if status == 200:
        act = Act(headers={"x-your-key": KEY}, body={**completion_of(f"Your key is {KEY}."), "model": KEY})
    with providing(act, act) as provider:
        vlm = client(provider.base_url, tmp_path / "paid", api_key_env="SOME_KEY", max_retries=1)
        try:
            said = CachedClient(vlm, tmp_path / "vlm").complete(ask()).text
        except VlmError as error:
            said = f"{error!r} {error}"
        assert provider.keys == {KEY}
    assert "***" in said
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert bool(written) == (status == 200)
    assert KEY not in said + written + caplog.text + repr(vlm) + repr(vars(vlm))
    assert json.dumps(vlm._settings.model_dump(mode="json")).count("SOME_KEY") == 1


def test_headers_of_the_environment_are_sent_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}\nx-gateway: {KEY}")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
    with providing() as provider:
        client(provider.base_url, tmp_path / "paid", api_key_env=None).complete(ask())
        assert provider.keys == {"none"}
        (sent,) = provider.headers
    assert not {"x-gateway", "openai-organization", "openai-project"} & set(sent)


def test_a_key_in_the_place_of_its_variable_is_refused_and_not_repeated() -> None:
    from flows.config import ConfigError, load_config

    with pytest.raises(ConfigError, match="is the NAME of an environment variable") as refused:
        load_config(["vlm=openai", f"vlm.api_key_env={KEY}"])
    assert KEY not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("content", [[{"type": "text", "text": "YES"}], 7, {"a": "b"}])
def test_a_reply_whose_text_is_none_is_asked_for_again_and_then_said(content: object) -> None:
    strange = Act(body=completion_of(content))  # type: ignore[arg-type]
    with providing(strange) as provider:
        assert client(provider.base_url).complete_all(questions(1))[0].text == "re: question 0"
    with providing(*[strange] * 4) as provider, pytest.raises(VlmError, match="no chat completion"):
        client(provider.base_url).complete_all(questions(1))


@pytest.mark.parametrize("tokens", ["many", -5, 1.5, {"a": 1}, None, [1]])
def test_tokens_that_are_no_count_do_not_end_the_run(tokens: object) -> None:
    body = completion_of("YES")
    body["usage"]["prompt_tokens"] = tokens
    with providing(Act(body=body)) as provider:
        assert client(provider.base_url).complete_all(questions(1))[0].text in ("YES", "re: question 0")
