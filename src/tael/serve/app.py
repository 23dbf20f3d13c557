"""The web application: guard, protocols, house-keeping routes, pages.

app = make_app(service)                  an ASGI application; its lifespan loads the models
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import tael
from tael.errors import TaelError
from tael.serve import schemas
from tael.serve.bodies import field, parse_json
from tael.serve.errors import ApiError
from tael.serve.models import ModelCard
from tael.serve.routes import add_protocols, caller_of, dialect_of, read_body
from tael.serve.service import Service
from tael.serve.streaming import ClientGoneError

_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}


def make_app(service: Service) -> FastAPI:
    """The whole application over `service`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.ensure_future(service.preload())
        try:
            yield
        finally:
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loading

    app = FastAPI(title="Tael", version=tael.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(TaelError, _tael_error)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    add_protocols(app, service)
    _add_models(app, service)
    _add_house(app, service)
    _add_nothing(app)
    if service.settings.allow_origins:
        origins = list(service.settings.allow_origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Guard, service=service)
    return app


class Guard:
    """Keeps out what a web page elsewhere might send through its visitor's browser: requests under a foreign name
    (DNS rebinding) and from a foreign page (Origin), for HTTP and WebSocket alike."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._settings = app, service.settings
        self._hosts = _LOCAL_NAMES | {self._settings.host} if self._settings.is_local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1")
            origin = headers.get(b"origin", b"").decode("latin-1")
            fault = self._fault(host, origin)
            if fault is not None:
                await self._refuse(fault, scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _fault(self, host: str, origin: str) -> str | None:
        if self._hosts is not None and _name(host) not in self._hosts:
            return "this server answers under the names of this machine alone"
        allowed = self._settings.allow_origins
        if origin and origin not in allowed and "*" not in allowed and urlsplit(origin).netloc != host:
            return "this web page may not ask here; start the server with --allow-origin to let it"
        return None

    async def _refuse(self, fault: str, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": fault[:120]})
            return
        body = ApiError(403, fault).body(dialect_of(scope["path"]))
        await JSONResponse(body, 403)(scope, receive, send)


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


# ---------------------------------------------------------------------- errors


def _answer(request: Request, error: ApiError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(dialect_of(request.url.path)), error.status, headers)


async def _api_error(request: Request, error: Any) -> Response:
    return _answer(request, error)


async def _tael_error(request: Request, error: Exception) -> Response:
    return _answer(request, ApiError(400, str(error)))


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _http_error(request: Request, error: Any) -> Response:
    """Starlette's own: unknown paths and methods."""
    said = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    answer = _answer(request, ApiError(error.status_code, said.get(error.status_code, str(error.detail))))
    answer.headers.update(error.headers or {})
    return answer


async def _unexpected(request: Request, error: Exception) -> Response:
    return _answer(request, ApiError(500, f"something is wrong here ({type(error).__name__}); see the server's log"))


# ---------------------------------------------------------------------- models


def _add_models(app: FastAPI, service: Service) -> None:
    """What is served, and loading and unloading it."""

    async def list_models(request: Request) -> dict[str, Any]:
        """The models by name; clients of all protocols find their fields."""
        caller_of(service, request)
        data = [_model(card) for card in service.models()]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return {"object": "list", "data": data, "has_more": False, **ends}

    async def get_model(name: str, request: Request) -> dict[str, Any]:
        """One model, by name or alias."""
        caller_of(service, request)
        return _model(service.host.card(name))

    async def load_model(request: Request) -> dict[str, Any]:
        """Load a model before anybody needs it."""
        name = await named(request)
        await service.host.load(name)
        return _model(service.host.card(name))

    async def unload_model(request: Request) -> dict[str, Any]:
        """Free a model's memory; it is loaded again at the next request."""
        name = await named(request)
        service.host.unload(name)
        return _model(service.host.card(name))

    async def named(request: Request) -> str:
        caller_of(service, request)
        body = parse_json(await read_body(request, 64 * 1024))
        name = field(body, "model", str)
        if name is None:
            raise ApiError(422, "model: is missing", "model")
        return name

    refusals = schemas.responses(400, 401, 403, 404, 409, 413, 422, 503)
    for prefix in ("", "/v1", "/anthropic/v1"):
        app.add_api_route(f"{prefix}/models", list_models, methods=["GET"], responses=schemas.responses(401, 403))
    body = {"requestBody": schemas.request_body("model")}
    app.add_api_route("/v1/models/load", load_model, methods=["POST"], responses=refusals, openapi_extra=body)
    app.add_api_route("/v1/models/unload", unload_model, methods=["POST"], responses=refusals, openapi_extra=body)
    for prefix in ("", "/v1", "/anthropic/v1"):
        path = prefix + "/models/{name:path}"
        app.add_api_route(path, get_model, methods=["GET"], responses=schemas.responses(401, 403, 404))


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "type": "model",
        "display_name": card.name,
        "created": card.created,
        "created_at": datetime.fromtimestamp(card.created, UTC).isoformat(),
        "owned_by": "tael",
        "aliases": list(card.aliases),
        "loaded": card.loaded,
        "context_length": card.context,
        "thinks": card.thinks,
        "price": {
            "prompt_cache_hit": card.price.hit,
            "prompt_cache_miss": card.price.miss,
            "completion": card.price.output,
        },
        "bytes": card.bytes,
        "running": card.running,
        "queued": card.queued,
    }


