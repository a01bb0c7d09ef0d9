"""The miniature's VLM: an OpenAI-compatible server on this machine for Figure 3's requests and the zero-shot one.

What is **learned** is reading: a captioner trained on the miniature's corpus says of each image its category,
form, style, weight, pose, colour and background. What is **rule** is everything else:

- *describe*: the reading is written out as text, one line an attribute;
- *YES or NO*: the two descriptions in the dialogue are read back and compared. YES only if category, form,
  style, colour and background agree; weight and pose are details, which make no two images semantically
  different. What a description leaves out agrees with anything;
- *rewrite*: the subject stays the one that the quoted prompt names, and so do weight and pose, if it names any;
  form, style, colour and background are taken from the second description and phrased as the corpus's captions
  are. A prompt that also copied one image's weight and pose would have every image drawn alike. A form that the
  subject cannot have (a number read as a letter, a zero as a Roman numeral) becomes the plain one. A subject
  that the corpus does not know keeps the prompt's own words, up to the first comma;
- *which one of these classes*: of the names listed, one a line after a dash, the one that equals the category
  read; if none does, that it is none of them;
- anything else gets a polite answer.

The server holds no dialogue: like any chat endpoint it is sent the whole of it each time. Images come as
data URLs; nothing is ever fetched. By hand: ``python -m tasks.miniature.vlm_server --port 8001``.
"""

import argparse
import base64
import binascii
import io
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tasks.images import MAX_PIXELS, READ_FORMATS, upright
from tasks.miniature.captions import (
    ATTRIBUTES,
    CATEGORIES,
    NUMBERS,
    Attributes,
    caption,
    clauses,
    parse_caption,
)

if TYPE_CHECKING:
    from tasks.miniature.reader import Reading

log = logging.getLogger("fscil.miniature")

MODEL = "miniature"
SIDE = 32
BATCH = 16
"""Images are always read this many at a time, padded, so that a reading does not depend on its company."""
GATHER_SECONDS = 0.004
MAX_BODY = 32 * 2**20
IMAGE_TOKENS = 64
RULES = 2
"""Version of the rules, part of the model's name: answers by other rules are never taken from a cache."""
SEMANTIC = ("category", "form", "style", "colour", "background")
"""Attributes whose disagreement makes two images different; the others are details."""


class Reader(Protocol):
    """The captioner."""

    def read(self, images: Tensor) -> "Sequence[Reading]":
        """Read images [n, 3, 32, 32] with values in [0, 1]."""


class ApiError(Exception):
    """A request that cannot be answered, in the terms of OpenAI's error object."""

    def __init__(
        self, status: HTTPStatus, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        """Args: status: of the response; message, code, param: fields of the error object."""
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}
        }


# ---------------------------------------------------------------------------------------- the rules

