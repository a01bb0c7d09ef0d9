from pathlib import Path

import pytest
from fake_vlm import SETTINGS, FakeVlm, image, pair
from pydantic import ValidationError

from tasks.vlm.cache import CachedClient
from tasks.vlm.cassette import (
    Cassette,
    MissingAnswerError,
    TranscriptError,
    read_transcript,
    write_transcript,
)
from tasks.vlm.client import (
    ChatClient,
    Message,
    Picture,
    Request,
    VlmSettings,
    request_key,
)
from tasks.vlm.coordinator import Coordinator, JudgeResult
from tasks.vlm.factory import check_vlm, open_client
from tasks.vlm.prompts import DESCRIBE
from tasks.vlm.transport import VlmError, VlmUnavailableError

NAMES = {Picture.of(image(v), 64).digest: name for v, name in [(1, "dog"), (2, "cat"), (3, "cow")]}
PAIRS = [pair("a", 1, {"o1": 2, "o2": 3}), pair("b", 2, {"o1": 2, "o2": 3})]


def ask(text: str = "hello", sample: int = 0) -> Request:
    return Request(messages=(Message(role="user", text=text),), sample=sample)


def judge(client: ChatClient) -> JudgeResult:
    return Coordinator(client, SETTINGS).judge_all(PAIRS, lambda _prompt: True)


# ------------------------------------------------------------------------------------------ keys


def test_the_key_is_pinned() -> None:
    assert request_key(ask(), SETTINGS.sampling) == (
        "845f156752838f432d8bfc0cad75151d121d8792dae73f694e482dd76f58a9b2"
    )


def test_the_key_follows_what_can_change_the_answer_and_nothing_else() -> None:
    key = request_key(ask(), SETTINGS.sampling)
    changed = {
        "model": "other",
        "temperature": 0.5,
        "max_tokens": 51,
        "detail": "high",
    }
    for name, value in changed.items():
        assert request_key(ask(), SETTINGS.model_copy(update={name: value}).sampling) != key
    assert request_key(ask(sample=1), SETTINGS.sampling) != key
    assert request_key(ask("hello!"), SETTINGS.sampling) != key
    elsewhere = {
        "base_url": "http://x/v1",
        "timeout_s": 1.0,
        "max_retries": 9,
        "concurrency": 1,
        "api_key_env": "K",
    }
    assert request_key(ask(), SETTINGS.model_copy(update=elsewhere).sampling) == key


def test_a_picture_is_known_by_its_content() -> None:
    shown = [Picture.of(image(v), 64) for v in (1, 1, 2)]
    keys = [
        request_key(Request(messages=(Message(role="user", text="", pictures=(p,)),)), SETTINGS.sampling)
        for p in shown
    ]
    assert keys[0] == keys[1] != keys[2]
    assert "base64" not in repr(shown[0])


# ------------------------------------------------------------------------------------------ cache


def test_a_second_run_asks_nothing_and_says_the_same(tmp_path: Path) -> None:
    first = judge(CachedClient(FakeVlm(NAMES), tmp_path))
    idle = FakeVlm({})
    assert judge(CachedClient(idle, tmp_path)) == first
    assert idle.asked == []


@pytest.mark.parametrize("fail_at", range(0, 9, 2))
def test_a_kill_loses_no_answer_that_came(tmp_path: Path, fail_at: int) -> None:
    undisturbed = FakeVlm(NAMES)
    expected = judge(undisturbed)
    killed = FakeVlm(NAMES)
    killed.fail_at = fail_at
    with pytest.raises(VlmError, match="killed"):
        judge(CachedClient(killed, tmp_path))
    resumed = FakeVlm(NAMES)
    assert judge(CachedClient(resumed, tmp_path)) == expected
    assert len(killed.asked) + len(resumed.asked) == len(undisturbed.asked)


def test_equal_requests_in_one_call_are_asked_once(tmp_path: Path) -> None:
    vlm = FakeVlm(NAMES)
    picture = Picture.of(image(1), 64)
    request = Request(messages=(Message(role="user", text=DESCRIBE, pictures=(picture,)),))
    seen: list[int] = []
    replies = CachedClient(vlm, tmp_path).complete_all([request] * 3, lambda i, _r: seen.append(i))
    assert [r.text for r in replies] == ["dog"] * 3
    assert (len(vlm.asked), sorted(seen)) == (1, [0, 1, 2])


def test_a_damaged_answer_is_asked_again_and_mended(tmp_path: Path) -> None:
    expected = judge(CachedClient(FakeVlm(NAMES), tmp_path))
    damaged = sorted(tmp_path.rglob("*.json"))[0]
    damaged.write_text('{"key": "tor')
    vlm = FakeVlm(NAMES)
    assert judge(CachedClient(vlm, tmp_path)) == expected
    assert len(vlm.asked) == 1
    idle = FakeVlm({})
    assert judge(CachedClient(idle, tmp_path)) == expected


def test_an_answer_in_which_a_letter_was_changed_is_asked_again(tmp_path: Path) -> None:
    expected = judge(CachedClient(FakeVlm(NAMES), tmp_path))
    for damaged in sorted(tmp_path.rglob("*.json"))[:2]:
        data = damaged.read_bytes()
        at = data.index(b'"text":"', data.index(b'"reply"')) + len(b'"text":"')
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    vlm = FakeVlm(NAMES)
    assert judge(CachedClient(vlm, tmp_path)) == expected
    assert len(vlm.asked) == 2


