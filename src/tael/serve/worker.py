"""The engine thread: every engine's steps happen here, one after another; requests come in, tokens go out.

    worker = EngineWorker()
    ticket = worker.submit(engine, prompt_ids, params, salt=caller.salt)
    async for update in ticket: ...            .events: what one step brought; .ahead, .computed before there are any
    ticket.cancel()                            its blocks are free after the running step

JSON, templates and parsing stay on the event loop; only token ids and parameters cross. What one step brought is
handed over in one piece for all requests of it, so that a step wakes the event loop once.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass, field

from tael.engine import Engine, SamplingParams, TokenEvent
from tael.engine.sequence import Sequence
from tael.engine.watch import Opening
from tael.errors import TaelError
from tael.serve.errors import ApiError


def _gone() -> ApiError:
    return ApiError(503, "the model was unloaded; send the request again", retry_after=1)


@dataclass(frozen=True)
class Update:
    """News of one request: tokens, or, before there are any, how far it is."""

    events: tuple[TokenEvent, ...] = ()
    ahead: int = 0
    """Requests that wait before this one."""
    computed: int = 0
    """Tokens of the prompt that were read or found in the cache."""


@dataclass(eq=False)
class Ticket:
    """One request with the worker; iterate for its updates, on the event loop it was submitted from.

    Raises ApiError where the request cannot be served or the engine fails. Leaving the iteration early cancels.
    """

    worker: EngineWorker
    engine: Engine
    prompt: list[int]
    params: SamplingParams
    salt: Hashable
    text: bool
    begins: Opening | None
    loop: asyncio.AbstractEventLoop
    sequence: Sequence | None = None
    _inbox: deque[Update | ApiError] = field(default_factory=deque)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _told: tuple[int, int] = (-1, -1)

    async def __aiter__(self) -> AsyncIterator[Update]:
        try:
            while True:
                while not self._inbox:
                    self._wake.clear()
                    await self._wake.wait()
                update = self._inbox.popleft()
                if isinstance(update, ApiError):
                    raise update
                yield update
                if update.events and update.events[-1].finish_reason is not None:
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request; harmless when it is over."""
        if self.sequence is None or self.sequence.state != "finished":
            self.worker.cancel(self)

    def finish(self) -> None:
        """End the request as if it had reached its limit: what there is was all."""
        self.worker.finish(self)

    def beat(self) -> None:
        """Let the iteration go round once, without news."""
        self._receive(Update())

    def _receive(self, update: Update | ApiError) -> None:
        self._inbox.append(update)
        self._wake.set()


News = list[tuple[Ticket, Update | ApiError]]