# ----------------------------------------------------------------------- house


def _add_house(app: FastAPI, service: Service) -> None:
    """Balance and usage of a key; health and metrics of the server."""

    async def balance(request: Request) -> dict[str, Any]:
        """What is left of the key's budget."""
        caller = caller_of(service, request)
        key = service.key(caller)
        left = service.store.balance(key) if key else None
        if left is None:
            return {"is_available": True, "balance_infos": []}
        text = f"{max(left, 0.0):.6f}"
        info = {"currency": "USD", "total_balance": text, "granted_balance": "0.00", "topped_up_balance": text}
        return {"is_available": left > 0, "balance_infos": [info]}

    async def usage(request: Request) -> dict[str, Any]:
        """What the key was charged for so far."""
        caller = caller_of(service, request)
        totals = [each for each in service.store.totals("key") if each.key_id == caller.key_id]
        names = ("requests", "hit_tokens", "miss_tokens", "output_tokens", "dollars")
        return {"key": caller.name} | {name: sum(getattr(total, name) for total in totals) for name in names}

    async def health() -> dict[str, str]:
        """The process is up."""
        return {"status": "ok", "version": tael.__version__}

    async def ready() -> Response:
        """Whether requests are taken, and every model that is to be there is."""
        missing = [
            spec.name for spec in service.settings.models if spec.preload and not service.host.card(spec.name).loaded
        ]
        waits = "stopping" if service.stopping else f"loading {', '.join(missing)}" if missing else None
        return JSONResponse({"status": waits or "ready"}, 503 if waits else 200)

    async def metrics(request: Request) -> Response:
        """Prometheus metrics; needs a key where requests do."""
        caller_of(service, request)
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    refusals = schemas.responses(401, 403)
    app.add_api_route("/user/balance", balance, methods=["GET"], responses=refusals)
    app.add_api_route("/user/usage", usage, methods=["GET"], responses=refusals)
    app.add_api_route("/health", health, methods=["GET"], responses=schemas.responses(403))
    app.add_api_route("/ready", ready, methods=["GET"], responses=schemas.responses(403, 503))
    app.add_api_route("/metrics", metrics, methods=["GET"], responses=refusals)


def _add_nothing(app: FastAPI) -> None:
    """Paths that look like the API's and are none: an error clients can read, not a page for people."""

    async def nothing(request: Request) -> Response:
        raise HTTPException(404)

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    for prefix in ("/v1", "/beta", "/anthropic", "/chat", "/user"):
        app.add_api_route(prefix + "/{rest:path}", nothing, methods=methods, include_in_schema=False)
