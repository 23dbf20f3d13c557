"""The protocols' routes: a body in, events or one JSON object out. What they have in common is in `Endpoint`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tael.serve import schemas
from tael.serve.answer import Chunk
from tael.serve.bodies import Body, parse_json
from tael.serve.caller import Caller
from tael.serve.completions import TextExchange, completion
from tael.serve.errors import ApiError, Dialect
from tael.serve.exchange import Exchange
from tael.serve.orders import PROTOCOLS, ProtocolName
from tael.serve.service import Service, model_name
from tael.serve.streaming import KEEP_ALIVE, EventStream, event, unless_gone

DONE = b"data: [DONE]\n\n"
ALIASES: dict[ProtocolName, tuple[str, ...]] = {
    "chat": ("/chat/completions", "/v1/chat/completions", "/beta/chat/completions", "/beta/v1/chat/completions"),
    "responses": ("/v1/responses", "/responses"),
    "messages": ("/v1/messages", "/anthropic/v1/messages"),
}
TEXT_ALIASES = ("/v1/completions", "/completions", "/beta/completions", "/beta/v1/completions")


def dialect_of(path: str) -> Dialect:
    """In what words errors of a route are told."""
    return "anthropic" if path.startswith("/anthropic/") or path.startswith("/v1/messages") else "openai"


def caller_of(service: Service, request: Request) -> Caller:
    """Who asks, by Authorization or x-api-key. Raises ApiError 401."""
    header = request.headers.get("authorization", "")
    kind, _, secret = header.partition(" ")
    given = secret.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key")
    caller = service.authenticate(given)
    if caller is None:
        what = "is not known here, or was revoked" if given else "is missing"
        raise ApiError(401, f"Authentication Fails: the API key {what}; `tael keys add NAME` makes one")
    return caller


async def read_body(request: Request, most: int) -> bytes:
    """The body, of at most `most` bytes. Raises ApiError 413."""
    error = ApiError(413, f"the body is larger than {most:,} bytes")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise error
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > most:
            raise error
    return b"".join(parts)


class Answering(Protocol):
    """What Exchange and TextExchange have in common."""

    def beat(self) -> None: ...

    def chunks(self) -> AsyncIterator[list[Any]]: ...


Opening = AbstractAsyncContextManager[Any]


class Endpoint(ABC):
    """One way of asking; subclasses say how a request is opened, written as events, and gathered."""

    done: bytes = DONE

    def __init__(self, service: Service, name: str) -> None:
        self.service, self.name = service, name

    @abstractmethod
    def open(self, body: Body, caller: Caller, size: int) -> Opening:
        """`async with` it for the exchange."""

    @abstractmethod
    def events(self, chunks: list[Any]) -> bytes:
        """One step's chunks, as server-sent events."""

    @abstractmethod
    async def gather(self, exchange: Any) -> dict[str, Any]:
        """The whole answer."""

    def streams(self, body: Body) -> bool:
        return body.get("stream") is True

    async def __call__(self, request: Request) -> Any:
        caller, body, size = await self._asked(request)
        if not self.streams(body):
            return JSONResponse(await unless_gone(request, self._whole(body, caller, size)))
        stack = contextlib.AsyncExitStack()
        exchange = await unless_gone(request, stack.enter_async_context(self.open(body, caller, size)))
        return EventStream(self._parts(stack, exchange))

    async def _asked(self, request: Request) -> tuple[Caller, Body, int]:
        """Who asks, the body, and its bytes. Raises ApiError; what fails here is counted, as what fails later is."""
        caller = None
        try:
            caller = caller_of(self.service, request)
            raw = await read_body(request, self.service.settings.max_body)
            body = parse_json(raw)
            model_name(body)
        except ApiError as error:
            self.service.refused(self.name, caller, error)
            raise
        return caller, body, len(raw)

    async def _whole(self, body: Body, caller: Caller, size: int) -> dict[str, Any]:
        async with self.open(body, caller, size) as exchange:
            return await self.gather(exchange)

    async def _parts(self, stack: contextlib.AsyncExitStack, exchange: Answering) -> AsyncGenerator[bytes]:
        """Events; the request is written down before the last word of it is said."""
        try:
            async with stack, contextlib.aclosing(self._beating(exchange)) as found:
                async for chunks in found:
                    yield self.events(chunks) if chunks else KEEP_ALIVE
        except ApiError as error:
            yield self.error(error)
        else:
            yield self.done

    async def _beating(self, exchange: Answering) -> AsyncGenerator[list[Any]]:
        """What `exchange` brings; [] only where nothing came for `keep_alive` seconds."""
        loop, every = asyncio.get_running_loop(), self.service.settings.keep_alive
        last = loop.time()

        def beat() -> None:
            nonlocal timer
            exchange.beat()
            timer = loop.call_later(every, beat)

        timer = loop.call_later(every, beat)
        try:
            async with contextlib.aclosing(exchange.chunks()) as found:  # type: ignore[type-var]
                async for chunks in found:
                    if chunks or loop.time() - last >= 0.9 * every:
                        last = loop.time()
                        yield chunks
        finally:
            timer.cancel()

    def error(self, error: ApiError) -> bytes:
        """An error after the stream has begun."""
        return event(Chunk(None, json.dumps(error.body(), ensure_ascii=False)))


