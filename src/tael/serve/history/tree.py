"""A conversation is a tree: to edit a question or ask again adds a branch, nothing said is ever lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tael.errors import TaelError

Role = Literal["user", "assistant", "tool"]
State = Literal["done", "running", "stopped", "interrupted", "error"]


@dataclass(frozen=True)
class Head:
    """All of a conversation but its messages."""

    id: int
    owner: str
    title: str = ""
    folder: str = ""
    """Empty: in none."""
    model: str = ""
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    """Times are ISO 8601, in UTC."""
    updated: str = ""
    """When a message was last added or changed."""
    leaf: int | None = None
    """The message that the branch on show ends with."""


@dataclass(frozen=True)
class Node:
    """One message; its children are the ways the conversation went on from it."""

    id: int
    conversation: int
    parent: int | None
    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """Of an assistant: the calls, as OpenAI writes them. Of a tool: `[{"id": ..}]`, the call that it answers."""
    model: str = ""
    created: str = ""
    state: State = "done"
    figures: dict[str, Any] = field(default_factory=dict)
    """Tokens, seconds, tokens per second, cost, cached tokens ..; JSON."""
    error: str | None = None


@dataclass(frozen=True)
class Tree:
    """A whole conversation, as it is exported and imported: ids mean something within it only."""

    head: Head
    nodes: list[Node]


def path_to(nodes: Sequence[Node], leaf: int | None) -> list[Node]:
    """The branch that ends with the node `leaf`, root first; of None, nothing."""
    by_id = {node.id: node for node in nodes}
    path: list[Node] = []
    while leaf is not None:
        if leaf not in by_id:
            raise TaelError(f"there is no message {leaf} in this conversation")
        path.append(by_id.pop(leaf))
        leaf = path[-1].parent
    return path[::-1]


def siblings(nodes: Sequence[Node], node: Node) -> list[Node]:
    """`node` and the other branches at its place, oldest first."""
    return sorted((other for other in nodes if other.parent == node.parent), key=lambda other: other.id)


def leaf_below(nodes: Sequence[Node], node: Node) -> Node:
    """Where the newest branch through `node` ends: what to show when its branch is chosen."""
    newest: dict[int | None, Node] = {}
    for other in sorted(nodes, key=lambda other: other.id):
        newest[other.parent] = other
    while node.id in newest:
        node = newest.pop(node.id)
    return node
