"""Addresses where a server should be: nobody listens there, somebody who is silent, or somebody else."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer


@contextmanager
def nobody(*_: object) -> Iterator[str]:
    yield "http://127.0.0.1:9"


@contextmanager
def silent(*_: object) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def somebody_else(*_: object) -> Iterator[str]:
    with answering(200, b"<html>It works!</html>") as url:
        yield url


@contextmanager
def answering(status: int, said: bytes, **headers: str) -> Iterator[str]:
    """Somebody who answers whatever is asked with the same; ``_`` in a header's name stands for ``-``."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@contextmanager
def dripping(*_: object) -> Iterator[str]:
    """Somebody whose answer never ends: a byte at a time, each soon enough for who waits for the next one."""
    ended = threading.Event()

    def drip(listening: socket.socket) -> None:
        with suppress(OSError):
            near, _ = listening.accept()
            with near:
                near.sendall(b"HTTP/1.1 200 OK\r\n")
                while not ended.wait(0.05):
                    near.sendall(b"X-More: 1\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=(listening,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        ended.set()
