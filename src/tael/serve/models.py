"""The models that are served: loaded when asked for, unloaded to make room.

host = ModelHost(settings, worker, PriceBook(settings))
hosted = await host.hold("assistant")        loads it first where need be; held it stays
host.release(hosted)
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import deepseek_recipe as recipe
import psutil

from tael.data import Tokenizer
from tael.engine import Engine
from tael.engine.pool import bytes_a_slot
from tael.errors import TaelError, did_you_mean
from tael.loading import Loaded, load
from tael.model import Transformer
from tael.serve.errors import ApiError
from tael.serve.formats import ChatFormat, NoFormat, choose_format
from tael.serve.pricebook import PriceBook
from tael.serve.prices import Price
from tael.serve.settings import ModelSpec, ServeSettings
from tael.serve.worker import EngineWorker

CACHE_SHARE = 0.25
"""Of the memory models may take, what one model's cache may be."""

Loader = Callable[[ModelSpec, Callable[[str], None]], Loaded]


@dataclass(eq=False)
class Hosted:
    """A loaded model. Requests hold it (`users`) while they need it."""

    spec: ModelSpec
    engine: Engine
    tokenizer: Tokenizer
    format: ChatFormat
    context: int
    bytes: int
    price: Callable[[], Price]
    """Of its tokens, now."""
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def recipe_tokenizer(self) -> recipe.Tokenizer:
        """The same tokenizer for deepseek-recipe's parser."""
        return recipe.Tokenizer.from_str(self.tokenizer.backend.to_str())


@dataclass(frozen=True)
class Traits:
    """What is known of a model that was loaded once."""

    context: int
    thinks: bool
    bytes: int


@dataclass(frozen=True)
class ModelCard:
    """What is told about a model. `context`, `thinks` are None before it was ever loaded."""

    name: str
    aliases: tuple[str, ...]
    loaded: bool
    context: int | None
    thinks: bool | None
    price: Price
    created: int
    bytes: int | None = None
    running: int = 0
    queued: int = 0


