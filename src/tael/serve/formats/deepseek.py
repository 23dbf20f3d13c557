"""DeepSeek's format: deepseek-recipe renders it, and reads what the model writes in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import deepseek_recipe as recipe

from tael.data import Mode, Tokenizer
from tael.data.dialogue import Piece, encode_piece, pieces_of
from tael.data.tokenizer import ASSISTANT, END_THINK, THINK
from tael.engine.constrain import Constraint
from tael.errors import TaelError, did_you_mean
from tael.serve.formats.base import Prompt, Starts, Translator, Way, check_conversation
from tael.serve.formats.grammar import dsml_grammar

DSML = recipe.SpecialToken.Dsml.default_str()
_ENCODING = recipe.DeepseekV4Encoding()
_OPENED = f"\n\n<{DSML}tool_calls>\n"
"""What a prompt ends in where the model has to call a tool."""
_STANDS: Mapping[str, Starts] = {ASSISTANT: "free", THINK: "think", END_THINK: "answer"}


class DeepSeekFormat:
    """Conversations as DeepSeek V4 writes them, with tools in DSML.

    `effort_in_prompt` puts the sentence about the conversation's reasoning effort into the prompt, which DeepSeek's
    own checkpoints know. Models trained with Tael know the format at effort "low", which has none.
    """

    thinks = True

    def __init__(self, tokenizer: Tokenizer, effort_in_prompt: bool = False) -> None:
        self.tokenizer, self.effort_in_prompt = tokenizer, effort_in_prompt
        ids = {tokenizer.token_id(token): token for token in (THINK, END_THINK, DSML)}
        self.spelled: Mapping[int, str] = {i: token for i, token in ids.items() if i is not None}

    def encode(self, conversation: recipe.Conversation, way: Way) -> Prompt:
        """Special ids where deepseek-recipe marks special tokens, plain text everywhere else.

        Raises TaelError for images, for a last message that does not fit `way`, and where the tokenizer lacks one of
        the format's tokens (｜DSML｜ may be missing: it is written as text then).
        """
        check_conversation(conversation, way)
        rendered = _ENCODING.render_conversation(self._settled(conversation, way))
        pieces = pieces_of(rendered)
        if conversation.tool_choice == "required" and rendered.prompt.endswith(_OPENED):
            return Prompt(self._ids(pieces), "calls")
        if way == "free":
            pieces = pieces[:-1]
        last = next(piece.text for piece in reversed(pieces) if piece.special and piece.text in _STANDS)
        return Prompt(self._ids(pieces), _STANDS[last])

    def _settled(self, conversation: recipe.Conversation, way: Way) -> recipe.Conversation:
        """The conversation with the thinking mode and the effort it is to be rendered with."""
        if way != "continue" and way not in get_args(Mode):
            raise TaelError(f"unknown mode {way!r}{did_you_mean(str(way), get_args(Mode))}")
        form: dict[str, Any] = {}
        if conversation.response_format == "json_object":
            form["response_format"] = "json_object"
        elif conversation.response_format == "json_schema":
            form["response_schema"] = conversation.response_schema
        elif conversation.response_format == "regex":
            form["response_regex"] = conversation.response_regex
        return recipe.Conversation(
            conversation.messages,
            thinking_mode=conversation.thinking_mode if way == "continue" else way == "think",
            tools=conversation.tools,
            tool_choice=conversation.tool_choice,
            reasoning_effort=conversation.reasoning_effort if self.effort_in_prompt else "low",
            **form,
        )

    def _ids(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = []
        plain: list[str] = []
        lacks_dsml = self.tokenizer.token_id(DSML) is None
        for piece in pieces:
            if not piece.special or (lacks_dsml and piece.text == DSML):
                plain.append(piece.text)
                continue
            ids += self.tokenizer.encode("".join(plain)) + encode_piece(self.tokenizer, piece)
            plain = []
        return ids + self.tokenizer.encode("".join(plain))

    def translator(self, starts: Starts = "free") -> Translator:
        """The identity: the model writes what the parser reads."""
        return _AsItIs()

    def tool_grammar(
        self, tools: Sequence[recipe.ToolDefinition], required: bool, parallel: bool
    ) -> Constraint | None:
        """Calls in DSML; with `required` inside the block that the prompt opened."""
        return dsml_grammar(self.tokenizer, tools, required, parallel) if tools else None


class _AsItIs:
    def push(self, text: str) -> str:
        return text

    def finish(self) -> str:
        return ""
