"""No format: a model that goes on with text, and was never taught to converse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import deepseek_recipe as recipe

from tael.engine.constrain import Constraint
from tael.errors import TaelError
from tael.serve.formats.base import Prompt, Starts, Translator, Way


class NoFormat:
    """Stands where a base model has no format; who wants to converse gets a TaelError that says why not."""

    thinks = False
    spelled: Mapping[int, str] = {}

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def encode(self, conversation: recipe.Conversation, way: Way) -> Prompt:
        raise self._refusal()

    def translator(self, starts: Starts = "free") -> Translator:
        raise self._refusal()

    def tool_grammar(
        self, tools: Sequence[recipe.ToolDefinition], required: bool, parallel: bool
    ) -> Constraint | None:
        raise self._refusal()

    def _refusal(self) -> TaelError:
        return TaelError(f"{self._reason}; /v1/completions goes on with text")
