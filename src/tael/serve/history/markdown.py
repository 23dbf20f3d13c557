"""One branch of a conversation as Markdown: reads well anywhere, and reads back exactly.

What a reader sees is made from what comments hold; texts stand between comments, whatever is in them. A line of a
text that looks like such a comment gets a backslash before it, and loses it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from tael.serve.history.exchange import LARGEST, Message, Settings, decoded, message_of, parsed, refuse, settings_of
from tael.serve.history.tree import Head, Node, Tree, path_to

VERSION = 1

_COMMENT = re.compile(r"<!-- tael:([a-z]+)(?: (\{.*\}))? -->", re.DOTALL)
_LOOKS_LIKE = re.compile(r"^(\\*<!-- tael:)", re.MULTILINE)
_ESCAPED = re.compile(r"^\\(\\*<!-- tael:)", re.MULTILINE)
_ROLES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}


def to_markdown(head: Head, nodes: Sequence[Node]) -> str:
    """The branch on show: headings, thoughts folded, a line of figures under each answer."""
    settings = settings_of(head)
    del settings["system"]
    parts = [
        _comment("conversation", {"version": VERSION, **settings}),
        f"# {_plain(head.title) or 'Conversation'}",
        f"{_plain(head.model)} · {head.created[:10]}",
    ]
    if head.system:
        parts += _folded("System prompt", "system", head.system)
    for node in path_to(nodes, head.leaf):
        parts += _message(node)
    return "\n\n".join(parts) + "\n"


def _message(node: Node) -> Iterator[str]:
    yield _comment("message", message_of(node))
    yield f"## {_ROLES[node.role]}" + (f" ({_plain(node.model)})" if node.model else "")
    if node.reasoning is not None:
        yield from _folded("Thoughts", "reasoning", node.reasoning)
    yield from _block("content", node.content)
    for call in node.tool_calls:
        yield "    " + json.dumps(call.get("function", call), ensure_ascii=False)  # on one line, as code
    notes = [f"{name.replace('_', ' ')} {value:.6g}" for name, value in _numbers(node.figures)]
    notes += [node.state] if node.state != "done" else []
    notes += [_plain(node.error)] if node.error else []
    if notes:
        yield f"*{' · '.join(notes)}*"


def _folded(title: str, name: str, text: str) -> list[str]:
    return [f"<details><summary>{title}</summary>", *_block(name, text), "</details>"]


def _block(name: str, text: str) -> list[str]:
    return [_comment(name), _LOOKS_LIKE.sub(r"\\\1", text), _comment("end")]


def _comment(name: str, value: dict[str, Any] | None = None) -> str:
    if value is None:
        return f"<!-- tael:{name} -->"
    text = json.dumps(value, ensure_ascii=False)
    for character in "<>\u2028\u2029\x85":  # no end of a comment, and no line of its own, in any reader's eyes
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f"<!-- tael:{name} {text} -->"


def _numbers(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
        if number and re.fullmatch(r"[a-z_]{1,40}", name):
            yield name, value


def _plain(text: str) -> str:
    """On one line and without HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --------------------------------------------------------------------------- reading


def from_markdown(text: str | bytes) -> list[Tree]:
    """The conversation of `to_markdown`, its one branch, for `History.insert`. Raises TaelError for anything else."""
    text = decoded(text)
    if text.partition("\n")[0].endswith("\r"):  # written anew by an editor that ends lines so
        text = text.replace("\r\n", "\n")
    try:
        return [_tree(list(_parts(text)))]
    except (ValidationError, ValueError, RecursionError) as error:
        refuse(error)


def _parts(text: str) -> Iterator[tuple[str, Any]]:
    """Comments and blocks in turn: the name, and an object or the text."""
    lines = iter(text.split("\n"))
    for line in lines:
        match = _COMMENT.fullmatch(line)
        if match is not None:
            name, value = match.groups()
            yield name, _block_text(name, lines) if value is None else parsed(value)


def _block_text(name: str, lines: Iterator[str]) -> str:
    block: list[str] = []
    for line in lines:
        if line == _comment("end"):
            break
        block.append(line)
    else:
        raise ValueError(f"the end of a {name} is missing")
    if len(block) < 3 or block[0] or block[-1]:
        raise ValueError(f"a {name} does not stand between empty lines")
    return _ESCAPED.sub(r"\1", "\n".join(block[1:-1]))


def _tree(parts: list[tuple[str, Any]]) -> Tree:
    (first, value), *rest = parts or [("", None)]
    if first != "conversation" or not isinstance(value, dict):
        raise ValueError("the Markdown does not begin with a conversation's comment")
    if value.pop("version", None) != VERSION:
        raise ValueError(f"this Tael reads version {VERSION} of its Markdown")
    settings = Settings.model_validate(value)
    messages: list[tuple[Message, dict[str, str]]] = []
    for name, value in rest:
        if name == "message" and isinstance(value, dict):
            messages.append((Message.model_validate(value), {}))
        elif name == "system" and isinstance(value, str) and not messages:
            settings.system = value
        elif name in ("reasoning", "content") and isinstance(value, str) and messages and name not in messages[-1][1]:
            messages[-1][1][name] = value
        else:
            raise ValueError(f"a {name} where none can be")
    nodes = [_node(i, message, texts) for i, (message, texts) in enumerate(messages)]
    return Tree(Head(id=0, owner="", leaf=len(nodes) - 1 if nodes else None, **dict(settings)), nodes)


def _node(place: int, message: Message, texts: dict[str, str]) -> Node:
    if "content" not in texts:
        raise ValueError(f"message {place} has no content")
    parent = place - 1 if place else None
    return Node(
        id=place,
        conversation=0,
        parent=parent,
        content=texts["content"],
        reasoning=texts.get("reasoning"),
        **dict(message),
    )