_LINE = re.compile(r"^\*\*(\w+):\*\*[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_PROMPT = re.compile(r'prompt of the first image is "(.*)"\. Please modify', re.DOTALL)
_OFFERED = re.compile(r"^- (.+?)[ \t]*$", re.MULTILINE)
POLITE = (
    "I am a small captioner of letters and numbers. I can describe an image, tell whether two described "
    "images are semantically similar, and rewrite the prompt of the first one."
)


def describe(reading: "Reading") -> str:
    """The description of an image: a sentence, then one line an attribute."""
    lines = [f"**{name.capitalize()}:** {getattr(reading, name)}" for name in ATTRIBUTES]
    subject = f"a {reading.category}" if reading.category in CATEGORIES else "something"
    return "\n".join([f"The image shows {subject}.", "", *lines])


def parse_description(text: str) -> Attributes:
    """What a description says: of :func:`describe`'s lines, or else of any caption in the corpus's words.

    Lines whose value the corpus does not know are skipped.
    """
    found: dict[str, str] = {}
    for name, value in _LINE.findall(text):
        try:
            found |= Attributes(**{name.lower(): value}).given
        except (TypeError, ValueError):
            continue
    return Attributes(**found) if found else parse_caption(text)


def similar(first: Attributes, second: Attributes) -> bool:
    """Whether two images agree in all that is semantic; what a description leaves out agrees."""
    pairs = [(getattr(first, name), getattr(second, name)) for name in SEMANTIC]
    return all(a == b for a, b in pairs if a is not None and b is not None)


def rewrite(prompt: str, second: Attributes) -> str:
    """The prompt that keeps its subject and details and takes the second image's look in what is semantic."""
    own = parse_caption(prompt)
    subject = own.category
    form = _possible_form(subject, second.form)
    seen = second.but(category=subject, form=form, weight=own.weight, pose=own.pose)
    if subject is not None:
        return caption(seen)
    words = prompt.split(",")[0].strip() or "A picture"
    return ", ".join([words, *clauses(seen)])


def choose(category: str, offered: Sequence[str]) -> str:
    """The name among those offered that equals the category read; that it is none of them if none does."""
    named = (name for name in offered if name.casefold() == category.casefold())
    return next(named, "It is none of these classes.")


def _possible_form(subject: str | None, form: str | None) -> str | None:
    if subject is None or form is None:
        return form
    if subject not in NUMBERS:
        return "letter"
    impossible = {"letter", *(("roman numeral", "tally") if subject == "zero" else ())}
    return "digit" if form in impossible else form


# ---------------------------------------------------------------------------------------- reading images


_Waiting = tuple[Tensor, "Future[Reading]"]


class BatchReader:
    """Reads images that arrive from many threads, together and in one fixed batch shape."""

    def __init__(self, reader: Reader) -> None:
        """Args: reader: the captioner; only one thread uses it."""
        self._reader = reader
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="miniature-reader", daemon=True)
        self._thread.start()

    def read(self, image: Tensor) -> "Reading":
        """Read one image [3, 32, 32] in [0, 1]; waits for its batch."""
        future: Future[Reading] = Future()
        self._waiting.put((image, future))
        return future.result()

    def close(self) -> None:
        """Finish what is waiting and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        open_ = True
        while open_:
            batch, open_ = self._gather()
            if batch:
                self._answer(batch)

    def _gather(self) -> tuple[list[_Waiting], bool]:
        item = self._waiting.get()
        batch: list[_Waiting] = []
        while item is not None:
            batch.append(item)
            if len(batch) == BATCH:
                return batch, True
            try:
                item = self._waiting.get(timeout=GATHER_SECONDS)
            except queue.Empty:
                return batch, True
        return batch, False

    def _answer(self, batch: list[_Waiting]) -> None:
        images = [image for image, _ in batch]
        padded = torch.stack(images + images[-1:] * (BATCH - len(images)))
        try:
            readings = self._reader.read(padded)[: len(batch)]
        except Exception as error:  # whatever it is, those who wait must hear of it
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), reading in zip(batch, readings, strict=True):
            future.set_result(reading)


def decode_image(url: object) -> Tensor:
    """Read a data URL as [3, 32, 32] in [0, 1]: the centre square, on white where it is transparent.

    Raises:
        ApiError: not a data URL, not base64, not a picture, or too large.
    """
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url:
        raise _bad_image(
            f"expected a data:image/...;base64,... URL, got {str(url)[:40]!r}; nothing is fetched"
        )
    try:
        data = base64.b64decode(url.split(",", 1)[1], validate=True)
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise _bad_image(f"the image has {picture.width} x {picture.height} pixels, too many")
            rgba = upright(picture).convert("RGBA")
    except (
        binascii.Error,
        OSError,
        SyntaxError,
        ValueError,
        NotImplementedError,
        Image.DecompressionBombError,
    ) as error:
        raise _bad_image(f"the image cannot be decoded: {error}") from error
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if rgb.size != (SIDE, SIDE):
        rgb = ImageOps.fit(rgb, (SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgb, dtype=np.float32) / 255.0).permute(2, 0, 1).contiguous()


def _bad_image(message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, code="invalid_image", param="messages")


# ---------------------------------------------------------------------------------------- answering


class Turn:
    """One message of the dialogue, taken apart: role, text, images [3, 32, 32]."""

    def __init__(self, message: object) -> None:
        """Read a message of the request.

        Raises:
            ApiError: it is not a chat message.
        """
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(HTTPStatus.BAD_REQUEST, "each message needs a role and content", param="messages")
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ApiError(HTTPStatus.BAD_REQUEST, "content is a text or a list of parts", param="messages")
        self.role: str = message["role"]
        self.text = " ".join(str(part.get("text", "")) for part in parts if part.get("type") == "text")
        self.images = [decode_image(_url(part)) for part in parts if part.get("type") == "image_url"]


def _url(part: dict[str, Any]) -> object:
    inner = part.get("image_url")
    return inner.get("url") if isinstance(inner, dict) else inner


def answer(turns: Sequence[Turn], reader: BatchReader) -> str:
    """Answer the last user turn of a dialogue."""
    asked = next((turn for turn in reversed(turns) if turn.role == "user"), None)
    if asked is None:
        raise ApiError(HTTPStatus.BAD_REQUEST, "messages holds no user turn", param="messages")
    quoted = _PROMPT.search(asked.text)
    if quoted or re.search(r"\bYES or NO\b", asked.text):
        descriptions = _descriptions(turns, reader)
        if len(descriptions) < 2:
            return "I need two images, or two descriptions of images, before that."
        first, second = descriptions[:2]
        return rewrite(quoted.group(1), second) if quoted else ("YES" if similar(first, second) else "NO")
    if asked.images and re.search(r"\bone of these classes\b", asked.text):
        return choose(reader.read(asked.images[0]).category, _OFFERED.findall(asked.text))
    if asked.images:
        return "\n\n".join(describe(reader.read(image)) for image in asked.images)
    return POLITE


def _descriptions(turns: Sequence[Turn], reader: BatchReader) -> list[Attributes]:
    """What the dialogue says of its images; where nothing was described, what the images show."""
    said = [parse_description(turn.text) for turn in turns if turn.role == "assistant"]
    described = [attributes for attributes in said if attributes.given]
    if len(described) >= 2:
        return described
    shown = [reader.read(image) for turn in turns for image in turn.images]
    return [parse_description(describe(reading)) for reading in shown]


def completion(body: object, reader: BatchReader, model: str) -> dict[str, Any]:
    """The chat completion object that answers a request's body.

    Raises:
        ApiError: the body is not a request that this server answers.
    """
    if not isinstance(body, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object")
    if body.get("model") not in (MODEL, model):
        message = f"the model {body.get('model')!r} does not exist; this server has {model!r}"
        raise ApiError(HTTPStatus.NOT_FOUND, message, code="model_not_found", param="model")
    if body.get("stream"):
        raise ApiError(HTTPStatus.BAD_REQUEST, "streaming is not supported; leave stream out", param="stream")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(HTTPStatus.BAD_REQUEST, "messages must be a list of at least one", param="messages")
    turns = [Turn(message) for message in messages]
    text = answer(turns, reader)
    prompt_tokens = sum(_tokens(turn.text) + IMAGE_TOKENS * len(turn.images) for turn in turns)
    return {
        "id": f"chatcmpl-{time.time_ns():x}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": _tokens(text),
            "total_tokens": prompt_tokens + _tokens(text),
        },
    }


def _tokens(text: str) -> int:
    """Words and marks: what this model's usage is counted in, with 64 for an image."""
    return len(re.findall(r"\w+|[^\w\s]", text))


