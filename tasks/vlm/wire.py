"""A bound on what is read from a provider.

A reply is read up to a limit, and none is unpacked, so that neither 100 MB nor 100 kB that unpack to as much are held.
"""

from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2

from tasks.vlm.failures import BrokenReplyError

NOT_PACKED = {"Accept-Encoding": "identity"}
"""Headers that ask for what can be bounded."""


def bounding(limit: int) -> Callable[[httpx2.Response], Awaitable[None]]:
    """A hook for a client's responses, before their bodies are read.

    Args:
        limit: bytes of a body. The hook, or reading more, raises BrokenReplyError.
    """

    async def bound(response: httpx2.Response) -> None:
        packed = response.headers.get("content-encoding", "identity")
        if packed.lower() != "identity":
            raise BrokenReplyError("a packed reply, which was not asked for")
        assert isinstance(response.stream, httpx2.AsyncByteStream), "of an asynchronous client"
        response.stream = _Bounded(response.stream, limit)

    return bound


class _Bounded(httpx2.AsyncByteStream):
    """The parts of a reply, until there are too many."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        read = 0
        async for part in self._stream:
            read += len(part)
            if read > self._limit:
                raise BrokenReplyError(f"more than {self._limit:,} bytes, of which none were kept")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
