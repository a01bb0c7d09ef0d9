"""What a provider may say to do harm, over real HTTP: no reply stops a run, hides in a file or reaches a terminal."""

import logging
import time
from pathlib import Path

import pytest
from fake_vlm import SETTINGS, pair
from provider import Act, completion_of, providing, refusal

from tasks.store import read_lines
from tasks.vlm.cache import CachedClient
from tasks.vlm.cassette import write_transcript
from tasks.vlm.client import Exchange, Message, Request, VlmSettings
from tasks.vlm.coordinator import Coordinator
from tasks.vlm.kept import unmarked
from tasks.vlm.openai_client import CHARS_PER_TOKEN, OpenAiClient
from tasks.vlm.prompts import clean_prompt, parse_answer
from tasks.vlm.transport import VlmError, VlmUnavailableError
from tasks.vlm.zero_shot import parse_class

HOSTILE = {
    "NUL": "a \0 b",
    "terminal": "\x1b[2J\x1b]0;owned\x07\x9b31mred",
    "direction": "a\u202egnp.exe\u2066",
    "line ends": "a\u2028b\x85c\x0bd",
    "markup": "<script>alert(1)</script> ]]> | [red] $\\frac{$ {prompt} %s",
    "lines": "a digit\n" * 1000,
    "long": "x" * 10**6,
}
ASKED = pair("a", 1, {"b": 2})


def client(base_url: str, **changes: object) -> OpenAiClient:
    return OpenAiClient(VlmSettings(**{**SETTINGS.model_dump(), **changes, "base_url": base_url}))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_is_kept_as_text_and_paid_once(text: str, tmp_path: Path) -> None:
    hello = Request(messages=(Message(role="user", text="hello"),))
    with providing(answer=lambda _: text) as provider:
        for _ in range(2):
            reply = CachedClient(client(provider.base_url), tmp_path).complete(hello)
        assert sum(provider.billed.values()) == 1
    assert len(reply.text) <= CHARS_PER_TOKEN * 1000
    assert not any(mark in reply.text for mark in "\0\x1b\x07\x85\x9b\u2028\u202e\u2066")
    (kept,) = (Exchange.model_validate_json(unmarked(file.read_bytes())) for file in tmp_path.rglob("*.json"))
    assert kept.reply == reply


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_an_epoch_of_hostile_answers_ends_in_a_transcript_that_reads_back(text: str, tmp_path: Path) -> None:
    with providing(answer=lambda _: text) as provider:
        judged = Coordinator(client(provider.base_url), SETTINGS).judge_all([ASKED], lambda _: True)
    assert [verdict.prompt_next for verdict in judged.verdicts] == [ASKED.prompt]
    assert judged.unparsed == sum(len(verdict.comparisons) for verdict in judged.verdicts)
    write_transcript(tmp_path / "transcript.jsonl", judged.exchanges)
    assert read_lines(tmp_path / "transcript.jsonl", Exchange) == judged.exchanges


def test_the_name_that_a_model_gives_itself_is_bounded() -> None:
    body = {**completion_of("hello"), "model": "m\x1b" * 10**5}
    with providing(Act(body=body)) as provider:
        reply = client(provider.base_url).complete(Request(messages=(Message(role="user", text="hello"),)))
    assert len(reply.model) <= 200
    assert "\x1b" not in reply.model


@pytest.mark.parametrize("status", [400, 401, 404, 429])
def test_what_a_refusal_says_reaches_no_terminal_as_a_command(status: int) -> None:
    act = refusal(status, HOSTILE["terminal"] + HOSTILE["direction"] + HOSTILE["lines"])
    with providing(act) as provider, pytest.raises(VlmError) as told:
        client(provider.base_url, max_retries=0).check()
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 700


@pytest.mark.parametrize(
    "key", ["sk-planted-7f\n3a9c", "sk-planted 7f3a9c", "sk-plänted-7f3a9c", "sk-planted\r7f3a9c"]
)
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_KEY", key)
    with (
        providing() as provider,
        pytest.raises(VlmUnavailableError, match="SOME_KEY holds a line break") as told,
    ):
        client(provider.base_url, api_key_env="SOME_KEY").check()
    said = str(told.value) + repr(told.value.__cause__) + repr(told.value.__context__) + caplog.text
    assert "sk-pl" not in said
    assert "3a9c" not in said


SLOW = (
    ':"',
    '\n"a',
    "<think>",
    "```a\n",
    "*_# ",
    " ",
    "\n",
    "the prompt ",
    "YES ",
    "I ",
    " \n",
    "could ",
    "</a",
    "answer: ",
)


@pytest.mark.parametrize("part", SLOW)
def test_reading_a_reply_takes_no_time_worth_an_attack(part: str) -> None:
    text, started = (part * 6_000)[:6_000], time.process_time()
    clean_prompt(text, lambda line: len(line) < 300, "the one before")
    parse_answer(text)
    parse_class(text, ["zero", "one"])
    assert time.process_time() - started < 5
