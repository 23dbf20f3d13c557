"""The values that cross the border of the data room: texts, messages, training sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant"]
Mode: TypeAlias = Literal["free", "think", "direct"]
"""How an answer starts: the model chooses, `<think>`, or `</think>` at once."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text for pretraining and the name of the source it came from."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `reasoning` is what an assistant thought inside `<think>...</think>`."""

    role: Role
    content: str
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence of n tokens; `loss_mask[i]` says that token i is to be predicted. Both lists: [n]."""

    tokens: list[int]
    loss_mask: list[bool]
