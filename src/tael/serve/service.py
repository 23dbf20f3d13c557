"""What the routes and the pages call: a request in, its answer out, counted, priced and written down.

service = Service(settings, store)
async for chunk in service.chat(body, caller): ...           as the API streams it, for the pages
async with service.exchange(PROTOCOLS["chat"], body, caller) as exchange: ...
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import deepseek_recipe as recipe

from tael.engine import SamplingParams
from tael.engine.constrain import Constraint
from tael.errors import TaelError
from tael.serve.answer import Counts
from tael.serve.bodies import Body, field
from tael.serve.caller import LOCAL, Caller
from tael.serve.errors import ApiError
from tael.serve.exchange import Exchange
from tael.serve.formats import Prompt
from tael.serve.journal import Journal
from tael.serve.limits import Gate, KeyLimits
from tael.serve.metrics import Metrics
from tael.serve.models import Hosted, Loader, ModelCard, ModelHost
from tael.serve.orders import PROTOCOLS, Order, Protocol
from tael.serve.pricebook import PriceBook
from tael.serve.settings import ServeSettings
from tael.serve.store import Key, Served, Store
from tael.serve.visit import Opening, Visit
from tael.serve.worker import EngineWorker

T = TypeVar("T")
ASIDE = 64 * 1024
"""Bytes from which a body is understood in a thread of its own, so that others' streams go on."""


