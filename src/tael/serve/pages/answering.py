"""Answers that run by themselves: a page starts one and follows it; closing the page stops nothing.

    running = answering.start(caller, conversation, body, parent)      a node in the history, state "running"
    running.content, running.phase, running.version ..                 what there is so far, for any number of pages
    answering.stop(running.node)                                       keeps what was said

Text goes into the history a few times a second and at the end, so a crash loses little; the server's own end leaves
the answer as "interrupted". Everything here runs on the event loop, only the writing of pieces in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tael.errors import TaelError
from tael.serve.caller import Caller
from tael.serve.errors import ApiError
from tael.serve.pages.figures import add_figures, figures_of

WRITE_SECONDS = 0.35
Phase = Literal["waiting", "reading", "thinking", "answering", "ended"]


class ChatService(Protocol):
    """What pages need of `tael.serve.service.Service`."""

    def models(self) -> list[Any]: ...

    def chat(self, body: dict[str, Any], caller: Caller, progress: bool = False) -> AsyncIterator[dict[str, Any]]: ...


@dataclass
class Running:
    """One answer as far as it has come; `version` grows with every change."""

    node: int
    conversation: int
    owner: str
    started: float
    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    phase: Phase = "waiting"
    note: str = "starting"
    """What it waits for, as far as the page that asked knows."""
    state: str = "running"
    error: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    ahead: int = 0
    """Requests before this one."""
    prompt_tokens: int = 0
    computed: int = 0
    """Tokens of the prompt that are read."""
    pieces: int = 0
    """Pieces of text so far: as good as tokens until `usage` says how many there were."""
    thought_pieces: int = 0
    first: float | None = None
    """When the first piece came."""
    latest: float | None = None
    thought_began: float | None = None
    thought_ended: float | None = None
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None
    version: int = 0

    @property
    def thought_seconds(self) -> float | None:
        """How long it thought, or has been thinking until the latest piece."""
        if self.thought_began is None:
            return None
        return (self.thought_ended or self.latest or self.thought_began) - self.thought_began

    @property
    def tokens_per_second(self) -> float | None:
        """Between the first and the latest piece."""
        if self.first is None or self.latest is None or self.pieces < 2 or self.latest <= self.first:
            return None
        return (self.pieces - 1) / (self.latest - self.first)

    def take(self, chunk: dict[str, Any], now: float) -> None:
        """Add one thing that the service sent."""
        self.version += 1
        if chunk.get("object") == "tael.progress":
            self.ahead = chunk.get("ahead") or 0
            self.prompt_tokens, self.computed = chunk.get("prompt_tokens") or 0, chunk.get("computed") or 0
            if self.phase in ("waiting", "reading"):
                self.phase = "waiting" if self.ahead else "reading"
            return
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if delta.get("reasoning_content"):
                self._thought(delta["reasoning_content"], now)
            if delta.get("content"):
                self._said(now)
                self.content += delta["content"]
            for call in delta.get("tool_calls") or ():
                self._said(now)
                self._called(call)

    def _thought(self, text: str, now: float) -> None:
        self._piece(now)
        self.thought_pieces += 1
        self.phase = "thinking"
        self.thought_began = now if self.thought_began is None else self.thought_began
        self.reasoning += text

    def _said(self, now: float) -> None:
        self._piece(now)
        self.phase = "answering"
        if self.thought_began is not None and self.thought_ended is None:
            self.thought_ended = now

    def _piece(self, now: float) -> None:
        self.pieces += 1
        self.first = now if self.first is None else self.first
        self.latest = now

    def _called(self, part: dict[str, Any]) -> None:
        """Join the parts of a tool call; they name their place."""
        place = part.get("index", len(self.tool_calls))
        while len(self.tool_calls) <= min(place, 255):
            self.tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = self.tool_calls[min(place, 255)], part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["function"]["name"] = function.get("name") or call["function"]["name"]
        call["function"]["arguments"] += function.get("arguments") or ""


class Answering:
    """Every answer that is running now."""

    def __init__(self, service: ChatService, history: Any, clock: Callable[[], float] = time.monotonic):
        self._service = service
        self._history = history
        self._clock = clock
        self._running: dict[int, Running] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ends: dict[int, str] = {}  # how a cancelled answer is to be called
        self._changes: dict[int, int] = {}

    def start(
        self, caller: Caller, conversation: int, body: dict[str, Any], parent: int, onto: Any | None = None
    ) -> Running:
        """Begin an answer to the node `parent`, or go on with the answer `onto` (a Node). Needs a running event loop.

        Raises TaelError when the history cannot be written.
        """
        if onto is None:
            model = str(body.get("model", ""))
            node = self._history.add(caller.owner, conversation, parent, "assistant", model=model, state="running")
        else:
            node = onto
            self._history.update(caller.owner, node.id, state="running", error="")
        running = Running(node.id, conversation, caller.owner, self._clock(), node.content, node.reasoning or "")
        running.tool_calls = [dict(call) for call in node.tool_calls]
        self._running[node.id] = running
        self.changed(conversation)
        before = dict(node.figures or {})
        task = asyncio.get_running_loop().create_task(self._answer(running, caller, body))
        task.add_done_callback(lambda task: self._ended(running, task, before))
        self._tasks[node.id] = task
        return running

    def find(self, node: int) -> Running | None:
        """The answer in this node, while it runs."""
        return self._running.get(node)

    def of(self, conversation: int) -> list[Running]:
        """What runs in a conversation."""
        return [running for running in self._running.values() if running.conversation == conversation]

    def stop(self, node: int) -> None:
        """End an answer; what was said stays. Nothing happens when it has ended."""
        self._cancel(node, "stopped")

    def changes(self, conversation: int) -> int:
        """Grows whenever someone adds to this conversation or an answer in it ends: pages then read it again."""
        return self._changes.get(conversation, 0)

    def changed(self, conversation: int) -> None:
        """Tell the other pages that this conversation is not as it was."""
        self._changes[conversation] = self.changes(conversation) + 1

    async def close(self) -> None:
        """The server ends: every answer is kept as far as it came, as "interrupted"."""
        tasks = list(self._tasks.values())
        for node in list(self._tasks):
            self._cancel(node, "interrupted")
        await asyncio.gather(*tasks, return_exceptions=True)
        while self._running:  # their ends are written by callbacks that come next
            await asyncio.sleep(0)

    def _cancel(self, node: int, state: str) -> None:
        task = self._tasks.get(node)
        if task is not None and not task.done() and node not in self._ends:
            self._ends[node] = state
            task.cancel()

    def _ended(self, running: Running, task: asyncio.Task[None], before: dict[str, Any]) -> None:
        """Called by the event loop: also for a task that was cancelled before its first step."""
        if task.cancelled():
            return self._finish(running, self._ends.get(running.node, "interrupted"), None, before)
        failure = task.exception()
        if failure is None:
            return self._finish(running, "done", None, before)
        if isinstance(failure, ApiError | TaelError):
            return self._finish(running, "error", str(failure), before)
        logging.getLogger(__name__).error("an answer failed", exc_info=failure)
        self._finish(running, "error", "something went wrong inside the server; its log says what", before)

    async def _answer(self, running: Running, caller: Caller, body: dict[str, Any]) -> None:
        written = self._clock()
        stream = self._service.chat(body, caller, progress=True)
        try:
            async for chunk in stream:
                running.take(chunk, self._clock())
                if running.pieces and self._clock() - written >= WRITE_SECONDS:
                    await asyncio.to_thread(
                        self._history.update,
                        running.owner,
                        running.node,
                        content=running.content,
                        reasoning=running.reasoning or None,
                    )
                    written = self._clock()
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()

    def _finish(self, running: Running, state: str, error: str | None, before: dict[str, Any]) -> None:
        """The last write; not in a thread, so that nothing can cancel it."""
        running.figures = add_figures(before, figures_of(running, self._clock()))
        try:
            self._history.update(
                running.owner,
                running.node,
                content=running.content,
                reasoning=running.reasoning or None,
                tool_calls=running.tool_calls,
                state=state,
                figures=running.figures,
                error=error,
            )
        except TaelError as failure:  # the conversation is gone, or the disk is full
            error = error or str(failure)
            state = "error"
        running.state, running.error, running.phase = state, error, "ended"
        running.version += 1
        for table in (self._running, self._tasks, self._ends):
            table.pop(running.node, None)
        self.changed(running.conversation)
