"""What begins with a slash: settings, the history of the talk, files, figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tael.chat.conversation import Conversation
from tael.chat.reply import duration, money, rounded
from tael.cost.prices import dollars
from tael.data import Mode
from tael.engine.constrain import Constraint
from tael.errors import TaelError, did_you_mean

THINK_WORDS: dict[str, Mode] = {"on": "think", "off": "direct", "auto": "free"}
COMMANDS = {
    "/help": "this list",
    "/think on|off|auto": "always think, never, or as the model likes",
    "/budget N|off": "at most N tokens of thought",
    "/temperature X": "0 always takes the likeliest word; 1 draws as the model would",
    "/seed N": "the next answer's random numbers",
    "/system TEXT": "what the model is to be told before the conversation; without TEXT: nothing",
    "/json on|off": "answers are JSON objects",
    "/retry": "drop the last answer and draw another",
    "/undo": "take the last question and its answer back",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "go on with a conversation that was saved",
    "/stats": "tokens, time and money so far",
    "/reset": "forget the conversation",
    "/exit": "leave (as Ctrl-D does)",
}


def command(talk: Conversation, line: str) -> str:
    """Carry out a `/command` and say what is so now; raises TaelError for one there is not.

    `/exit` and `/retry` are for whoever reads the lines and shows the answers.
    """
    name, _, value = line.partition(" ")
    if name not in _DOES:
        known = [each.split()[0] for each in COMMANDS]
        raise TaelError(f"unknown command {name}{did_you_mean(name, known)}")
    return _DOES[name](talk, value.strip())


def _help(talk: Conversation, value: str) -> str:
    lines = [f"{name:20} {meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join([*lines, "A line that ends in \\ goes on in the next one. Ctrl-C ends an answer."])


def _think(talk: Conversation, value: str) -> str:
    if value not in THINK_WORDS:
        raise TaelError("/think takes on, off or auto")
    talk.mode = THINK_WORDS[value]
    return f"thinking: {value}"


def _budget(talk: Conversation, value: str) -> str:
    if value == "off":
        talk.params = replace(talk.params, thinking_budget=None)
        return "no thinking budget"
    talk.params = replace(talk.params, thinking_budget=_whole("/budget", value, "a number of tokens, or off"))
    return f"thinking budget: {talk.params.thinking_budget} tokens"


def _temperature(talk: Conversation, value: str) -> str:
    try:
        talk.params = replace(talk.params, temperature=float(value))
    except ValueError:
        raise TaelError("/temperature takes a number, as in /temperature 0.7") from None
    return f"temperature: {talk.params.temperature:g}"


def _seed(talk: Conversation, value: str) -> str:
    talk.params = replace(talk.params, seed=_whole("/seed", value, "a whole number"))
    return f"seed: {talk.params.seed}"


def _system(talk: Conversation, value: str) -> str:
    talk.system = value
    return "system text set" if value else "no system text"


def _json(talk: Conversation, value: str) -> str:
    if value not in ("on", "off"):
        raise TaelError("/json takes on or off")
    talk.params = replace(talk.params, constraint=Constraint.json_object() if value == "on" else None)
    return f"JSON: {value}"


def _undo(talk: Conversation, value: str) -> str:
    return f"took back: {_short(talk.undo())}"


def _save(talk: Conversation, value: str) -> str:
    if not value:
        raise TaelError("/save takes the name of a file, as in /save talk.json")
    path = Path(value).expanduser()
    try:
        talk.save(path)
    except OSError as error:
        raise TaelError(f"{path}: {error.strerror or error}") from None
    return f"saved {_count(talk)} to {path}"


def _load(talk: Conversation, value: str) -> str:
    if not value:
        raise TaelError("/load takes the name of a file that /save wrote")
    path = Path(value).expanduser()
    talk.load(path)
    last = f"; the last question was: {_short(talk.messages[-2].content)}" if talk.messages else ""
    return f"loaded {_count(talk)} from {path}{last}"


def _stats(talk: Conversation, value: str) -> str:
    total = talk.totals
    if not total.answers:
        return "nothing has been answered yet"
    lines = [
        f"{total.answers} answer{'s' * (total.answers != 1)}, {total.tokens:,} tokens in {duration(total.seconds)} "
        f"({rounded(total.tokens / max(total.seconds, 1e-9))} tok/s over all), "
        f"{money(dollars(total.seconds, talk.dollars_per_hour))} at ${talk.dollars_per_hour:g} an hour",
        f"{total.prompt:,} prompt tokens, {total.cached:,} of them from the cache",
    ]
    if total.drafted:
        lines.append(f"{total.accepted:,} of {total.drafted:,} drafts kept ({total.accepted / total.drafted:.0%})")
    used = talk.reply.prompt + talk.reply.tokens
    lines.append(f"context: {used:,} of {talk.limit:,} tokens after the last answer")
    return "\n".join(lines)


def _reset(talk: Conversation, value: str) -> str:
    talk.messages.clear()
    return "forgot the conversation"


def _whole(name: str, value: str, wanted: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise TaelError(f"{name} takes {wanted}, as in {name} 100") from None


def _count(talk: Conversation) -> str:
    number = len(talk.messages) // 2
    return f"{number} question{'s' * (number != 1)} and answer{'s' * (number != 1)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


_DOES: dict[str, Callable[[Conversation, str], str]] = {
    "/help": _help,
    "/think": _think,
    "/budget": _budget,
    "/temperature": _temperature,
    "/seed": _seed,
    "/system": _system,
    "/json": _json,
    "/undo": _undo,
    "/save": _save,
    "/load": _load,
    "/stats": _stats,
    "/reset": _reset,
}
