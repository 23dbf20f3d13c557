"""Conversations as JSON, out and in: whole trees, in a format with a version.

    {"format": "tael.conversations", "version": 1, "conversations": [
      {"title": .., "folder": .., "model": .., "system": .., "settings": {..}, "created": .., "updated": ..,
       "leaf": 1, "messages": [{"parent": null, "role": "user", "content": .., ..}, {"parent": 0, ..}]}]}

`parent` and `leaf` count messages from 0. What is read in is hostile: nothing of it is taken that is not checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tael.errors import TaelError
from tael.serve.history import foreign
from tael.serve.history.tree import Head, Node, Role, State, Tree

MAX_BYTES = 50_000_000
FORMAT = "tael.conversations"
VERSION = 1
LARGEST = 1e15
NUMBERS = {
    "tokens", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "context_tokens", "cost",
    "seconds", "first_token_seconds", "thought_seconds", "tokens_per_second",
}  # fmt: skip
"""Figures of an answer that pages show; there may be others."""


def utc(value: str) -> str:
    """An ISO 8601 time as the history writes it; without a zone it is taken as UTC. Raises ValueError."""
    try:
        moment = datetime.fromisoformat(value)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{value[:40]!r} is no time") from None
    return moment.isoformat(timespec="microseconds")


def _sound_calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a page reads of tool calls is text."""
    for call in calls:
        function = call.get("function", {})
        texts = [call.get("id", "")]
        texts += [function.get(name, "") for name in ("name", "arguments")] if isinstance(function, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a tool call's id, function name or arguments are no text")
    return calls


def _sound_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """What a page counts with are numbers, and such as can be."""
    for name in NUMBERS & figures.keys():
        value = figures[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
            raise ValueError(f"the figure {name} is no number that can be")
    return figures


Time = Annotated[str, AfterValidator(utc)]
Calls = Annotated[list[dict[str, Any]], AfterValidator(_sound_calls)]
Figures = Annotated[dict[str, Any], AfterValidator(_sound_figures)]


class Message(BaseModel):
    """A message in a file, but for its place and its texts."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Role
    model: str = ""
    created: Time
    state: State = "done"
    tool_calls: Calls = []
    figures: Figures = {}
    error: str | None = None


class _Placed(Message):
    parent: Annotated[int, Field(ge=0)] | None
    content: str
    reasoning: str | None = None


class Settings(BaseModel):
    """A conversation in a file, but for its messages."""

    model_config = ConfigDict(strict=True, extra="forbid")

    title: str
    folder: str = ""
    model: str = ""
    system: str = ""
    settings: dict[str, Any] = {}
    created: Time
    updated: Time


class _Conversation(Settings):
    leaf: Annotated[int, Field(ge=0)] | None
    messages: list[_Placed]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal["tael.conversations"]
    version: Literal[1]
    conversations: list[_Conversation]


def to_json(heads: Iterable[Head], nodes: Iterable[Node]) -> str:
    """Conversations with all their branches; `nodes` are those of all of `heads`."""
    of: dict[int, list[Node]] = {}
    for node in sorted(nodes, key=lambda node: node.id):
        of.setdefault(node.conversation, []).append(node)
    conversations = [_conversation(head, of.get(head.id, [])) for head in heads]
    value = {"format": FORMAT, "version": VERSION, "conversations": conversations}
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _conversation(head: Head, nodes: list[Node]) -> dict[str, Any]:
    place = {node.id: i for i, node in enumerate(nodes)}
    return settings_of(head) | {
        "leaf": None if head.leaf is None else place[head.leaf],
        "messages": [
            {"parent": None if node.parent is None else place[node.parent]}
            | message_of(node)
            | {"content": node.content, "reasoning": node.reasoning}
            for node in nodes
        ],
    }


def settings_of(head: Head) -> dict[str, Any]:
    return {name: getattr(head, name) for name in Settings.model_fields}


def message_of(node: Node) -> dict[str, Any]:
    state = "interrupted" if node.state == "running" else node.state  # it does not run where it is read
    return {name: getattr(node, name) for name in Message.model_fields} | {"state": state}


def from_json(text: str | bytes) -> list[Tree]:
    """Conversations for `History.insert`: of `to_json`, or an export of ChatGPT or DeepSeek, or `{"messages": [..]}`
    as OpenAI writes them (one such or a list).

    Raises TaelError for anything else and for over 50 MB.
    """
    value = parsed(text)
    if not (isinstance(value, dict) and "format" in value):
        try:
            return foreign.read(value)
        except (ValueError, RecursionError) as error:
            refuse(error)
    try:
        file = _File.model_validate(value)
        return [_tree(conversation) for conversation in file.conversations]
    except (ValidationError, ValueError) as error:
        refuse(error)


def parsed(text: str | bytes) -> Any:
    """The JSON value of a text from outside."""
    text = decoded(text)
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        refuse(error)


def decoded(text: str | bytes) -> str:
    """`text`, unless it is too much or not UTF-8."""
    if len(text) > MAX_BYTES:
        raise TaelError(f"the file has over {MAX_BYTES // 1_000_000} MB, more than is read in")
    try:
        return text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise TaelError("the file is no text in UTF-8") from None


def refuse(error: Exception) -> NoReturn:
    """What is wrong with a file, as one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    elif isinstance(error, RecursionError):
        why = "lists and objects too deep within one another"
    else:
        why = str(error)
    raise TaelError(f"these are no conversations that Tael reads: {' '.join(why.split())[:200]}") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _tree(conversation: _Conversation) -> Tree:
    messages = conversation.messages
    for i, message in enumerate(messages):
        if message.parent is not None and message.parent >= i:
            raise ValueError(f"message {i} comes before its parent, {message.parent}")
    if conversation.leaf is not None and conversation.leaf >= len(messages):
        raise ValueError(f"the leaf {conversation.leaf} is no message")
    settings = {name: getattr(conversation, name) for name in Settings.model_fields}
    nodes = [Node(id=i, conversation=0, **dict(message)) for i, message in enumerate(messages)]
    return Tree(Head(id=0, owner="", leaf=conversation.leaf, **settings), nodes)
