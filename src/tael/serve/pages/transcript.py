"""The messages on a page, and an answer in them as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup
from nicegui.element import Element

from tael.serve.pages.answering import Running
from tael.serve.pages.figures import duration, number, speed, thought_line
from tael.serve.pages.markdown import Growing
from tael.serve.pages.turns import calls

HEAVY = 3000
"""Characters of a block that grows, from which on it is shown less often."""


class Transcript(Element, component="static/transcript.js"):
    """The list of messages; `on_act` gets what someone pressed: {"act": .., "node": .., "arg": .., "text": ..}."""

    def __init__(self, on_act: Callable[[dict[str, Any]], Any]):
        super().__init__()
        self.props["label"] = "Conversation"
        self._keys: list[str] = []
        self.on("act", lambda event: on_act(event.args))

    def begin(self, keys: Sequence[str], items: Sequence[str]) -> None:
        """What the page is delivered with."""
        self._keys = list(keys)
        self.props["items"] = list(items)

    def show(self, keys: Sequence[str], item: Callable[[int], str]) -> None:
        """Show these messages; those whose keys are as before, from the first on, are left alone."""
        keep = 0
        while keep < min(len(keys), len(self._keys)) and keys[keep] == self._keys[keep]:
            keep += 1
        if keep < len(self._keys) or keep < len(keys):
            self.run_method("splice", keep, [item(i) for i in range(keep, len(keys))])
        self._keys = list(keys)

    def adopt(self, old: str, new: str) -> None:
        """Take it that the message `old` is shown as `new` says: an answer that ended looks as if read from the
        history."""
        self._keys = [new if key == old else key for key in self._keys]

    def patch(self, node: int, operations: dict[str, Any]) -> None:
        """Change parts of one message, see transcript.js."""
        self.run_method("patch", node, operations)

    def say(self, words: str) -> None:
        """For screen readers."""
        self.run_method("say", words)


@dataclass
class Live:
    """What a page has shown of an answer that runs."""

    running: Running
    thought: Growing = field(default_factory=Growing)
    said: Growing = field(default_factory=Growing)
    seen: int = -1
    shown: tuple[int, int, int] = (0, 0, 0)
    """Characters of thought and answer, and tool calls' characters."""
    opened: bool = False
    folded: bool = False
    due: float = 0.0

    def operations(self) -> dict[str, Any] | None:
        """What to change on the page; None where there is nothing new, or it is too soon for a heavy change."""
        running, now = self.running, time.monotonic()
        ended = running.state != "running"
        if running.version == self.seen or (now < self.due and not ended):
            return None
        self.seen = running.version
        operations: dict[str, Any] = {"html": {}, "blocks": {}, "open": {}}
        self._thought(operations)
        self._said(operations)
        operations["html"]["status"] = "" if ended else status(running)
        operations["done"] = ended
        heaviest = max((len(block) for _, new in operations["blocks"].values() for block in new), default=0)
        self.due = now + min(0.5, 0.08 * heaviest / HEAVY)
        return operations

    def _thought(self, operations: dict[str, Any]) -> None:
        running = self.running
        if not running.reasoning:
            return
        if len(running.reasoning) > self.shown[0]:
            operations["blocks"]["thought"] = self.thought.extend(running.reasoning)
            self.shown = (len(running.reasoning), *self.shown[1:])
        if not self.opened:
            operations["show"] = ["thoughts"]
            operations["open"]["thoughts"], self.opened = True, True
        thinking = running.phase == "thinking"
        if not thinking and not self.folded and (running.content or running.tool_calls or running.state != "running"):
            operations["open"]["thoughts"], self.folded = False, True
        usage = (running.usage or {}).get("completion_tokens_details") or {}
        tokens = running.figures.get("reasoning_tokens") or usage.get("reasoning_tokens") or running.thought_pieces
        seconds = running.figures.get("thought_seconds", running.thought_seconds)
        operations["html"]["thought-line"] = (
            f"Thinking… {number(tokens)} tokens" if thinking else thought_line(seconds, tokens)
        )

    def _said(self, operations: dict[str, Any]) -> None:
        running = self.running
        if len(running.content) > self.shown[1]:
            operations["blocks"]["said"] = self.said.extend(running.content)
        size = sum(len(str(call)) for call in running.tool_calls)
        if size > self.shown[2]:
            operations["html"]["calls"] = calls(running.tool_calls, (), whole=False)
        self.shown = (self.shown[0], len(running.content), size)


def status(running: Running) -> str:
    """What an answer is doing, in words."""
    if running.phase == "waiting":
        words = f"waiting, {running.ahead} ahead" if running.ahead else running.note
        return str(Markup("<span>{}</span>").format(words))
    if running.phase == "reading":
        line = f"reading {number(running.computed)} of {number(running.prompt_tokens)} tokens"
        bar = Markup('<progress max="{}" value="{}" aria-label="Prompt read"></progress>').format(
            max(1, running.prompt_tokens), running.computed
        )
        return str(Markup("<span>{}</span>{}").format(line, bar))
    parts = [f"{number(running.pieces)} tokens", speed(running.tokens_per_second)]
    if running.first is not None and running.latest is not None:
        parts.append(duration(running.latest - running.started))
    return str(Markup("<span>{}</span>").format(" · ".join(part for part in parts if part)))
