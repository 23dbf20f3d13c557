"""No format: a model that goes on with text, and was never taught to converse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import deepseek_recipe as recipe

from tael.engine.constrain import Constraint
from tael.errors import TaelError
from tael.serve.formats.base import Prompt, Starts, Translator, Way


class NoFormat:
    """Stands where a base model has no format; whoever wants to converse is told why not, and what goes."""

    thinks = False
    spelled: Mapping[int, str] = {}

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def encode(self, conversation: recipe.Conversation, way: Way) -> Prompt:
        """Raises TaelError."""
        raise TaelError(f"{self._reason}; /v1/completions goes on with text")

    def translator(self, starts: Starts = "free") -> Translator:
        """Never asked for: `encode` comes first."""
        raise NotImplementedError

    def tool_grammar(
        self, tools: Sequence[recipe.ToolDefinition], required: bool, parallel: bool
    ) -> Constraint | None:
        """Never asked for either."""
        raise NotImplementedError
