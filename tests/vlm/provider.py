"""A provider on 127.0.0.1 that misbehaves on purpose: chat completions and images, over real HTTP.

Each request gets the next of the planned :class:`Act` s, and a good answer once the plan is used up. The
provider counts what it was sent and what it answered well, which is what a provider would bill.
"""

import base64
import email.utils
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from tasks.images import png_bytes

FLOOD = 2**16
"""Bytes of one part of a flood."""


@dataclass(frozen=True)
class Act:
    """What happens to one request: a status and body, or ``hang`` (seconds), ``drop`` or ``cut`` (a broken body).

    ``die`` announces a whole body and closes in the middle of it, ``drip`` sends it byte by byte, so many seconds
    apart, ``flood`` is a body of so many bytes, announced or, with ``chunked``, not.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: object = None  # None: the good answer; a text or bytes are sent as they are
    hang: float = 0.0
    drop: bool = False
    cut: bool = False
    until: float = 0.0  # ask to wait so many seconds, as a date
    die: bool = False
    drip: float = 0.0
    flood: int = 0
    chunked: bool = False


def refusal(status: int, message: str = "no", code: str | None = None, **headers: str) -> Act:
    """An error in OpenAI's form; ``retry_after`` and the like become headers."""
    error = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return Act(status, {name.replace("_", "-"): value for name, value in headers.items()}, error)


def echo(text: str) -> str:
    """The default answer: the question again."""
    return f"re: {text}"


class Provider(ThreadingHTTPServer):
    """The server; ``answer`` says what is replied to the text of the last message."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, plan: list[Act], answer: Callable[[str], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan = plan
        self.answer = answer
        self.lock = threading.Lock()
        self.sent: list[dict[str, Any]] = []  # bodies, in the order of arrival
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.headers: list[dict[str, str]] = []
        self.seen: list[str] = []  # what was asked for by GET
        self.listing = Act(404, body={})  # the list of models
        self.billed: Counter[str] = Counter()  # good answers by question
        self.under_way = self.most_under_way = self.flooded = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_act(self, body: dict[str, Any]) -> Act:
        with self.lock:
            self.sent.append(body)
            self.times.append(time.monotonic())
            return self.plan.pop(0) if self.plan else Act()

    def bill(self, question: str) -> None:
        with self.lock:
            self.billed[question] += 1

    def count(self, change: int) -> None:
        with self.lock:
            self.under_way += change
            self.most_under_way = max(self.most_under_way, self.under_way)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up here on purpose."""


def _bytes(body: object) -> bytes:
    if isinstance(body, bytes):
        return body
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def question_of(body: dict[str, Any]) -> str:
    """The text of the last message, or the prompt of an image."""
    if "prompt" in body:
        return body["prompt"]
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Provider

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
        self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.server.count(1)
        act = self.server.next_act(body)
        time.sleep(act.hang)
        self.server.count(-1)  # before the client can know
        if act.drop:
            self.close_connection = True
        else:
            self._send(act, body)

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        act = self.server.listing
        self._reply(act.status, act.headers, _bytes(act.body))

    def _send(self, act: Act, body: dict[str, Any]) -> None:
        good = act.body is None and act.status == 200
        data = _bytes(self._good(body) if good else act.body)
        if act.die or act.flood:
            self._never_end(act, data)
            return
        if act.cut:
            data = data[: len(data) // 2]
        elif good:
            self.server.bill(question_of(body))
        date = email.utils.formatdate(time.time() + act.until, usegmt=True)
        headers = {**act.headers, "retry-after": date} if act.until else act.headers
        self._reply(act.status, headers, data, act.drip)

    def _never_end(self, act: Act, data: bytes) -> None:
        """A body that is broken off, or one that nobody should read to its end."""
        self.send_response(act.status)
        size = (
            ("Transfer-Encoding", "chunked")
            if act.chunked
            else ("Content-Length", str(act.flood or len(data)))
        )
        self.send_header(*size)
        self.end_headers()
        self.close_connection = True
        if act.die:
            self.wfile.write(data[: len(data) // 2])
        for _ in range(act.flood // FLOOD):
            part = b" " * FLOOD
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if act.chunked else part)
            self.server.flooded += FLOOD

    def _good(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.path.endswith("/images/generations"):
            return image_of(body["prompt"])
        return completion_of(self.server.answer(question_of(body)))

    def _reply(self, status: int, headers: dict[str, str], data: bytes, drip: float = 0.0) -> None:
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(data), 1 if drip else max(1, len(data))):
            self.wfile.write(data[start : start + 1] if drip else data)
            time.sleep(drip)

    def log_message(self, *args: object) -> None:
        return


def completion_of(text: str | None, **message: object) -> dict[str, Any]:
    """A chat completion: 1,000 tokens read, 100 written."""
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "fake-1",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }  # fmt: skip


def image_of(prompt: str) -> dict[str, Any]:
    """A grey image, 48 x 32, whose brightness is the prompt's length, on a white line; 10 tokens read, 200 written."""
    pixels = torch.full((3, 32, 48), len(prompt) % 256 / 255)
    pixels[:, -2:] = 1
    picture = png_bytes(pixels)
    usage = {
        "input_tokens": 10, "output_tokens": 200, "total_tokens": 210,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 10},
    }  # fmt: skip
    return {"created": 0, "data": [{"b64_json": base64.b64encode(picture).decode()}], "usage": usage}


@contextmanager
def providing(*plan: Act, answer: Callable[[str], str] = echo) -> Iterator[Provider]:
    """Serve in a thread for as long as the block lasts."""
    server = Provider(list(plan), answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
