"""A chat request being answered: its choices with the engine, their chunks merged, the whole of it priced.

exchange = Exchange(order, hosted, prompt, params, worker)
await exchange.start(salt)                   accepted by the engine; raises ApiError where it is not
async for chunks in exchange.chunks(): ...   [] is a beat: nothing came for a while
exchange.figures                             tokens, seconds, dollars
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tael.data import Tokenizer
from tael.engine import SamplingParams
from tael.engine.watch import Opening
from tael.engine.work import computed_flops
from tael.model import ModelConfig
from tael.serve.answer import Answer, Chunk, Counts
from tael.serve.errors import ApiError
from tael.serve.formats import Prompt, Starts
from tael.serve.models import Hosted
from tael.serve.orders import Order
from tael.serve.prices import Cost, Price
from tael.serve.worker import EngineWorker, Ticket, Update

_ENDS = {"message_delta", "response.completed", "response.incomplete"}
"""Named events that carry the usage."""
_BEGINS: dict[Starts, Opening] = {"think": "thinking", "free": "free", "answer": "answer", "calls": "answer"}
_USAGE = ',"usage":{'
"""In a chunk without a name: of the content, a quotation mark would be escaped."""


@dataclass(frozen=True)
class Figures:
    """What a request took; seconds from its arrival on."""

    counts: Counts
    seconds: float
    first_token: float | None
    cost: Cost
    engine_seconds: float = 0.0
    """What the engine was busy with it."""
    flops: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second once the first was there."""
        after = self.seconds - (self.first_token or 0.0)
        return (self.counts.completion - 1) / after if self.counts.completion > 1 and after > 0 else 0.0

    def extend(self, usage: dict[str, Any]) -> None:
        """Add to a protocol's usage what it does not know: money, hits and misses apart, and speed."""
        counts, cost = self.counts, self.cost
        usage["cost"] = round(cost.total, 12)
        usage["cost_details"] = {
            "prompt_cache_hit": round(cost.hit, 12),
            "prompt_cache_miss": round(cost.miss, 12),
            "completion": round(cost.output, 12),
        }
        usage["tael"] = {
            "seconds": round(self.seconds, 4),
            "first_token_seconds": round(self.first_token or 0.0, 4),
            "tokens_per_second": round(self.rate, 2),
            "drafted_tokens": counts.drafted,
            "accepted_tokens": counts.accepted,
        }


class Meter:
    """Counts and times of a request, whatever its protocol."""

    def __init__(self, price: Price) -> None:
        self.began = time.perf_counter()
        self.first: float | None = None
        self._price = price

    def mark(self) -> None:
        """The first token is there."""
        self.first = self.first or time.perf_counter() - self.began

    def figures(self, counts: list[Counts]) -> Figures:
        """Of all choices together; the prompt they share counts once."""
        total = replace(counts[0])
        for other in counts[1:]:
            for name in ("completion", "reasoning", "drafted", "accepted"):
                setattr(total, name, getattr(total, name) + getattr(other, name))
        cost = self._price.cost(total.cached, total.prompt - total.cached, total.completion)
        return Figures(total, time.perf_counter() - self.began, self.first, cost)


