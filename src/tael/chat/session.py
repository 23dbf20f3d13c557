"""The talk itself: lines in, from the keyboard with history and editing or from a pipe, answers and remarks out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tael.chat.commands import command
from tael.chat.conversation import Conversation
from tael.chat.screen import Screen
from tael.data import cache_dir
from tael.errors import TaelError

MOST_LINES = 1000


def history_file() -> Path:
    """Where the lines typed in a terminal are kept from one talk to the next, for the user alone to read."""
    return cache_dir() / "chat-history"


def talk(conversation: Conversation, screen: Screen, greeting: str) -> None:
    """Answer lines from standard input until it ends or `/exit`; a wrong command is remarked upon, and on it goes.

    In a terminal there is a prompt, line editing and history, and an error ends only the answer. Through a pipe it
    ends the talk: raises TaelError.
    """
    interactive = sys.stdin.isatty() and screen.out.is_terminal
    if interactive:
        screen.remark(greeting)
    with _history() if interactive else contextlib.nullcontext():
        for line in joined(_typed() if interactive else sys.stdin):
            if line == "/exit":
                return
            try:
                _answer(conversation, screen, line)
            except TaelError as error:
                if not interactive:
                    raise
                screen.remark(str(error), "red")


def _answer(conversation: Conversation, screen: Screen, line: str) -> None:
    if line == "/retry":
        screen.show(conversation, conversation.ask(conversation.undo()))
    elif line.startswith("/"):
        screen.remark(command(conversation, line))
    elif line:
        screen.show(conversation, conversation.ask(line))


def joined(lines: Iterable[str]) -> Iterator[str]:
    """Messages: lines, where one that ends in a backslash goes on in the next."""
    parts: list[str] = []
    for line in lines:
        line = line.rstrip("\r\n")
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts).strip()
            parts = []
    if parts:
        yield "\n".join(parts).strip()


def _typed() -> Iterator[str]:
    """Lines typed at the prompt; Ctrl-D and Ctrl-C end them."""
    goes_on = False
    while True:
        try:
            line = input("… " if goes_on else "> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        goes_on = line.endswith("\\")
        yield line


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing, and the lines of earlier talks; they are written at the end, whatever ends it."""
    try:
        import readline  # gives input() line editing and history
    except ImportError:
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(MOST_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a talk must not fail for it
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
            path.chmod(0o600)