# ---------------------------------------------------------------------------------------- HTTP


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "VlmServer"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(HTTPStatus.OK, {"status": "ok"})
        elif self.path.rstrip("/") == "/v1/models":
            model = {"id": self.server.model, "object": "model", "created": 0, "owned_by": "fscil"}
            self._send(HTTPStatus.OK, {"object": "list", "data": [model]})
        else:
            self._fail(ApiError(HTTPStatus.NOT_FOUND, f"unknown path GET {self.path}"))

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path.rstrip("/") != "/v1/chat/completions":
                raise ApiError(HTTPStatus.NOT_FOUND, f"unknown path POST {self.path}")
            self._send(HTTPStatus.OK, completion(_from_json(body), self.server.reader, self.server.model))
        except ApiError as error:
            self._fail(error)
        except ConnectionError:
            self.close_connection = True  # who asked has gone, as a run does that is asked to end
        except Exception:
            log.exception("the miniature VLM failed on a request")
            self._fail(ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed on this request"))

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            raise ApiError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        if int(length) > MAX_BODY:
            self.close_connection = True
            raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body exceeds {MAX_BODY} bytes")
        return self.rfile.read(int(length))

    def _fail(self, error: ApiError) -> None:
        self._send(error.status, error.body)

    def _send(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


def _from_json(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from error


class VlmServer(ThreadingHTTPServer):
    """The HTTP server, bound to 127.0.0.1; a thread for each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, reader: Reader, port: int, model: str) -> None:
        """Bind the port.

        Args:
            reader: the captioner.
            port: 0 takes a free one.
            model: the full name of the model, which ``GET /v1/models`` gives.

        Raises:
            OSError: the port is taken.
        """
        super().__init__(("127.0.0.1", port), _Handler)
        self.reader = BatchReader(reader)
        self.model = model

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given as its address."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of the server."""
        log.debug("connection from %s ended early", client_address, exc_info=True)


@contextmanager
def serve(reader: Reader, port: int = 0, model: str = MODEL) -> Iterator[VlmServer]:
    """Serve in a daemon thread for as long as the block lasts.

    Args:
        reader: the captioner.
        port: 0 takes a free one.
        model: the model's full name: "miniature", or "miniature@" and something that identifies the weights.
    """
    server = VlmServer(reader, port, model)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="miniature-vlm", daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.reader.close()


@contextmanager
def serve_miniature(port: int = 0) -> Iterator[str]:
    """Serve the shipped captioner; gives the address. The model's name ends in its weights' digest and ``RULES``.

    Raises:
        FileNotFoundError: the captioner's weights are not there.
    """
    from tasks.miniature.reader import Reader as Captioner  # it brings transformers, which no test here needs
    from tasks.store import digest_of

    folder = Path(__file__).parent / "weights" / "captioner"
    if not folder.is_dir():
        raise FileNotFoundError(f"the miniature's captioner is not in {folder}; train it with: make pretrain")
    with serve(Captioner.from_weights(folder), port, f"{MODEL}@{digest_of(folder)[:12]}-{RULES}") as server:
        yield server.base_url


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.miniature.vlm_server", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with serve_miniature(parser.parse_args(arguments).port) as base_url:
        log.info("the miniature VLM answers at %s; stop it with Ctrl-C", base_url)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            log.info("stopped")


if __name__ == "__main__":
    main()
