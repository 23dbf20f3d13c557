"""What a format is: how a model wants conversations, and how what it writes is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import deepseek_recipe as recipe

from tael.data import Mode
from tael.engine.constrain import Constraint
from tael.errors import TaelError

Way: TypeAlias = Mode | Literal["continue"]
"""How the answer is to begin; "continue" goes on with the assistant's last message, which is marked `prefix`."""

Starts: TypeAlias = Literal["think", "answer", "free", "calls"]
"""Where the model goes on: inside thoughts, in the answer, as it likes, inside a block of tool calls."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model reads, and where it stands then."""

    ids: list[int]
    starts: Starts


class Translator(Protocol):
    """Turns one answer's text, piece by piece, into what deepseek-recipe's StreamProcessor reads."""

    def push(self, text: str) -> str:
        """What `text` makes certain."""
        ...

    def finish(self) -> str:
        """The rest, at the end of the answer."""
        ...


class ChatFormat(Protocol):
    """One model's way of writing conversations down."""

    thinks: bool
    """The model can think."""
    spelled: Mapping[int, str]
    """Special tokens that belong to the markup: the engine shows no text for them, the translator needs their
    spelling."""

    def encode(self, conversation: recipe.Conversation, way: Way) -> Prompt:
        """The prompt after which the model answers. Raises TaelError for what this format cannot write."""
        ...

    def translator(self, starts: Starts = "free") -> Translator:
        """For one answer of a request that offers tools, after a prompt that `starts` so."""
        ...

    def tool_grammar(
        self, tools: Sequence[recipe.ToolDefinition], required: bool, parallel: bool
    ) -> Constraint | None:
        """Calls of these tools only, arguments by their schemas; None when there are no tools.

        `required`: at least one call and nothing else; otherwise any text, which may end in calls. Without `parallel`
        there is one call at most. Raises TaelError for a schema that cannot be enforced.
        """
        ...


def check_conversation(conversation: recipe.Conversation, way: Way) -> None:
    """Raise TaelError for what no format here can write."""
    messages = conversation.messages
    if not messages:
        raise TaelError("messages: there is nothing to answer")
    if any(message.image_sources for message in messages):
        raise TaelError("messages: this model reads text only; leave out the images")
    if (way == "continue") is not messages[-1].prefix:
        fault = "is not" if way == "continue" else "is"
        raise TaelError(f"messages: the last message {fault} one of the assistant's to be continued (prefix)")
