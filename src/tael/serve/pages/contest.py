"""One prompt to two models at once, and the judgement which answer was better; `compare` is the page of it.

contest = Contest(service, history, caller)
contest.begin(body of each side, blind=True)       needs a running event loop; both answers stream at once
contest.sides[0].running                           what there is so far of the left answer
await contest.vote("left")                         kept in the history for good
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tael.errors import TaelError
from tael.serve.caller import Caller
from tael.serve.errors import ApiError
from tael.serve.history import History
from tael.serve.pages.answering import ChatService, Running
from tael.serve.pages.figures import figures_of

Choice = Literal["left", "tie", "right"]
Body = dict[str, Any]


@dataclass
class Side:
    """One of the two answers."""

    model: str
    messages: list[dict[str, Any]]
    running: Running

    @property
    def whole(self) -> bool:
        """It came to its end and says something."""
        return self.running.state == "done" and bool(self.running.content.strip())


class Contest:
    """Two answers to one prompt; each `begin` takes the place of the one before."""

    def __init__(
        self,
        service: ChatService,
        history: History,
        caller: Caller,
        draw: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._service, self._history, self._caller = service, history, caller
        self._draw, self._clock = draw or random.SystemRandom(), clock
        self._tasks: list[asyncio.Task[None]] = []
        self.sides: tuple[Side, ...] = ()
        self.blind = False
        self.choice: Choice | None = None

    @property
    def running(self) -> bool:
        return any(side.running.state == "running" for side in self.sides)

    @property
    def votable(self) -> bool:
        """Both answers are whole, and no vote was given."""
        return bool(self.sides) and all(side.whole for side in self.sides) and self.choice is None

    @property
    def hidden(self) -> bool:
        """Nothing may show yet which model is which. Once one has failed there is nothing left to judge."""
        lost = any(side.running.state not in ("running", "done") for side in self.sides)
        return self.blind and self.choice is None and not lost

    def begin(self, first: Body, second: Body, blind: bool) -> None:
        """Send both requests; `blind` draws by lot which stands left."""
        self.stop()
        bodies = [first, second]
        if blind:
            self._draw.shuffle(bodies)
        now = self._clock()
        self.sides = tuple(
            Side(body["model"], body["messages"], Running(0, 0, self._caller.owner, now)) for body in bodies
        )
        self.blind, self.choice = blind, None
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._answer(side.running, body)) for side, body in zip(self.sides, bodies, strict=True)
        ]

    def stop(self) -> None:
        """End both answers; what was said stays."""
        for task in self._tasks:
            task.cancel()

    async def vote(self, choice: Choice) -> None:
        """Keep the judgement. Raises TaelError when there is nothing to judge, or it cannot be written."""
        if not self.votable:
            raise TaelError("a vote needs two whole answers, and is given once")
        self.choice = choice  # before the writing, that a second click finds it
        left, right = self.sides
        chosen, rejected = (right, left) if choice == "right" else (left, right)
        try:
            await asyncio.to_thread(
                self._history.vote,
                self._caller.owner,
                chosen.messages,
                chosen.running.content,
                rejected.running.content,
                chosen.model,
                rejected.model,
                choice == "tie",
                f"{'blind' if self.blind else 'open'}, {choice}",
            )
        except TaelError:
            self.choice = None
            raise

    async def _answer(self, running: Running, body: Body) -> None:
        state, error = "error", None
        try:
            await self._follow(running, body)
            state = "done"
        except asyncio.CancelledError:
            state = "stopped"
        except (ApiError, TaelError) as failure:
            error = str(failure)
        except Exception:
            logging.getLogger(__name__).exception("an answer failed")
            error = "something went wrong inside the server; its log says what"
        finally:
            running.figures = figures_of(running, self._clock())
            running.state, running.error, running.phase = state, error, "ended"
            running.version += 1

    async def _follow(self, running: Running, body: Body) -> None:
        stream = self._service.chat(body, self._caller, progress=True)
        try:
            async for chunk in stream:
                running.take(chunk, self._clock())
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
