import asyncio
import base64
import errno
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from torch import Tensor

from tasks.images import png_bytes
from tasks.miniature import vlm_server
from tasks.miniature.captions import CATEGORIES, Attributes
from tasks.miniature.vlm_server import (
    BATCH,
    POLITE,
    VlmServer,
    describe,
    parse_description,
    rewrite,
    serve,
    similar,
)
from tasks.vlm import prompts
from tasks.vlm.client import Message, Picture, Request, VlmSettings
from tasks.vlm.coordinator import Coordinator, PairToJudge
from tasks.vlm.factory import check_vlm, open_client
from tasks.vlm.openai_client import OpenAiClient
from tasks.vlm.transport import VlmError, VlmUnavailableError

KEY = "sk-planted-0123456789"


@dataclass(frozen=True)
class Read:
    category: str = "seven"
    form: str = "digit"
    style: str = "handwritten"
    weight: str = "regular"
    pose: str = "upright"
    colour: str = "white"
    background: str = "black"

    @property
    def attributes(self) -> Attributes:
        return Attributes(**{field.name: getattr(self, field.name) for field in fields(self)})


LOOK = "a handwritten digit, white on a black background"
PRINTED = Read(form="word", style="printed", colour="black", background="white")


class ByBrightness:
    """Reads a dark image as a handwritten digit, a bright one as a printed word; notes what it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.broken = False

    def read(self, images: Tensor) -> list[Read]:
        if self.broken:
            raise RuntimeError("out of order")
        assert images.shape[1:] == (3, 32, 32)
        assert images.min() >= 0
        assert images.max() <= 1
        self.batches.append(len(images))
        return [PRINTED if image.mean() > 0.5 else Read() for image in images]


@pytest.fixture
def reader() -> ByBrightness:
    return ByBrightness()


@pytest.fixture
def server(reader: ByBrightness) -> Iterator[VlmServer]:
    with serve(reader, model="miniature@0123") as running:
        yield running


def settings(**changes: object) -> VlmSettings:
    values = {
        "kind": "miniature",
        "model": "miniature",
        "base_url": None,
        "api_key_env": None,
        "temperature": 0.0,
        "max_tokens": 300,
        "token_limit_field": "max_tokens",
        "timeout_s": 60.0,
        "max_retries": 0,
        "concurrency": 16,
        "detail": "low",
        "max_side": 64,
        "transcript": None,
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "price_in": None,
        "price_out": None,
        "max_cost": None,
        "revision": None,
        "dtype": None,
        "batch": None,
    }
    return VlmSettings(**{**values, **changes})


def plain(value: float, side: int = 32) -> Tensor:
    return torch.full((3, side, side), value)


def post(server: VlmServer, body: object, path: str = "/v1/chat/completions") -> tuple[int, dict]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def showing(url: object) -> dict:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": "miniature", "messages": [{"role": "user", "content": [part]}]}


# ------------------------------------------------------------------------------------------ the rules


def test_a_description_is_read_back_as_it_was_written() -> None:
    for read in (
        Read(),
        PRINTED,
        Read(category="letter Q", form="letter", pose="tilted left", weight="thin"),
    ):
        text = describe(read)
        assert parse_description(text) == read.attributes
        assert f"**Style:** {read.style}" in text


def test_what_the_captioner_left_out_stays_out() -> None:
    text = describe(Read(category="unknown", style="unknown"))
    assert parse_description(text) == Read().attributes.but(category=None, style=None)


def test_a_description_in_free_words_is_understood_too() -> None:
    seen = parse_description("A picture of a seven, a handwritten digit, white on a black background")
    assert seen == Read().attributes.but(weight=None, pose=None)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("category", "one", False),
        ("form", "word", False),
        ("style", "serif", False),
        ("colour", "red", False),
        ("background", "white", False),
        ("weight", "bold", True),
        ("pose", "tilted left", True),
        ("style", None, True),
    ],
)
def test_only_semantic_attributes_make_images_different(name: str, value: str | None, expected: bool) -> None:
    assert similar(Read().attributes, Read().attributes.but(**{name: value})) is expected


@pytest.mark.parametrize(
    ("prompt", "second", "expected"),
    [
        (
            "A picture of a seven",
            Read(),
            f"A picture of a seven, {LOOK}",
        ),
        (  # the subject is the prompt's, whatever the second image was taken for; so are the details
            "A picture of a seven, a printed word, bold weight, upright, red on a white background",
            Read(category="one", weight="thin", pose="tilted right"),
            "A picture of a seven, a handwritten digit, bold weight, upright, white on a black background",
        ),
        (  # a detail that the prompt leaves open stays open
            "A picture of a seven, a printed word, red on a white background",
            Read(category="one", weight="thin", pose="tilted right"),
            f"A picture of a seven, {LOOK}",
        ),
        (  # a number cannot be a letter
            "A picture of a two",
            Read(category="letter Z", form="letter"),
            f"A picture of a two, {LOOK}",
        ),
        (  # nor is there a Roman zero
            "A picture of a zero",
            Read(form="roman numeral", style="printed"),
            "A picture of a zero, a printed digit, white on a black background",
        ),
        (
            "a letter B",
            Read(category="eight"),
            "A picture of a letter B, " + LOOK.replace("digit", "letter"),
        ),
        (
            "A papillion, on grass",
            Read(),
            f"A papillion, {LOOK}",
        ),
    ],
)
def test_rewriting_keeps_the_subject_and_its_details_and_takes_the_look(
    prompt: str, second: Read, expected: str
) -> None:
    assert rewrite(prompt, second.attributes) == expected


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_subject_of_the_corpus_survives_rewriting(category: str) -> None:
    once = rewrite(f"A picture of a {category}", PRINTED.attributes)
    assert once.startswith(f"A picture of a {category}, ")
    assert rewrite(once, PRINTED.attributes) == once


# ------------------------------------------------------------------------------------ through the client


def test_figure_3_through_the_official_client(server: VlmServer, tmp_path: Path) -> None:
    client = open_client(settings(), base_url=server.base_url, cache=tmp_path)
    pairs = [
        PairToJudge(
            "bright", plain(0.9), "A picture of a seven", 7, [("o1", plain(0.1)), ("o2", plain(0.8))]
        ),
        PairToJudge("dark", plain(0.2), "A picture of a one", 1, [("o1", plain(0.1))]),
    ]
    result = Coordinator(client, settings()).judge_all(pairs, lambda _prompt: True)
    bright, dark = result.verdicts
    assert [c.answer for c in bright.comparisons] == ["different", "similar"]
    assert bright.prompt_next == rewrite("A picture of a seven", Read().attributes)
    assert (bright.level, dark.level, dark.prompt_next) == ("semantic", "detail", "A picture of a one")
    assert result.unparsed == 0
    assert result.usage.calls == len(result.exchanges) == 4 + 3 + 1
    assert result.usage.prompt_tokens > 4 * 64
    assert {exchange.reply.model for exchange in result.exchanges} == {"miniature@0123"}


def test_answers_of_other_weights_are_not_taken_from_the_cache(tmp_path: Path, reader: ByBrightness) -> None:
    asked = Request(messages=prompts.describe(Picture.of(plain(0.1), 64)))
    for model, batches in (("miniature@1", 1), ("miniature@2", 2), ("miniature@2", 2)):
        with serve(reader, model=model) as server:
            open_client(settings(), base_url=server.base_url, cache=tmp_path).complete(asked)
        assert len(reader.batches) == batches


def test_images_are_read_together_in_one_shape(server: VlmServer, reader: ByBrightness) -> None:
    asked = [Request(messages=prompts.describe(Picture.of(plain(v / 50), 64))) for v in range(40)]
    replies = OpenAiClient(settings(), server.base_url).complete_all(asked)
    assert ["digit" in r.text for r in replies] == [v < 25 for v in range(40)]
    assert set(reader.batches) == {BATCH}
    assert len(reader.batches) < 40


def test_large_and_small_pictures_are_brought_to_size(server: VlmServer) -> None:
    client = OpenAiClient(settings(max_side=512), server.base_url)
    for side in (8, 300):
        text = client.complete(Request(messages=prompts.describe(Picture.of(plain(0.1, side), 512)))).text
        assert "**Form:** digit" in text


def test_images_sent_again_with_the_question_are_compared_too(server: VlmServer) -> None:
    shown = tuple(Picture.of(plain(v), 64) for v in (0.1, 0.9))
    asked = Request(messages=(Message(role="user", text=prompts.COMPARE, pictures=shown),))
    assert OpenAiClient(settings(), server.base_url).complete(asked).text == "NO"


def test_other_questions_get_a_polite_answer(server: VlmServer) -> None:
    client = OpenAiClient(settings(), server.base_url)
    assert client.complete(Request(messages=(Message(role="user", text="How are you?"),))).text == POLITE
    alone = client.complete(Request(messages=(Message(role="user", text=prompts.COMPARE),))).text
    assert prompts.parse_answer(alone) == "unparsed"


def test_it_can_be_asked_from_inside_a_running_event_loop(server: VlmServer) -> None:
    asked = Request(messages=(Message(role="user", text="How are you?"),))

    async def inside() -> str:
        return OpenAiClient(settings(), server.base_url).complete(asked).text

    assert asyncio.run(inside()) == POLITE


def test_the_run_starts_and_stops_its_own_server(reader: ByBrightness) -> None:
    running = []

    class Served:
        def __enter__(self) -> str:
            self.inner = serve(reader)
            running.append(self.inner.__enter__())
            return running[0].base_url

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)

    with check_vlm(settings(), Served) as base_url:
        assert base_url == running[0].base_url
        assert OpenAiClient(settings(), base_url).served_models() == ["miniature"]
    with pytest.raises(VlmUnavailableError, match="no VLM answers at"):
        OpenAiClient(settings(), base_url).served_models()
    assert not [t for t in threading.enumerate() if t.name in ("miniature-vlm", "miniature-reader")]


# ------------------------------------------------------------------------------------------ refusals


def test_a_refused_connection_is_one_sentence_with_the_remedy() -> None:
    base_url = "http://127.0.0.1:9/v1"
    with (
        pytest.raises(
            VlmUnavailableError, match=r"no VLM answers at http://127\.0\.0\.1:9/v1.*vlm\.base_url"
        ),
        check_vlm(settings(kind="openai", base_url=base_url), serve=None),  # type: ignore[arg-type]
    ):
        raise AssertionError("must not be reached")


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch, server: VlmServer) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    client = OpenAiClient(settings(api_key_env="SOME_KEY"), server.base_url)
    with pytest.raises(VlmUnavailableError, match="SOME_KEY holds no key"):
        client.check()


def test_an_unknown_model_is_found_by_the_check(server: VlmServer) -> None:
    client = OpenAiClient(settings(model="gpt-none"), server.base_url)
    with pytest.raises(VlmUnavailableError, match=r"no model 'gpt-none'.*correct vlm\.model"):
        client.check()
    with pytest.raises(VlmUnavailableError, match=r"serves miniature@0123, not gpt-none"):
        open_client(settings(model="gpt-none"), base_url=server.base_url, cache=Path("unused"))


def test_a_failing_reader_is_an_error_and_the_server_lives_on(
    server: VlmServer, reader: ByBrightness
) -> None:
    client = OpenAiClient(settings(), server.base_url)
    asked = Request(messages=prompts.describe(Picture.of(plain(0.1), 64)))
    reader.broken = True
    with pytest.raises(VlmError, match="InternalServerError"):
        client.complete(asked)
    reader.broken = False
    assert "digit" in client.complete(asked).text


def test_who_asks_and_goes_leaves_no_traceback(
    server: VlmServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run does that is interrupted while the answers are written."""
    tried = threading.Event()

    class Gone:
        def write(self, data: bytes) -> None:
            tried.set()
            raise BrokenPipeError(errno.EPIPE, "broken pipe")

        def flush(self) -> None:
            return

        def close(self) -> None:
            return

        closed = False

    started = vlm_server._Handler.setup

    def without_a_way_back(handler: vlm_server._Handler) -> None:
        started(handler)
        handler.wfile = Gone()  # type: ignore[assignment]

    monkeypatch.setattr(vlm_server._Handler, "setup", without_a_way_back)
    asked = Request(messages=prompts.describe(Picture.of(plain(0.1), 64)))
    with pytest.raises(VlmError):
        OpenAiClient(settings(), server.base_url).complete(asked)
    assert tried.is_set()
    assert caplog.records == []


