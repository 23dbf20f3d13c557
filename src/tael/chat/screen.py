"""Where a talk is shown: answers as they come, thoughts dim while they come and then folded into one line."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Generator

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from tael.chat.conversation import Conversation, Piece
from tael.chat.reply import duration


def printable(text: str) -> str:
    """`text` without control characters: a model's words must not move the cursor or recolour the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class Screen:
    """Answers go to `out`; remarks to `notes`, which is stderr when `out` is no terminal."""

    def __init__(self, out: Console, notes: Console) -> None:
        self.out, self.notes = out, notes

    def remark(self, text: str, style: str = "dim") -> None:
        self.notes.print(Text(printable(text), style=style), highlight=False, soft_wrap=not self.notes.is_terminal)

    def show(self, conversation: Conversation, pieces: Generator[Piece]) -> None:
        """Print an answer as it comes, and a line about it. Ctrl-C ends the answer, not the talk, in a terminal."""
        stopped = answered = False
        wrap = Wrap(self.out) if self.out.is_terminal else str
        with _Thoughts(self.out) as thoughts, contextlib.closing(pieces):
            try:
                for piece in pieces:
                    text = printable(piece.text)
                    if piece.kind == "thought":
                        thoughts.add(text)
                    elif piece.kind == "folded":
                        thoughts.fold()
                        self.remark(_thought(conversation))
                    else:
                        # Many models begin with an empty line.
                        text = text if answered or not self.out.is_terminal else text.lstrip("\n")
                        answered = answered or bool(text)
                        if answered:
                            thoughts.close()
                            self._write(wrap(text))
            except KeyboardInterrupt:
                if not self.out.is_terminal:
                    raise
                stopped = True
        if answered or not thoughts.open:
            self._write("\n")
        if thoughts.open:
            why = "stopped" if stopped else "and never came to an answer; /budget N ends thoughts in time"
            self.remark(f"{_thought(conversation)}, {why}")
        self.remark(conversation.reply.line(conversation.dollars_per_hour) + ("; stopped" if stopped else ""))
        if conversation.forgotten:
            self.remark(f"the context is full: the first {conversation.forgotten} messages were left out")

    def _write(self, text: str) -> None:
        self.out.file.write(text)
        self.out.file.flush()


class Wrap:
    """Breaks lines between words where a terminal would break them anywhere; every letter is shown at once.

    A word that comes to the edge is taken off the line again and begun anew on the next.
    """

    def __init__(self, out: Console) -> None:
        self._out, self._column, self._word = out, 0, ""

    def __call__(self, text: str) -> str:
        """What to write for the next piece of the text."""
        return "".join(map(self._place, text))

    def _place(self, letter: str) -> str:
        if letter == "\n":
            self._column, self._word = 0, ""
            return letter
        cells, width = cell_len(letter), self._out.width
        if letter == "\t":
            letter, cells = " " * (4 - self._column % 4), 4 - self._column % 4
        if letter.isspace():
            self._word = ""
            if self._column + cells >= width:  # the edge itself stays free: some terminals break there already
                self._column = 0
                return "\n"
            self._column += cells
            return letter
        wide = cells > 1  # between such letters a line may be broken
        if wide:
            self._word = ""
        if self._column + cells < width:
            self._column, self._word = self._column + cells, "" if wide else self._word + letter
            return letter
        if wide:
            self._column = cells
            return f"\n{letter}"
        moved, self._word = self._word, self._word + letter
        taken = cell_len(moved)
        if taken == self._column:  # longer than a line, or nothing before it: broken here
            self._column, self._word = cells, letter
            return f"\n{letter}"
        self._column = taken + cells
        return f"\x1b[{taken}D\x1b[K\n{moved}{letter}" if moved else f"\n{letter}"


class _Thoughts:
    """The lower part of a terminal until the answer begins: a sign that the model reads, then its thoughts' end."""

    def __init__(self, out: Console) -> None:
        self._out, self._text = out, ""
        self._live: Live | None = None
        self.open = False
        """Thoughts came, and were not folded."""

    def __enter__(self) -> _Thoughts:
        if self._out.is_terminal:
            self._live = Live(Spinner("dots", style="dim"), console=self._out, transient=True, refresh_per_second=12)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, text: str) -> None:
        self.open, self._text = True, self._text + text
        if self._live is not None:
            self._live.update(self._last_lines())

    def fold(self) -> None:
        self.open = False
        self.close()

    def close(self) -> None:
        """Take it off the screen; no matter if that has been done."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _last_lines(self) -> Text:
        """The end of a long thought: as much as half the screen shows."""
        self._text = self._text[-20_000:]
        lines = Text(self._text, style="dim italic").wrap(self._out, self._out.width)
        return Text("\n").join(lines[-max(3, self._out.height // 2) :])


def _thought(conversation: Conversation) -> str:
    reply = conversation.reply
    return f"thought for {duration(reply.thought_seconds)}, {reply.thought_tokens} tokens"
