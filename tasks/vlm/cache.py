"""Answers kept one by one, by the content of the question: a killed run loses only what was under way.

``<folder>/<key[:2]>/<key>.json`` is an :class:`~tasks.vlm.client.Exchange` and its digest, written whole by
renaming a temporary sibling. It is not synced: a killed process loses nothing by that, and after a power cut a
damaged file counts as missing and is asked for again, as does any that is not what was kept.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tasks.vlm.claims import ask_once
from tasks.vlm.client import ChatClient, Exchange, OnReply, Reply, Request, Sampling, request_key
from tasks.vlm.kept import marked, unmarked

log = logging.getLogger("fscil.vlm")


class CachedClient(ChatClient):
    """Asks another client only what the folder does not answer yet."""

    def __init__(self, client: ChatClient, folder: Path) -> None:
        """Args: client: who is asked; folder: where answers are kept, made when the first one comes."""
        self._client = client
        self._folder = folder

    @property
    def sampling(self) -> Sampling:
        """The inner client's."""
        return self._client.sampling

    def check(self) -> None:
        """Check the inner client."""
        self._client.check()

    def complete_all(self, requests: Sequence[Request], on_reply: OnReply | None = None) -> list[Reply]:
        """See :meth:`ChatClient.complete_all`; equal requests are asked once, whichever run asks them."""
        places: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            places.setdefault(request_key(request, self.sampling), []).append(index)
        replies: dict[int, Reply] = {}

        def told(key: str, reply: Reply) -> None:
            for index in places[key]:
                replies[index] = reply
                if on_reply:
                    on_reply(index, reply)

        def known(key: str) -> bool:
            if (reply := self._read(key)) is None:
                return False
            told(key, reply)
            return True

        def ask(keys: Sequence[str], kept: Callable[[str], None]) -> None:
            def keep(position: int, reply: Reply) -> None:
                self._write(Exchange.of(requests[places[keys[position]][0]], self.sampling, reply))
                kept(keys[position])
                told(keys[position], reply)

            self._client.complete_all([requests[places[key][0]] for key in keys], keep)

        if missing := [key for key in places if not known(key)]:
            ask_once(self._folder, missing, known, ask)
        return [replies[index] for index in range(len(requests))]

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def _read(self, key: str) -> Reply | None:
        path = self._path(key)
        try:
            exchange = Exchange.model_validate_json(unmarked(path.read_bytes()))
        except FileNotFoundError:
            return None
        except ValueError:
            log.warning("the cached VLM answer %s is damaged and will be asked for again", path)
            return None
        if exchange.key != key:
            log.warning("the cached VLM answer %s is to another question; this one will be asked again", path)
            return None
        return exchange.reply

    def _write(self, exchange: Exchange) -> None:
        path = self._path(exchange.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        temporary.write_text(marked(exchange.model_dump_json()), encoding="utf-8")
        temporary.replace(path)