class Service:
    """Everything behind the routes. Lives on one event loop; `close` it there."""

    def __init__(
        self,
        settings: ServeSettings,
        store: Store,
        loader: Loader | None = None,
        journal: Journal | None = None,
    ) -> None:
        self.settings, self.store = settings, store
        self.book = PriceBook(settings)
        self.worker = EngineWorker(self._engine_failed)
        self.host = ModelHost(settings, self.worker, self.book, loader)
        self.gate = Gate(settings.max_queue)
        self.metrics = Metrics(self)
        self.journal = journal or Journal(None)
        self.stopping = False
        self.visits: dict[str, Visit] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------ callers

    @property
    def keys_required(self) -> bool:
        return not self.settings.is_local

    def authenticate(self, secret: str | None) -> Caller | None:
        """Who holds the secret; None: nobody, or a key where one is needed. On loopback no key is needed, and what
        is plainly none of ours (clients insist on sending something) counts as none."""
        key = self.store.find(secret) if secret else None
        if key is not None:
            return Caller(key.id, key.name)
        if self.keys_required or (secret or "").startswith("tael-"):
            return None
        return LOCAL

    def key(self, caller: Caller) -> Key | None:
        held = self.store.keys()
        return next((key for key in held if key.id == caller.key_id), None)

    def limits(self, caller: Caller) -> KeyLimits:
        key = self.key(caller) if caller.key_id is not None else None
        if caller.key_id is not None and key is None:
            raise ApiError(401, "this key was revoked")
        return key.limits if key is not None else KeyLimits()

    # ------------------------------------------------------------------- models

    def models(self) -> list[ModelCard]:
        return self.host.cards()

    async def preload(self) -> None:
        """Load the models that are to be there from the start."""
        for spec in self.settings.models:
            if spec.preload:
                try:
                    await self.host.load(spec.name)
                except ApiError as error:  # the others come; who asks for this one is told again
                    self.host.notify(error.message)

    # ----------------------------------------------------------------- requests

    def exchange(self, protocol: Protocol, body: Body, caller: Caller, size: int = 0) -> Opening[Exchange]:
        """`async with` it for a chat request that the engine has taken. Raises ApiError."""
        asked = body.get(protocol.dialogue)
        visit = Visit(self, protocol.name, model_name(body), caller, protocol.new_id(), asked=asked)

        async def start(visit: Visit) -> Exchange:
            hosted = visit.hosted
            order, prompt = await self.aside(size, lambda: self._understand(protocol, body, visit.id, hosted))
            params = sampling(order, hosted, prompt)
            visit.admit(len(prompt.ids))
            exchange = Exchange(order, hosted, prompt, params, self.worker)
            await exchange.start(self.salt(caller))
            return exchange

        return Opening(visit, start)

    def salt(self, caller: Caller) -> str | None:
        """Whose prefix cache a request may use."""
        return None if self.settings.share_prefixes else caller.owner

    async def count(self, protocol: Protocol, body: Body, caller: Caller, size: int = 0) -> int:
        """Tokens of the prompt a request would make. Raises ApiError."""
        self.limits(caller)
        hosted = await self.host.load(model_name(body))
        id = protocol.new_id()
        _, prompt = await self.aside(size, lambda: self._understand(protocol, body, id, hosted))
        return len(prompt.ids)

    def _understand(self, protocol: Protocol, body: Body, id: str, hosted: Hosted) -> tuple[Order, Prompt]:
        thinks, settings = hosted.format.thinks, self.settings
        order = protocol.order(body, id, hosted.spec, thinks, hosted.context, settings.max_choices)
        conversation = order.conversation
        mode = order.wishes.mode if conversation.thinking_mode else "direct"
        try:
            prompt = hosted.format.encode(conversation, "continue" if order.prefixed else mode)
        except TaelError as error:
            raise ApiError(400, f"messages: {error}", "messages") from None
        return order, prompt

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """What `work` gives; in a thread of its own where the body it reads is large."""
        return await asyncio.to_thread(work) if size > ASIDE else work()

    async def chat(self, body: Body, caller: Caller, progress: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Chat completion chunks of a request, for the pages; with `progress` also how far the prompt is.

        Raises ApiError; closing the iterator ends the answer.
        """
        body = body | {"stream": True}
        async with self.exchange(PROTOCOLS["chat"], body, caller) as exchange:
            prompt, told = len(exchange.prompt.ids), None
            if progress:
                yield _progress(exchange, prompt)
            async with contextlib.aclosing(exchange.chunks()) as stream:  # type: ignore[type-var]
                async for chunks in stream:
                    state = (exchange.ahead, exchange.computed)
                    if progress and not chunks and exchange.meter.first is None and state != told:
                        told = state
                        yield _progress(exchange, prompt)
                    for chunk in chunks:
                        yield json.loads(chunk.data)

    # ------------------------------------------------------------------ the end

    async def write_down(self, served: Served, counts: Counts, caller: Caller, said: dict[str, Any] | None) -> None:
        """Count, log and keep what was served; it is on the disk when this returns."""
        self.metrics.served(served, counts)
        self.journal.write(served, caller.name, said)
        try:
            await asyncio.to_thread(self.store.record, served)
        except TaelError as error:  # who answers without writing down forgets budgets
            raise ApiError(500, f"the answer could not be written down: {error}") from None

    def refused(self, endpoint: str, caller: Caller | None, error: ApiError) -> None:
        """Count and log what never reached the engine. Its message may quote what was asked: only where contents are
        kept."""
        self.metrics.refused(endpoint, error.status)
        name = caller.name if caller is not None else None
        self.journal.refused(endpoint, name, error, self.settings.log_contents)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Let something go on that nobody waits for, until `close`."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait until all that ended is written down."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin_stop(self) -> None:
        """Nobody comes in any more; who is in may finish within the grace, then gets what there is."""
        self.stopping = True

    async def finish(self) -> None:
        """Wait out the grace, then end what still runs."""
        deadline = asyncio.get_running_loop().time() + self.settings.grace
        while self.visits and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        for visit in list(self.visits.values()):
            if visit.exchange is not None:
                visit.exchange.finish()

    async def close(self) -> None:
        self.begin_stop()
        await self.settle()
        await asyncio.to_thread(self.worker.close)
        self.store.close()

    def _engine_failed(self, engine: Any) -> None:
        """In the engine's thread."""
        self.host.drop_engine(engine)


def model_name(body: Body) -> str:
    """The model that a body names. Raises ApiError."""
    model = field(body, "model", str)
    if not model:
        raise ApiError(422, "model: is missing; name one of those GET /v1/models lists", "model")
    return model


def sampling(order: Order, hosted: Hosted, prompt: Prompt) -> list[SamplingParams]:
    """How the engine is to sample, once a choice. Raises ApiError that names the field."""
    request, wishes, tokenizer = order.request, order.wishes, hosted.tokenizer
    options, parsing = request.inference_options, request.parsing_options
    most = _most_tokens(order, hosted, len(prompt.ids))
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    try:
        params = SamplingParams(
            max_tokens=most,
            temperature=_given(wishes.temperature, options.temperature, 1.0),
            top_p=_given(wishes.top_p, options.top_p, 1.0),
            seed=seed,
            stop_ids=tokenizer.stop_ids,
            logprobs=(options.top_logprobs or 0) if options.logprobs else None,
            stop=tuple(parsing.stop_sequences),
            thinking_budget=wishes.thinking_budget,
            **wishes.sampling,
            constraint=_constraint(order, hosted),
        )
    except TaelError as error:
        raise refusal(error) from None
    return [replace(params, seed=seed + i) for i in range(wishes.choices)]


def _most_tokens(order: Order, hosted: Hosted, prompt: int) -> int:
    """How long the answer may become. Clients of Messages have to name a number, and name large ones: what conversion
    lowers to the context is lowered on to what the prompt leaves of it."""
    asked, room, protocol = order.request.inference_options.max_tokens, hosted.context - prompt, order.protocol
    if protocol.name == "messages" and asked == hosted.context and room > 0:
        return room
    try:
        return order.request.resolve_max_tokens(prompt, hosted.context)
    except recipe.ConversionError as error:
        name = protocol.dialogue if asked is None else protocol.limit
        raise ApiError(400, f"{name}: {json.loads(error.body)['error']['message']}", name) from None


def refusal(error: TaelError) -> ApiError:
    """A complaint about sampling parameters, as the API says it."""
    message = str(error).removeprefix("sampling: ").removeprefix("constraint: ")
    name = message.split(" ", 1)[0]
    return ApiError(400, message, name if name in SamplingParams.__dataclass_fields__ else None)


def _given(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _constraint(order: Order, hosted: Hosted) -> Constraint | None:
    """What the answer has to look like, from what the request asks for."""
    schema, found = order.schema, order.request.inference_options.output_constraint
    if schema is not None:
        return Constraint.json_schema(schema) if schema else Constraint.json_object()
    if found is None:
        return None
    if found.kind == "regex":
        return Constraint.regex(found.schema)
    tools = order.tools
    required = order.must_call or found.kind == "tool_call_required"
    if required or any(tool.strict for tool in tools):
        named = {each["function"]["name"] for each in json.loads(found.schema)}
        chosen = [tool for tool in tools if tool.name in named]
        return hosted.format.tool_grammar(chosen, required, order.wishes.parallel_tools)
    return None


def _progress(exchange: Exchange, prompt: int) -> dict[str, Any]:
    return {
        "object": "tael.progress",
        "ahead": exchange.ahead,
        "prompt_tokens": prompt,
        "computed": exchange.computed,
    }
