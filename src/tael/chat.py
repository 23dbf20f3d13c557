"""`tael chat`: talk to a model in the terminal, or through a pipe.

`Conversation` knows the history, the settings and how an answer comes apart; `Screen` shows it: thoughts dim while
they come, then folded into one line. `talk` reads lines and commands until there are no more.
"""

from __future__ import annotations

import contextlib
import sys
import time
import unicodedata
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tael.data import Message, Mode, Tokenizer, encode_chat, parse_completion
from tael.engine import Engine, SamplingParams
from tael.errors import TaelError, did_you_mean

THINK_WORDS: dict[str, Mode] = {"on": "think", "off": "direct", "auto": "free"}
COMMANDS = {
    "/help": "this list",
    "/think on|off|auto": "always think, never, or as the model likes",
    "/temperature X": "0 always takes the likeliest word; 1 draws as the model would",
    "/system TEXT": "what the model is to be told before the conversation; without TEXT: nothing",
    "/reset": "forget the conversation",
    "/exit": "leave (as Ctrl-D does)",
}


def printable(text: str) -> str:
    """`text` without control characters: a model's words must not move the cursor or recolour the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


@dataclass(frozen=True)
class Piece:
    """Part of an answer as it comes; `folded` says, with no text, that the thoughts are over."""

    kind: Literal["thought", "folded", "answer"]
    text: str = ""


@dataclass
class Reply:
    """What the last answer took."""

    tokens: int = 0
    thought_tokens: int = 0
    seconds: float = 0.0
    cut: bool = False
    """The answer was ended by the token limit."""

    def __str__(self) -> str:
        rate = f", {self.tokens / self.seconds:.0f} tok/s" if self.seconds else ""
        return f"{self.tokens} tokens{rate}" + (", cut off by the token limit" if self.cut else "")


@dataclass
class Conversation:
    """A talk with one model. `params.seed` moves on by one with every answer."""

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    mode: Mode = "free"
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    """Messages left out of the last prompt because the model's context is full."""
    reply: Reply = field(default_factory=Reply)

    def ask(self, text: str) -> Generator[Piece]:
        """The model's answer to `text`, piece by piece; what came of it stays in the history, even when closed early.

        Raises TaelError when the message alone does not fit the model's context.
        """
        self.messages.append(Message("user", text))
        tokens: list[int] = []
        self.reply, began = Reply(), time.perf_counter()
        try:
            prompt = self._prompt()
            thinking = self.mode == "think" and self.tokenizer.end_think_id is not None
            for event in self.engine.stream(prompt, self.params):
                tokens.append(event.token)
                self.reply.tokens, self.reply.seconds = len(tokens), time.perf_counter() - began
                self.reply.cut = event.finish_reason == "length"
                if event.token == self.tokenizer.think_id and len(tokens) == 1 and self.mode == "free":
                    thinking = True
                elif event.token == self.tokenizer.end_think_id and thinking:
                    thinking = False
                    yield Piece("folded")
                elif event.text:
                    yield Piece("thought" if thinking else "answer", event.text)
                self.reply.thought_tokens += thinking
        finally:
            self.params = replace(self.params, seed=self.params.seed + 1)
            if tokens:
                said = parse_completion(self.tokenizer, tokens, self.mode)
                self.messages.append(Message("assistant", said.answer, said.reasoning))
            else:
                self.messages.pop()

    def _prompt(self) -> list[int]:
        """Ids of the whole talk, its oldest messages left out where it does not fit the context."""
        instructions = [Message("system", self.system)] if self.system else []
        room = self.engine.model.config.max_position_embeddings - self.params.max_tokens
        for start in range(0, len(self.messages), 2):
            prompt = encode_chat(self.tokenizer, instructions + self.messages[start:], self.mode)
            if len(prompt) <= room:
                self.forgotten = start
                return prompt
        raise TaelError(
            f"this message does not fit the model's context of {self.engine.model.config.max_position_embeddings} "
            f"tokens, of which {self.params.max_tokens} are kept for the answer; shorten it or lower --max-tokens"
        )

    def command(self, line: str) -> str:
        """Carry out a `/command` and say what is so now; raises TaelError for one there is not."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/help":
            return "\n".join(f"{command:20} {meaning}" for command, meaning in COMMANDS.items())
        if name == "/reset":
            self.messages.clear()
            return "forgot the conversation"
        if name == "/system":
            self.system = value
            return "system text set" if value else "no system text"
        if name == "/think":
            if value not in THINK_WORDS:
                raise TaelError("/think takes on, off or auto")
            self.mode = THINK_WORDS[value]
            return f"thinking: {value}"
        if name == "/temperature":
            try:
                self.params = replace(self.params, temperature=float(value))
            except ValueError:
                raise TaelError("/temperature takes a number, as in /temperature 0.7") from None
            return f"temperature: {self.params.temperature:g}"
        known = [command.split()[0] for command in COMMANDS]
        raise TaelError(f"unknown command {name}{did_you_mean(name, known)}")


class Screen:
    """Where the talk is shown: answers on `out`; remarks on `notes`, which is stderr when `out` is no terminal."""

    def __init__(self, out: Console, notes: Console) -> None:
        self.out, self.notes = out, notes

    def remark(self, text: str, style: str = "dim") -> None:
        self.notes.print(Text(text, style=style), highlight=False, soft_wrap=True)

    def show(self, conversation: Conversation, pieces: Generator[Piece]) -> None:
        """Print an answer as it comes, and a line about it. Ctrl-C ends the answer, not the talk, in a terminal."""
        thought, fold = "", contextlib.ExitStack()
        live: Live | None = None
        try:
            with contextlib.closing(pieces), fold:
                for piece in pieces:
                    text = printable(piece.text)
                    if piece.kind == "thought" and self.out.is_terminal:
                        thought += text
                        live = live or fold.enter_context(
                            Live(console=self.out, transient=True, refresh_per_second=12)
                        )
                        live.update(self._last_lines(thought))
                    elif piece.kind == "folded":
                        fold.close()
                        self.remark(f"thought for {conversation.reply.thought_tokens} tokens")
                    elif piece.kind == "answer":
                        self._write(text)
        except KeyboardInterrupt:
            if not self.out.is_terminal:
                raise
            self._write(" [stopped]")
        self._write("\n")
        self.remark(str(conversation.reply))
        if conversation.forgotten:
            self.remark(f"the context is full: the first {conversation.forgotten} messages were left out")

    def _write(self, text: str) -> None:
        self.out.file.write(text)
        self.out.file.flush()

    def _last_lines(self, thought: str) -> Text:
        """The end of a long thought: as much as half the screen shows."""
        lines = Text(thought, style="dim italic").wrap(self.out, self.out.width)
        return Text("\n").join(lines[-max(3, self.out.height // 2) :])


def talk(conversation: Conversation, screen: Screen, greeting: str) -> None:
    """Answer lines from standard input until it ends or `/exit`; a wrong command is remarked upon, and on it goes.

    In a terminal there is a prompt, line editing and history, and an error ends only the answer. Through a pipe it
    ends the talk: raises TaelError.
    """
    interactive = sys.stdin.isatty() and screen.out.is_terminal
    if interactive:
        screen.remark(greeting)
    for line in _typed() if interactive else sys.stdin:
        line = line.strip()
        if line == "/exit":
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                screen.remark(conversation.command(line))
            else:
                screen.show(conversation, conversation.ask(line))
        except TaelError as error:
            if not interactive:
                raise
            screen.remark(str(error), "red")


def _typed() -> Iterator[str]:
    """Lines typed at the prompt; Ctrl-D and Ctrl-C end them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and history
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
