"""A talk with one model: its messages, its settings, and answers that come piece by piece."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from tael.chat.reply import Reply
from tael.data import Message, Mode, Tokenizer, encode_chat, parse_completion
from tael.engine import Engine, SamplingParams
from tael.errors import TaelError
from tael.files import write_whole


@dataclass(frozen=True)
class Piece:
    """Part of an answer as it comes; `folded` says, with no text, that the thoughts are over."""

    kind: Literal["thought", "folded", "answer"]
    text: str = ""


@dataclass
class Totals:
    """All answers of a talk, taken-back ones too."""

    answers: int = 0
    tokens: int = 0
    prompt: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0

    def add(self, reply: Reply) -> None:
        self.answers += 1
        for name in ("tokens", "prompt", "cached", "drafted", "accepted", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(reply, name))


@dataclass
class Conversation:
    """One engine serves the whole talk, so that every prompt finds what it begins with in the prefix cache.

    `params.seed` moves on by one with every answer. `context`: tokens of prompt and answer, None: the model's.
    """

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    mode: Mode = "free"
    system: str = ""
    context: int | None = None
    dollars_per_hour: float = 0.0
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    """Messages left out of the last prompt because the context is full."""
    reply: Reply = field(default_factory=Reply)
    totals: Totals = field(default_factory=Totals)

    @property
    def limit(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.context or self.engine.model.config.max_position_embeddings

    def ask(self, text: str) -> Generator[Piece]:
        """The model's answer to `text`, piece by piece; what came of it stays in the history, even when closed early.

        Raises TaelError when the message alone does not fit the context.
        """
        self.messages.append(Message("user", text))
        said = {"thought": "", "answer": ""}
        tokens: list[int] = []
        thought = self.mode == "think"
        self.reply = reply = Reply()
        try:
            thinking = self.mode == "think" and self.tokenizer.end_think_id is not None
            for event in reply.follow(self.engine.stream(self._prompt(), self.params)):
                tokens.append(event.token)
                if event.token == self.tokenizer.think_id and len(tokens) == 1 and self.mode == "free":
                    thinking = thought = True
                elif event.token == self.tokenizer.end_think_id and thinking:
                    thinking = False
                    yield Piece("folded")
                elif event.text:
                    kind = "thought" if thinking else "answer"
                    said[kind] += event.text
                    yield Piece(kind, event.text)
                if thinking:
                    reply.thought_tokens, reply.thought_seconds = reply.thought_tokens + 1, reply.seconds
        finally:
            self.params = replace(self.params, seed=self.params.seed + 1)
            if tokens:
                self.totals.add(reply)
                self.messages.append(self._said(said["answer"], said["thought"] if thought else None, tokens))
            else:
                self.messages.pop()

    def _said(self, answer: str, reasoning: str | None, tokens: list[int]) -> Message:
        """The answer as the history keeps it: as it was shown, so without the stop string that ended it."""
        if self.tokenizer.end_think_id is None:  # thoughts, if any, are marked in plain text
            parsed = parse_completion(self.tokenizer, tokens, self.mode)
            reasoning, answer = parsed.reasoning, answer if parsed.reasoning is None else parsed.answer
        return Message("assistant", answer, reasoning)

    def undo(self) -> str:
        """Take back the last question and its answer; returns the question. Raises TaelError when there is none."""
        if not self.messages:
            raise TaelError("nothing has been said yet")
        question = self.messages[-2].content
        del self.messages[-2:]
        return question

    def _prompt(self) -> list[int]:
        """Ids of the whole talk, its oldest messages left out where it does not fit the context."""
        instructions = [Message("system", self.system)] if self.system else []
        room = self.limit - self.params.max_tokens
        for start in range(0, len(self.messages), 2):
            prompt = encode_chat(self.tokenizer, instructions + self.messages[start:], self.mode)
            if len(prompt) <= room:
                self.forgotten = start
                return prompt
        raise TaelError(
            f"this message does not fit the model's context of {self.limit} tokens, of which "
            f"{self.params.max_tokens} are kept for the answer; shorten it or lower --max-tokens"
        )

    # ------------------------------------------------------------- save and load

    def save(self, path: Path) -> None:
        """Write system text, way of thinking and messages as JSON."""
        value = {"system": self.system, "mode": self.mode, "messages": [asdict(m) for m in self.messages]}
        write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def load(self, path: Path) -> None:
        """Go on with a talk that `save` wrote; raises TaelError, changing nothing, for anything else."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            system, mode = _text(value["system"]), value.get("mode", self.mode)
            messages = [_message(each) for each in value["messages"]]
        except OSError as error:
            raise TaelError(f"{path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TaelError(f"{path}: is no conversation that /save wrote") from None
        if mode not in get_args(Mode) or [m.role for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise TaelError(f"{path}: is no conversation that /save wrote (questions and answers in turn)")
        self.system, self.mode, self.messages, self.forgotten = system, mode, messages, 0


def _message(value: Any) -> Message:
    reasoning = value.get("reasoning")
    return Message(_text(value["role"]), _text(value["content"]), None if reasoning is None else _text(reasoning))  # type: ignore[arg-type]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
