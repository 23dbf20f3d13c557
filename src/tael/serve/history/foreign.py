"""Conversations that other systems exported: ChatGPT's and DeepSeek's files, lists of messages as OpenAI writes them.

Taken are the questions and answers that were shown, with their branches and thoughts, and where they are known
models and times; files and pictures become "[attachment]". ValueError says what a file lacks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tael.serve.history.tree import Head, Node, Role, Tree

ATTACHMENT = "[attachment]"


@dataclass(frozen=True)
class _Shown:
    """What one message of an export shows; a thought alone, its content None, belongs to the answer after it."""

    role: Role
    content: str | None
    reasoning: str = ""
    model: str = ""
    created: str = ""


def read(value: Any) -> list[Tree]:
    """The conversations of a parsed file, one or a list of them."""
    items = value if isinstance(value, list) else [value]
    if items and isinstance(items[0], dict) and "role" in items[0]:
        items = [{"messages": items}]
    if not items:
        raise ValueError("there are none in it")
    return [_conversation(item, i) for i, item in enumerate(items)]


def _conversation(item: Any, place: int) -> Tree:
    try:
        if isinstance(item, dict) and isinstance(item.get("mapping"), dict):
            return _of_mapping(item)
        if isinstance(item, dict) and isinstance(item.get("messages"), list):
            return _of_messages(item)
    except ValueError as error:
        raise ValueError(f"conversation {place}: {error}") from None
    raise ValueError(f'conversation {place} has neither "messages" nor "mapping"')


# ------------------------------------------------------------------ OpenAI's messages


def _of_messages(item: dict[str, Any]) -> Tree:
    system: list[str] = []
    nodes: list[Node] = []
    for i, message in enumerate(item["messages"]):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer"):
            system.append(_content(message.get("content"), i))
        elif role in ("user", "assistant", "tool"):
            nodes.append(_message(message, role, len(nodes), i))
        else:
            raise ValueError(f"message {i} has no role that is known")
    head = Head(
        id=0,
        owner="",
        title=_text(item.get("title")),
        model=_text(item.get("model")),
        system="\n\n".join(system),
        leaf=len(nodes) - 1 if nodes else None,
    )
    return Tree(head, nodes)


def _message(message: dict[str, Any], role: Role, id: int, place: int) -> Node:
    calls = message.get("tool_calls") or []
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"message {place}: its tool_calls are no list of objects")
    if role != "assistant":
        calls = [{"id": _text(message.get("tool_call_id"))}] if role == "tool" else []
    return Node(
        id=id,
        conversation=0,
        parent=id - 1 if id else None,
        role=role,
        content=_content(message.get("content"), place),
        reasoning=_text(message.get("reasoning_content")) or _text(message.get("reasoning")) or None,
        tool_calls=[_call(call) for call in calls] if role == "assistant" else calls,
        model=_text(message.get("model")),
    )


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call; some data sets have its arguments as an object."""
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    arguments = function.get("arguments", "")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    named = {"name": _text(function.get("name")), "arguments": text}
    return {"id": _text(call.get("id")), "type": "function", "function": named}