class Race:
    """Several tickets as one stream of (which, update). The first starts alone: the others then find its prompt in
    the cache."""

    def __init__(self, worker: EngineWorker, hosted: Hosted, prompt: list[int], params: list[SamplingParams]) -> None:
        self._put = partial(worker.submit, hosted.engine, prompt)
        self._params = params
        self._tickets: list[Ticket] = []
        self._first: AsyncIterator[Update] | None = None

    async def start(self, salt: Hashable, text: bool, begins: Opening | None = None) -> None:
        """Hand the first over and wait until the engine has taken it. Raises ApiError."""
        self._put = partial(self._put, salt=salt, text=text, begins=begins)
        self._tickets.append(self._put(self._params[0]))
        self._first = aiter(self._tickets[0])
        await anext(self._first)

    def beat(self) -> None:
        for ticket in self._tickets:
            ticket.beat()

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    def finish(self) -> None:
        for ticket in self._tickets:
            ticket.finish()

    def wrote(self, tokenizer: Tokenizer) -> list[str]:
        """What each has said so far, special tokens spelled out."""
        found = [ticket.sequence for ticket in self._tickets if ticket.sequence is not None]
        return [tokenizer.decode(each.tokens[each.prompt_length :], skip_special=False) for each in found]

    def spent(self, config: ModelConfig) -> tuple[float, float]:
        """Seconds and FLOPs of the engine's so far, of all tickets."""
        found = [ticket.sequence for ticket in self._tickets if ticket.sequence is not None]
        return sum(each.seconds for each in found), sum(computed_flops(config, each) for each in found)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        assert self._first is not None, "start() comes first"
        async for update in self._first:
            yield 0, update
            if len(self._params) > 1 and update.events:
                break
        if len(self._params) > 1:
            async for found in self._rest():
                yield found

    async def _rest(self) -> AsyncIterator[tuple[int, Update]]:
        self._tickets += [self._put(params) for params in self._params[1:]]
        inbox: asyncio.Queue[tuple[int, Update | BaseException | None]] = asyncio.Queue()

        async def pump(place: int, updates: AsyncIterator[Update]) -> None:
            try:
                async for update in updates:
                    inbox.put_nowait((place, update))
                inbox.put_nowait((place, None))
            except BaseException as error:
                inbox.put_nowait((place, error))
                raise

        streams = [self._first, *map(aiter, self._tickets[1:])]
        tasks = [asyncio.ensure_future(pump(place, stream)) for place, stream in enumerate(streams) if stream]
        try:
            left = len(tasks)
            while left:
                place, update = await inbox.get()
                if isinstance(update, BaseException):
                    raise update
                if update is None:
                    left -= 1
                else:
                    yield place, update
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Priced:
    """What every exchange has: its choices with the engine, what they took, and what that costs."""

    def __init__(
        self,
        hosted: Hosted,
        prompt: list[int],
        params: list[SamplingParams],
        counts: list[Counts],
        worker: EngineWorker,
    ) -> None:
        self.hosted, self.counts = hosted, counts
        self.meter = Meter(hosted.price())
        self._race = Race(worker, hosted, prompt, params)

    @property
    def figures(self) -> Figures:
        seconds, flops = self._race.spent(self.hosted.engine.model.config)
        return replace(self.meter.figures(self.counts), engine_seconds=seconds, flops=flops)

    @property
    def wrote(self) -> list[str]:
        """What was said so far, once a choice."""
        return self._race.wrote(self.hosted.tokenizer)

    def beat(self) -> None:
        """Let `chunks` yield at least once more."""
        self._race.beat()

    def cancel(self) -> None:
        """Free everything; nobody listens any more."""
        self._race.cancel()

    def finish(self) -> None:
        """Return what there is: every choice ends now."""
        self._race.finish()


class Exchange(Priced):
    """A chat request. While `chunks` yields nothing, `ahead` wait before it and `computed` of its prompt are read."""

    def __init__(
        self, order: Order, hosted: Hosted, prompt: Prompt, params: list[SamplingParams], worker: EngineWorker
    ) -> None:
        self.order, self.prompt = order, prompt
        self.answers = [Answer(order, hosted, prompt, index) for index in range(len(params))]
        super().__init__(hosted, prompt.ids, params, [answer.counts for answer in self.answers], worker)
        self.ahead, self.computed = 0, 0
        self._open = len(params)

    async def start(self, salt: Hashable) -> None:
        """Hand it to the engine. Raises ApiError where that does not take it."""
        text = any(not answer.takes_tokens for answer in self.answers)
        try:
            await self._race.start(salt, text, _BEGINS[self.prompt.starts])
        except ApiError as error:
            if error.status == 400 and error.message.startswith("constraint: "):
                name = self.order.constrains
                raise ApiError(400, f"{name}: {error.message.removeprefix('constraint: ')}", name) from None
            raise

    async def chunks(self) -> AsyncIterator[list[Chunk]]:
        """What there is to send, step by step."""
        async for place, update in self._race.updates():
            if not update.events:
                self.ahead, self.computed = update.ahead, update.computed
                yield []
                continue
            self.meter.mark()
            chunks = self.answers[place].feed(update.events)
            if update.events[-1].finish_reason is not None:
                self._open -= 1
                chunks = [self._priced(chunk) for chunk in chunks]
            yield chunks

    def _priced(self, chunk: Chunk) -> Chunk:
        """The chunk with the usage: of all choices, priced, and only once all have ended."""
        if not (chunk.event in _ENDS or (chunk.event is None and _USAGE in chunk.data)):
            return chunk
        value = json.loads(chunk.data)
        holder = value.get("response", value)
        if self._open:
            holder["usage"] = None
        else:
            self._complete(holder["usage"])
        return Chunk(chunk.event, json.dumps(value, ensure_ascii=False, separators=(",", ":")))

    def _complete(self, usage: dict[str, Any]) -> None:
        figures = self.figures
        counts = figures.counts
        written = "completion_tokens" if "completion_tokens" in usage else "output_tokens"
        usage[written] = counts.completion
        if "total_tokens" in usage:
            usage["total_tokens"] = counts.prompt + counts.completion
        if counts.reasoning and self.order.protocol.dialect == "openai":
            usage[f"{written}_details"] = {"reasoning_tokens": counts.reasoning}
        figures.extend(usage)

    def response(self) -> dict[str, Any]:
        """The whole answer of an order that is not streamed, once `chunks` has ended."""
        whole = self.answers[0].response
        for answer in self.answers[1:]:
            choice = answer.response["choices"][0]
            whole["choices"].append(choice | {"index": len(whole["choices"])})
        self._complete(whole["usage"])
        return whole
