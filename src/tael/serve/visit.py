"""A request's stay: let in, given its model, and written down however it ends.

    async with Visit(service, "chat", "tiny", caller, id) as visit: ...

A class and not a generator: an answer that is broken off ends with GeneratorExit, which contextlib's generators do
not take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tael.serve.caller import Caller
from tael.serve.errors import ApiError
from tael.serve.limits import KeyLimits, Lease
from tael.serve.store import Served

if TYPE_CHECKING:
    from tael.serve.exchange import Figures
    from tael.serve.models import Hosted
    from tael.serve.service import Service

CLIENT_GONE = 499
"""nginx's status for a client that hung up; it is only written down, nobody receives it."""


class Exchanging(Protocol):
    """What is being answered."""

    @property
    def figures(self) -> Figures: ...

    @property
    def wrote(self) -> list[str]:
        """What was said so far, once a choice."""
        ...

    def cancel(self) -> None:
        """Free everything; nobody listens any more."""
        ...

    def finish(self) -> None:
        """Return what there is."""
        ...


E = TypeVar("E", bound=Exchanging)


@dataclass
class Visit:
    """One request in the house. Raises ApiError: 402 without money, 429 where it is full, 503 while stopping."""

    service: Service
    endpoint: str
    model: str
    caller: Caller
    id: str
    limits: KeyLimits = field(default_factory=KeyLimits)
    exchange: Exchanging | None = None
    asked: Any = None
    """Messages or prompt, as the client sent them."""
    _lease: Lease | None = None
    _hosted: Hosted | None = None
    _started: str = ""

    @property
    def hosted(self) -> Hosted:
        assert self._hosted is not None, "enter first"
        return self._hosted

    async def __aenter__(self) -> Visit:
        service = self.service
        self.limits = service.limits(self.caller)
        self._check()
        self._started = datetime.now(UTC).isoformat()
        service.visits[self.id] = self
        try:
            self._hosted = await service.host.hold(self.model)
        except BaseException as error:
            await self._leave(error)
            raise
        return self

    def _check(self) -> None:
        service, budget = self.service, self.limits.budget_dollars
        fault = None
        if service.stopping:
            fault = ApiError(503, "the server is stopping", retry_after=10)
        elif budget is not None and service.store.spent(self.caller.key_id) >= budget:
            fault = ApiError(402, f"Insufficient Balance: the key's budget of {budget:g} dollars is spent")
        elif len(service.visits) >= service.settings.max_queue:
            fault = ApiError(429, "the server is busy; try again later", code="queue_full", retry_after=1)
        if fault is not None:
            service.refused(self.endpoint, self.caller, fault)
            raise fault

    def admit(self, prompt_tokens: int) -> None:
        """Count the prompt against the key's limits; raises ApiError 429."""
        self._lease = self.service.gate.enter(self.caller, self.limits, prompt_tokens)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        service = self.service
        service.visits.pop(self.id, None)
        if self._hosted is not None:
            service.host.release(self._hosted)
        exchange = self.exchange
        figures = exchange.figures if exchange is not None else None
        if exchange is not None:
            exchange.cancel()
        if self._lease is not None:
            if figures is not None:
                self._lease.spend(figures.counts.completion)
            self._lease.close()
        if figures is None or exchange is None:
            fault = error if isinstance(error, ApiError) else ApiError(_status(error), type(error).__name__)
            service.refused(self.endpoint, self.caller, fault)
            return
        said = {"asked": self.asked, "answered": exchange.wrote} if service.settings.log_contents else None
        writing = service.write_down(self.served(figures, _status(error)), figures.counts, self.caller, said)
        if error is None:
            await writing
        else:
            service.spawn(writing)  # whoever hung up is not to wait, nor to cancel it

    def served(self, figures: Figures, status: int) -> Served:
        counts = figures.counts
        return Served(
            request_id=self.id,
            key_id=self.caller.key_id,
            model=self.hosted.spec.name,
            endpoint=self.endpoint,
            started=self._started,
            seconds=figures.seconds,
            first_token_seconds=figures.first_token,
            prompt_tokens=counts.prompt,
            cached_tokens=counts.cached,
            completion_tokens=counts.completion,
            reasoning_tokens=counts.reasoning,
            dollars=figures.cost.total,
            status=status,
            finish_reason=counts.finish_reason,
            engine_seconds=figures.engine_seconds,
            flops=figures.flops,
            joules=self.service.book.joules(figures.engine_seconds),
            machine_dollars=self.service.book.machine_dollars(figures.engine_seconds),
        )


def _status(error: BaseException | None) -> int:
    if error is None:
        return 200
    if isinstance(error, ApiError):
        return error.status
    return CLIENT_GONE if isinstance(error, asyncio.CancelledError | GeneratorExit) else 500


class Opening(Generic[E]):
    """A visit and what it is for: entering gives the exchange, once the engine has taken it."""

    def __init__(self, visit: Visit, start: Callable[[Visit], Awaitable[E]]) -> None:
        self._visit, self._start = visit, start

    async def __aenter__(self) -> E:
        visit = await self._visit.__aenter__()
        try:
            exchange = await self._start(visit)
        except BaseException as error:
            await visit._leave(error)
            raise
        visit.exchange = exchange
        return exchange

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._visit.__aexit__(kind, error, trace)
