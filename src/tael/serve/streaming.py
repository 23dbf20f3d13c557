"""Answers over HTTP: server-sent events, and the watch for a client that hangs up.

A response begins only once the engine has taken the request, so that what can be refused is refused with a status of
its own. While nothing comes, a comment goes out every few seconds. When the client goes, the generator is closed at
once, which ends the answer and frees its cache.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tael.serve.answer import Chunk

T = TypeVar("T")
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGoneError(Exception):
    """The client hung up before its answer was whole."""


def event(chunk: Chunk) -> bytes:
    """One server-sent event. JSON has no line breaks of its own."""
    name = f"event: {chunk.event}\n" if chunk.event else ""
    return f"{name}data: {chunk.data}\n\n".encode()


class EventStream(Response):
    """An ASGI response of what `parts` yields: bytes, at once, one write each. It is closed whatever happens."""

    def __init__(self, parts: AsyncGenerator[bytes], headers: dict[str, str] | None = None) -> None:
        super().__init__()
        self._parts = parts
        self._sent_headers = _HEADERS + [(k.encode(), v.encode()) for k, v in (headers or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not sending.done():
                sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._parts) as parts:
            await send({"type": "http.response.start", "status": 200, "headers": self._sent_headers})
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled when the client hangs up. Raises ClientGoneError then."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