def test_the_key_is_nowhere_to_be_found(
    monkeypatch: pytest.MonkeyPatch, server: VlmServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level("DEBUG")
    client = open_client(settings(api_key_env="SOME_KEY"), base_url=server.base_url, cache=tmp_path)
    client.complete(Request(messages=prompts.describe(Picture.of(plain(0.1), 64))))
    echoing = OpenAiClient(settings(api_key_env="SOME_KEY", model=f"my {KEY} model"), server.base_url)
    with pytest.raises(VlmError) as caught:
        echoing.complete(Request(messages=(Message(role="user", text="x"),)))
    said = str(caught.value).replace(
        repr(echoing.sampling.model), ""
    )  # the model's name was the user's own choice
    stored = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(stored) == 1
    for text in (*stored, said, repr(client), repr(vars(client)), caplog.text):
        assert KEY not in text


PNG = base64.b64encode(png_bytes(plain(0.2))).decode()


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        (b"{not json", 400, None, "not JSON"),
        (b"\xff\xfe", 400, None, "not JSON"),
        ([], 400, None, "JSON object"),
        ({"model": "gpt-4o", "messages": []}, 404, "model_not_found", "does not exist"),
        ({"messages": []}, 404, "model_not_found", "None"),
        ({"model": "miniature"}, 400, None, "messages must be"),
        ({"model": "miniature", "messages": []}, 400, None, "messages must be"),
        ({"model": "miniature", "messages": "hello"}, 400, None, "messages must be"),
        ({"model": "miniature", "messages": ["hello"]}, 400, None, "role and content"),
        ({"model": "miniature", "messages": [{"role": "user", "content": 3}]}, 400, None, "list of parts"),
        ({"model": "miniature", "messages": [{"role": "system", "content": "x"}]}, 400, None, "no user turn"),
        ({"model": "miniature", "messages": [{}], "stream": True}, 400, None, "streaming"),
        (showing("http://127.0.0.1/cat.png"), 400, "invalid_image", "nothing is fetched"),
        (showing("data:image/png;base64,@@@"), 400, "invalid_image", "cannot be decoded"),
        (showing("data:image/png;base64,aGVsbG8="), 400, "invalid_image", "cannot be decoded"),
        (showing(f"data:image/png;base64,{PNG[:400]}"), 400, "invalid_image", "cannot be decoded"),
        (showing(None), 400, "invalid_image", "expected a data"),
    ],
)
def test_a_bad_request_is_answered_with_an_error_object(
    server: VlmServer, body: object, status: int, code: str | None, says: str
) -> None:
    got, answer = post(server, body)
    assert (got, answer["error"]["code"]) == (status, code)
    assert says in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
    assert post(server, showing(f"data:image/png;base64,{PNG}"))[0] == 200


def test_paths(server: VlmServer) -> None:
    assert post(server, {}, "/v1/completions")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server.base_url).port, timeout=60)
    for path, status in (("/health", 200), ("/v1/models", 200), ("/v1/model", 404), ("/", 404)):
        connection.request("GET", path)  # one connection for all: it is kept alive
        response = connection.getresponse()
        body = json.loads(response.read())
        assert response.status == status
        assert ("error" in body) == (status == 404)
    connection.request("POST", "/v1/chat/completions", headers={"Content-Length": str(2**40)})
    assert connection.getresponse().status == 413
    connection.close()


def test_a_taken_port_is_an_error(server: VlmServer, reader: ByBrightness) -> None:
    with pytest.raises(OSError, match="in use"):
        serve(reader, server.server_address[1]).__enter__()