def test_an_answer_to_another_question_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = judge(CachedClient(FakeVlm(NAMES), tmp_path))
    one, other = sorted(tmp_path.rglob("*.json"))[:2]
    one.write_bytes(other.read_bytes())
    vlm = FakeVlm(NAMES)
    assert judge(CachedClient(vlm, tmp_path)) == expected
    assert len(vlm.asked) == 1
    assert f"{one} is to another question" in caplog.text


# ------------------------------------------------------------------------------------------ transcripts


def test_a_transcript_replays_exactly(tmp_path: Path) -> None:
    original = judge(FakeVlm(NAMES))
    write_transcript(tmp_path / "one.jsonl", original.exchanges)
    other = SETTINGS.model_copy(update={"model": "not asked"})
    replayed = judge(Cassette.from_file(tmp_path / "one.jsonl", other.sampling))
    write_transcript(tmp_path / "two.jsonl", replayed.exchanges)
    assert replayed == original
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_a_missing_answer_is_an_error_that_says_what_was_asked(tmp_path: Path) -> None:
    exchanges = judge(FakeVlm(NAMES)).exchanges
    cassette = Cassette(exchanges[:-1], SETTINGS.sampling, "short.jsonl")
    with pytest.raises(
        MissingAnswerError, match=r"short.jsonl holds no answer to 'You are a prompt engineer"
    ):
        judge(cassette)


def test_an_empty_transcript_answers_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(MissingAnswerError):
        Cassette.from_file(tmp_path / "empty.jsonl", SETTINGS.sampling).complete(ask())


@pytest.mark.parametrize("damage", ["missing", "cut", "edited", "mixed"])
def test_a_damaged_transcript_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.jsonl"
    exchanges = judge(FakeVlm(NAMES)).exchanges
    write_transcript(path, exchanges)
    text = path.read_text()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_text(text[:-20])
    elif damage == "edited":
        path.write_text(text.replace("cow", "hen"))
    else:
        warm = exchanges[0].sampling.model_copy(update={"temperature": 1.0})
        with pytest.raises(TranscriptError, match="mixes"):
            Cassette([exchanges[0], exchanges[1].model_copy(update={"sampling": warm})], warm, "t")
        return
    with pytest.raises(TranscriptError, match=r"t\.jsonl"):
        read_transcript(path)


def test_nothing_stored_holds_an_image(tmp_path: Path) -> None:
    result = judge(CachedClient(FakeVlm(NAMES), tmp_path / "vlm"))
    write_transcript(tmp_path / "transcript.jsonl", result.exchanges)
    stored = [path.read_text() for path in tmp_path.rglob("*.json*")]
    assert len(stored) == 1 + len(result.exchanges)
    assert not any("base64" in text or "data:" in text for text in stored)
    assert any(f'{{"image":"{digest}"}}' in stored[-1] or digest in "".join(stored) for digest in NAMES)


# ------------------------------------------------------------------------------------------ settings


def test_a_cassette_needs_a_transcript_and_others_take_none() -> None:
    values = SETTINGS.model_dump()
    with pytest.raises(ValidationError, match=r"set vlm\.transcript"):
        VlmSettings(**{**values, "kind": "cassette"})
    with pytest.raises(ValidationError, match="set it to null"):
        VlmSettings(**{**values, "transcript": "t.jsonl"})


@pytest.mark.parametrize(
    "base_url", ["localhost:8000/v1", "/v1", "http://", "http://me:secret@host/v1", "ftp://h/v1"]
)
def test_an_address_is_one_and_holds_no_secret(base_url: str) -> None:
    with pytest.raises(ValidationError, match=r"vlm\.base_url must look like"):
        VlmSettings(**{**SETTINGS.model_dump(), "base_url": base_url})


def test_the_identity_leaves_out_where_and_how_fast() -> None:
    assert SETTINGS.identity == {
        "model": "fake-1",
        "temperature": 0.0,
        "max_tokens": 50,
        "detail": "low",
        "max_side": 64,
    }


def test_the_factory_opens_a_cassette(tmp_path: Path) -> None:
    write_transcript(tmp_path / "t.jsonl", judge(FakeVlm(NAMES)).exchanges)
    settings = SETTINGS.model_copy(update={"kind": "cassette", "transcript": tmp_path / "t.jsonl"})
    client = open_client(settings, base_url=None, cache=tmp_path / "vlm")
    assert judge(client) == judge(FakeVlm(NAMES))
    assert not (tmp_path / "vlm").exists()


def test_a_missing_transcript_is_found_before_any_work(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"kind": "cassette", "transcript": tmp_path / "no.jsonl"})
    with pytest.raises(TranscriptError, match=r"no\.jsonl"), check_vlm(settings, serve=None):  # type: ignore[arg-type]
        raise AssertionError("must not be reached")


def test_the_miniature_without_a_server_says_so(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"kind": "miniature"})
    with pytest.raises(VlmUnavailableError, match=r"set vlm\.base_url"):
        open_client(settings, base_url=None, cache=tmp_path)