def _content(content: Any, place: int) -> str:
    """Text, or parts of which some are text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"message {place}: its content is neither text nor a list")
    return "\n\n".join(_part(part) for part in content)


def _part(part: Any) -> str:
    if isinstance(part, dict):
        part = part.get("text")
    return part if isinstance(part, str) else ATTACHMENT


# ----------------------------------------------------------- ChatGPT's and DeepSeek's trees


def _of_mapping(item: dict[str, Any]) -> Tree:
    nodes: list[Node] = []
    kept: dict[str | None, int | None] = {}  # which node an entry, or what it hangs on, became
    thoughts: dict[str | None, list[str]] = {}  # what was thought on the way to an entry and not yet answered
    for key, parent, message in _parents_first(item["mapping"]):
        above, thought = kept.get(parent), thoughts.get(parent, [])
        shown = _shown(message)
        if shown is None or shown.content is None:
            kept[key], thoughts[key] = above, thought
            thought += [shown.reasoning] if shown else []
            continue
        kept[key] = len(nodes)
        reasoning = ""
        if shown.role == "assistant":
            reasoning = "\n\n".join(filter(None, (*thought, shown.reasoning)))
            thought.clear()  # thought once: a file cannot have it repeated without end
        nodes.append(
            Node(len(nodes), 0, above, shown.role, shown.content, reasoning or None, [], shown.model, shown.created)
        )
    leaf = kept.get(item["current_node"]) if isinstance(item.get("current_node"), str) else None
    if leaf is None and nodes:
        leaf = nodes[-1].id
    head = Head(
        id=0,
        owner="",
        title=_text(item.get("title")),
        model=next((node.model for node in reversed(nodes) if node.model), ""),
        created=_time(item.get("create_time", item.get("inserted_at"))),
        updated=_time(item.get("update_time", item.get("updated_at"))),
        leaf=leaf,
    )
    return Tree(head, nodes)


def _parents_first(mapping: dict[str, Any]) -> Iterator[tuple[str, str | None, Any]]:
    """Every entry's key, its parent's key and its message, level by level."""
    below: dict[str | None, list[str]] = {}
    for key, entry in mapping.items():
        if not isinstance(entry, dict):
            raise ValueError(f"the entry {key[:40]!r} is no object")
        parent = entry.get("parent")
        below.setdefault(parent if isinstance(parent, str) and parent in mapping else None, []).append(key)
    parents: list[str | None] = [None]
    reached = 0
    while parents:
        level = [(key, parent) for parent in parents for key in below.get(parent, [])]
        reached += len(level)
        yield from ((key, parent, mapping[key].get("message")) for key, parent in level)
        parents = [key for key, _ in level]
    if reached < len(mapping):
        raise ValueError("some messages are their own ancestors")


def _shown(message: Any) -> _Shown | None:
    """None where nothing was shown: roots, instructions, what a model and its tools said to one another."""
    if not isinstance(message, dict):
        return None
    if isinstance(message.get("fragments"), list):
        return _of_fragments(message)
    author, content = message.get("author"), message.get("content")
    role = author.get("role") if isinstance(author, dict) else None
    metadata = message.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    if role not in ("user", "assistant") or not isinstance(content, dict):
        return None
    if metadata.get("is_visually_hidden_from_conversation") or message.get("recipient", "all") != "all":
        return None
    model, created = _text(metadata.get("model_slug")), _time(message.get("create_time"))
    if content.get("content_type") == "thoughts":
        return _Shown(role, None, _thoughts(content.get("thoughts")))
    if content.get("content_type") not in ("text", "multimodal_text") or not isinstance(content.get("parts"), list):
        return None
    text = "\n\n".join(_part(part) for part in content["parts"])
    return _Shown(role, text, "", model, created) if text else None


def _thoughts(thoughts: Any) -> str:
    parts = [part for part in thoughts if isinstance(part, dict)] if isinstance(thoughts, list) else []
    return "\n\n".join(filter(None, (_text(part.get("content")) or _text(part.get("summary")) for part in parts)))


def _of_fragments(message: dict[str, Any]) -> _Shown | None:
    """DeepSeek's: a question is one REQUEST, an answer THINK and RESPONSE."""
    texts: dict[str, list[str]] = {}
    for fragment in message["fragments"]:
        if isinstance(fragment, dict):
            texts.setdefault(_text(fragment.get("type")), []).append(_text(fragment.get("content")))
    request, answer = "\n\n".join(texts.get("REQUEST", [])), "\n\n".join(texts.get("RESPONSE", []))
    model, created = _text(message.get("model")), _time(message.get("inserted_at"))
    if "REQUEST" in texts:
        return _Shown("user", request, "", "", created)
    thought = "\n\n".join(texts.get("THINK", []))
    return _Shown("assistant", answer, thought, model, created) if answer or thought else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _time(value: Any) -> str:
    """Seconds since 1970 or ISO 8601, as the history writes it; empty when it is neither."""
    try:
        if isinstance(value, str):
            moment = datetime.fromisoformat(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            moment = datetime.fromtimestamp(value, UTC)
        else:
            return ""
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        return ""
    return moment.isoformat(timespec="microseconds")