class ModelHost:
    """All models by name. Raises ApiError: 404 for a name nobody answers to, 503 where memory does not suffice."""

    def __init__(
        self, settings: ServeSettings, worker: EngineWorker, book: PriceBook, loader: Loader | None = None
    ) -> None:
        self.settings, self.worker, self._load = settings, worker, loader or _load
        self.book = book
        self.limit = settings.memory or int(psutil.virtual_memory().total * 0.75)
        self._specs = {spec.name: spec for spec in settings.models}
        self._names = {name: spec.name for spec in settings.models for name in (spec.name, *spec.aliases)}
        self._hosted: dict[str, Hosted] = {}
        self._known: dict[str, Traits] = {}
        self._loading = asyncio.Lock()
        self._arriving: dict[str, asyncio.Task[Hosted]] = {}
        self.notify: Callable[[str], None] = lambda line: None
        self.started = int(time.time())

    def spec(self, name: str) -> ModelSpec:
        """The model that answers to `name`; an empty name means the first one."""
        found = self._names.get(name) if name else next(iter(self._specs), None)
        if found is None:
            known = ", ".join(self._specs) or "none"
            hint = did_you_mean(name, list(self._names))
            raise ApiError(
                404, f"model: there is no model '{name}'{hint}; served here: {known}", "model", "model_not_found"
            )
        return self._specs[found]

    async def hold(self, name: str) -> Hosted:
        """The model, loaded; it stays so until it is released."""
        hosted = await self.load(name)
        hosted.users += 1
        return hosted

    def release(self, hosted: Hosted) -> None:
        hosted.users -= 1
        hosted.used = time.monotonic()

    async def load(self, name: str) -> Hosted:
        """The model, loaded now if it is not."""
        spec = self.spec(name)
        if (hosted := self._hosted.get(spec.name)) is not None:
            return hosted
        if (task := self._arriving.get(spec.name)) is None:
            task = self._arriving[spec.name] = asyncio.ensure_future(self._bring(spec))
            task.add_done_callback(lambda _: self._arriving.pop(spec.name, None))
        return await asyncio.shield(task)  # who hangs up meanwhile does not end it for the others

    async def _bring(self, spec: ModelSpec) -> Hosted:
        async with self._loading:
            return await self._bring_alone(spec)

    async def _bring_alone(self, spec: ModelSpec) -> Hosted:
        if spec.name in self._known:
            self._make_room(self._known[spec.name].bytes, spec.name)
        gc.collect()  # engines refer to themselves: what was unloaded is freed now
        self.notify(f"{spec.name}: loading {spec.model}")
        began = time.perf_counter()
        try:
            loaded = await asyncio.to_thread(self._load, spec, self.notify)
            hosted = await asyncio.to_thread(self._open, spec, loaded)
        except TaelError as error:
            raise ApiError(503, f"model '{spec.name}' cannot be loaded: {error}") from None
        self._known[spec.name] = Traits(hosted.context, hosted.format.thinks, hosted.bytes)
        self._make_room(hosted.bytes, spec.name)
        self._hosted[spec.name] = hosted
        self.notify(f"{loaded.greeting}; loaded in {time.perf_counter() - began:.1f} s")
        return hosted

    def _open(self, spec: ModelSpec, loaded: Loaded) -> Hosted:
        context = loaded.context(spec.context)
        slot, size = bytes_a_slot(loaded.model, loaded.settings), loaded.settings.block_size
        most = max(int(self.limit * CACHE_SHARE) // slot, context + 2 * size)
        sequences = max(1, min(spec.sequences, most // (context + size)))
        engine = loaded.engine(context, sequences)
        taken = _bytes(loaded.model) + engine.pool.runner.cache_bytes
        packed = getattr(engine.pool.runner, "model_bytes", 0)
        return Hosted(
            spec,
            engine,
            loaded.tokenizer,
            _format(loaded.tokenizer, spec.effort_in_prompt),
            context,
            taken + packed,
            partial(self.book.price, spec),
        )

    def _make_room(self, needed: int, name: str) -> None:
        """Unload who is idle, the longest unused first, until `needed` bytes fit under the limit."""
        while sum(each.bytes for each in self._hosted.values()) + needed > self.limit:
            idle = [each for each in self._hosted.values() if not each.users and each.spec.name != name]
            if not idle:
                raise ApiError(
                    503,
                    f"model '{name}' needs {needed / 1e9:.1f} GB, more than is left of the {self.limit / 1e9:.1f} GB "
                    "that models may take here; try again when others are idle, or raise --memory",
                    retry_after=30,
                )
            self._drop(min(idle, key=lambda each: each.used))

    def unload(self, name: str) -> bool:
        """Let go of a model; False when it was not loaded. Raises ApiError 409 while it answers somebody."""
        hosted = self._hosted.get(self.spec(name).name)
        if hosted is None:
            return False
        if hosted.users:
            raise ApiError(409, f"model '{hosted.spec.name}' is answering {hosted.users} requests", "model")
        self._drop(hosted)
        return True

    def _drop(self, hosted: Hosted) -> None:
        self._hosted.pop(hosted.spec.name, None)
        self.worker.forget(hosted.engine)
        self.notify(f"{hosted.spec.name}: unloaded")

    def drop_engine(self, engine: Engine) -> None:
        """An engine broke: its model is loaded anew at the next request."""
        for hosted in [each for each in self._hosted.values() if each.engine is engine]:
            self._drop(hosted)

    def loaded(self) -> list[Hosted]:
        return list(self._hosted.values())

    def cards(self) -> list[ModelCard]:
        """All models, in the order they were named."""
        return [self._card(spec) for spec in self._specs.values()]

    def card(self, name: str) -> ModelCard:
        return self._card(self.spec(name))

    def _card(self, spec: ModelSpec) -> ModelCard:
        hosted, known = self._hosted.get(spec.name), self._known.get(spec.name)
        scheduler = hosted.engine.pool.scheduler if hosted else None
        return ModelCard(
            spec.name,
            spec.aliases,
            hosted is not None,
            known.context if known else spec.context,
            known.thinks if known else None,
            self.book.price(spec),
            self.started,
            hosted.bytes if hosted else None,
            len(scheduler.running) if scheduler else 0,
            len(scheduler.waiting) if scheduler else 0,
        )


def _format(tokenizer: Tokenizer, effort_in_prompt: bool) -> ChatFormat:
    """How to converse with the model; a base model, which has no way to, still completes text."""
    try:
        return choose_format(tokenizer, effort_in_prompt)
    except TaelError as error:
        return NoFormat(str(error))


def _load(spec: ModelSpec, notify: Callable[[str], None]) -> Loaded:
    return load(
        spec.model,
        device=spec.device,
        quantize=spec.quantize,
        backend=spec.backend,
        speculate=spec.speculate,
        map_experts=spec.map_experts,
        notify=notify,
    )


def _bytes(model: Transformer) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