class EngineWorker:
    """The thread, and the one way to it. `on_failure(engine)` is told, in the thread, of an engine that broke."""

    def __init__(self, on_failure: Callable[[Engine], None] = lambda engine: None) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets: dict[Engine, dict[Sequence, Ticket]] = {}
        self._news: News = []
        self._gone: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._on_failure, self._stopping = on_failure, False
        self._thread = threading.Thread(target=self._run, name="tael-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        engine: Engine,
        prompt: list[int],
        params: SamplingParams,
        *,
        salt: Hashable = None,
        text: bool = True,
        begins: Opening | None = None,
    ) -> Ticket:
        """Hand a request over, as to `Engine.submit`; call it on the event loop that is to hear of it."""
        ticket = Ticket(self, engine, prompt, params, salt, text, begins, asyncio.get_running_loop())
        self._orders.put(lambda: self._admit(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        self._orders.put(lambda: self._cancel(ticket))

    def finish(self, ticket: Ticket) -> None:
        self._orders.put(lambda: self._finish(ticket))

    def forget(self, engine: Engine) -> None:
        """End what runs on `engine`, which is about to go; its requests fail with 503."""
        self._orders.put(lambda: self._let_go(engine))

    def close(self) -> None:
        """Stop the thread after the running step; what still runs gets a 503."""
        self._orders.put(self._stop)
        self._thread.join(timeout=60)

    @property
    def running(self) -> int:
        """Requests with the engines."""
        return sum(len(tickets) for tickets in self._tickets.values())

    # ------------------------------------------------------------ in the thread

    def _run(self) -> None:
        while not self._stopping:
            idle = not self._tickets
            self._carry_out(wait=idle)
            self._hand_over()
            for engine in list(self._tickets):
                self._step(engine)
            self._hand_over()

    def _carry_out(self, wait: bool) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._orders.get(block=wait)()
                wait = False

    def _let_go(self, engine: Engine) -> None:
        self._gone.add(engine)
        self._fail(engine, _gone())

    def _admit(self, ticket: Ticket) -> None:
        if ticket.engine in self._gone:
            self._news.append((ticket, _gone()))
            return
        try:
            sequence = ticket.engine.submit(
                ticket.prompt, ticket.params, salt=ticket.salt, text=ticket.text, begins=ticket.begins
            )
        except TaelError as error:
            self._news.append((ticket, ApiError(400, str(error))))
        except Exception as error:
            self._news.append((ticket, ApiError(500, f"the engine refused the request: {type(error).__name__}")))
        else:
            ticket.sequence = sequence
            self._news.append((ticket, Update()))  # it is accepted
            self._tickets.setdefault(ticket.engine, {})[sequence] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.sequence is not None:
            ticket.engine.cancel(ticket.sequence)
            self._drop(ticket)

    def _finish(self, ticket: Ticket) -> None:
        sequence = ticket.sequence
        if sequence is not None and sequence.state != "finished":
            self._cancel(ticket)
            self._news.append((ticket, Update((TokenEvent(-1, "", 0.0, "cancelled", sequence),))))

    def _drop(self, ticket: Ticket) -> None:
        tickets = self._tickets.get(ticket.engine, {})
        if ticket.sequence is not None:
            tickets.pop(ticket.sequence, None)
        if not tickets:
            self._tickets.pop(ticket.engine, None)

    def _step(self, engine: Engine) -> None:
        try:
            events = engine.step()
        except Exception as error:  # the engine's state is unknown: nobody may go on with it
            message = f"the engine failed ({type(error).__name__}); the model is loaded anew, send the request again"
            self._fail(engine, ApiError(500, message))
            self._gone.add(engine)
            self._on_failure(engine)
            return
        tickets, found = self._tickets.get(engine, {}), {}
        for event in events:
            if event.sequence in tickets:
                found.setdefault(tickets[event.sequence], []).append(event)
        for ticket, news in found.items():
            if news[-1].finish_reason == "error" and ticket.sequence is not None:
                self._news.append((ticket, ApiError(500, ticket.sequence.error or "the engine failed")))
            else:
                self._news.append((ticket, Update(tuple(news))))
            if news[-1].finish_reason is not None:
                self._drop(ticket)
        self._tell_progress(engine)

    def _tell_progress(self, engine: Engine) -> None:
        """To those that have no token yet, where something changed."""
        waiting = {sequence: place for place, sequence in enumerate(engine.pool.scheduler.waiting)}
        for sequence, ticket in self._tickets.get(engine, {}).items():
            state = waiting.get(sequence, 0), min(sequence.computed, sequence.prompt_length)
            if not sequence.generated and state != ticket._told:
                ticket._told = state
                self._news.append((ticket, Update((), *state)))

    def _fail(self, engine: Engine, error: ApiError) -> None:
        for ticket in self._tickets.pop(engine, {}).values():
            with contextlib.suppress(Exception):
                engine.cancel(ticket.sequence)  # type: ignore[arg-type]
            self._news.append((ticket, error))

    def _stop(self) -> None:
        self._stopping = True
        for engine in list(self._tickets):
            self._fail(engine, ApiError(503, "the server is stopping", retry_after=10))

    def _hand_over(self) -> None:
        """Deliver the news: one call a loop, whatever the number of requests."""
        news, self._news = self._news, []
        for loop in {ticket.loop for ticket, _ in news}:
            mine = [(ticket, update) for ticket, update in news if ticket.loop is loop]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_deliver, mine)


def _deliver(news: News) -> None:
    for ticket, update in news:
        ticket._receive(update)