class ChatEndpoint(Endpoint):
    """Chat Completions, Responses or Messages."""

    def __init__(self, service: Service, name: ProtocolName) -> None:
        super().__init__(service, name)
        self._protocol = PROTOCOLS[name]
        self.done = DONE if name == "chat" else b""

    def open(self, body: Body, caller: Caller, size: int) -> Opening:
        return self.service.exchange(self._protocol, body, caller, size)

    def events(self, chunks: list[Chunk]) -> bytes:
        return b"".join(map(event, chunks))

    async def gather(self, exchange: Exchange) -> dict[str, Any]:
        async for _ in exchange.chunks():
            pass
        return exchange.response()

    def error(self, error: ApiError) -> bytes:
        name = None if self._protocol.name == "chat" else "error"
        body = error.body(self._protocol.dialect)
        if self._protocol.name == "responses":
            body = {"type": "error", "code": body["error"]["code"], "message": error.message, "param": error.param}
        return event(Chunk(name, json.dumps(body, ensure_ascii=False)))


class TextEndpoint(Endpoint):
    """Plain completions, and fill-in-the-middle."""

    def open(self, body: Body, caller: Caller, size: int) -> Opening:
        return completion(self.service, body, caller, size)

    def events(self, chunks: list[dict[str, Any]]) -> bytes:
        return b"".join(event(Chunk(None, json.dumps(chunk, ensure_ascii=False))) for chunk in chunks)

    async def gather(self, exchange: TextExchange) -> dict[str, Any]:
        return exchange.gather([chunk async for chunks in exchange.chunks() for chunk in chunks])


def add_protocols(app: FastAPI, service: Service) -> None:
    """Every route that generates."""
    router = APIRouter()

    def add(paths: tuple[str, ...], endpoint: Endpoint) -> None:
        name = endpoint.name

        async def answer(request: Request) -> Response:
            return await endpoint(request)

        for path in paths:
            router.add_api_route(
                path,
                answer,
                methods=["POST"],
                operation_id=name + path.replace("/", "_"),
                summary=schemas.SUMMARIES[name],
                openapi_extra={"requestBody": schemas.request_body(name)},
                responses=schemas.responses(),
                response_class=JSONResponse,
            )

    for name, paths in ALIASES.items():
        add(paths, ChatEndpoint(service, name))
    add(TEXT_ALIASES, TextEndpoint(service, "completions"))
    _add_count_tokens(router, service)
    app.include_router(router)


def _add_count_tokens(router: APIRouter, service: Service) -> None:
    async def count_tokens(request: Request) -> dict[str, int]:
        caller = caller_of(service, request)
        raw = await read_body(request, service.settings.max_body)
        return {"input_tokens": await service.count(PROTOCOLS["messages"], parse_json(raw), caller, len(raw))}

    for path in ("/v1/messages/count_tokens", "/anthropic/v1/messages/count_tokens"):
        router.add_api_route(
            path,
            count_tokens,
            methods=["POST"],
            operation_id="count_tokens" + path.replace("/", "_"),
            summary="Tokens that a Messages request would take as a prompt.",
            openapi_extra={"requestBody": schemas.request_body("messages")},
            responses=schemas.responses(),
        )
