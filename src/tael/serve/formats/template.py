"""Every other model's format: its own chat template, with tools in Hermes' form.

A template that knows Hermes' tags gets tools, calls and results as transformers would hand them over. Any other is
given them as text in that form, one with another form for tools too: what the model then writes can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import deepseek_recipe as recipe

from tael.data import Message, Mode, Tokenizer
from tael.data.template import ToolCall, ToolTurn, chat_template, encode_template, takes_system
from tael.data.tokenizer import END_THINK, THINK
from tael.engine.constrain import Constraint
from tael.errors import TaelError, did_you_mean
from tael.serve.formats.base import Prompt, Starts, Translator, Way, check_conversation
from tael.serve.formats.grammar import hermes_grammar
from tael.serve.formats.hermes import (
    CALL,
    END_CALL,
    HermesTranslator,
    arguments_of,
    call_text,
    instructions,
    response_text,
    tool_schema,
)


@dataclass(frozen=True, slots=True)
class _Habits:
    """What a template does, told from its text and one trial."""

    knows_tools: bool
    takes_system: bool


class TemplateFormat:
    """Conversations as the model's chat template writes them; raises TaelError where the model has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        plain, with_tools = chat_template(tokenizer), chat_template(tokenizer, tools=True)
        mentioned = any(word in plain + with_tools for word in ("enable_thinking", THINK))
        self.thinks = mentioned or None not in (tokenizer.think_id, tokenizer.end_think_id)
        knows_tools = "tools" in with_tools and CALL in with_tools
        self._plain = _Habits(False, takes_system(tokenizer))
        self._with_tools = _Habits(True, takes_system(tokenizer, tools=True)) if knows_tools else self._plain
        ids = {tokenizer.token_id(token): token for token in (THINK, END_THINK, CALL, END_CALL)}
        self.spelled: Mapping[int, str] = {
            i: token for i, token in ids.items() if i is not None and i in tokenizer.special_ids
        }

    def encode(self, conversation: recipe.Conversation, way: Way) -> Prompt:
        """The template's text up to where the model answers, and the prefix to be continued as plain text.

        Where the model thinks, "think" ends in `<think>`. System messages come first, in one, folded into the first
        user message where the template has no place for them. Raises TaelError for images, for a last message that
        does not fit `way`, and for a conversation that the template refuses.
        """
        check_conversation(conversation, way)
        prefix = conversation.messages[-1] if way == "continue" else None
        if way != "continue" and way not in get_args(Mode):
            raise TaelError(f"unknown mode {way!r}{did_you_mean(str(way), get_args(Mode))}")
        tools = [] if conversation.tool_choice == "none" else list(conversation.tools)
        messages = conversation.messages[:-1] if prefix else conversation.messages
        ids = self._encode(messages, tools, conversation.tool_choice == "required", _mode(way, prefix, conversation))
        if prefix is not None:
            return self._continued(ids, prefix, conversation.thinking_mode)
        return self._started(ids, way)

    def _encode(
        self, messages: Sequence[recipe.Message], tools: Sequence[recipe.ToolDefinition], required: bool, mode: Mode
    ) -> list[int]:
        about_tools = bool(tools) or any(m.role == "tool" or m.tool_calls for m in messages)
        habits = self._with_tools if about_tools else self._plain
        system = [m.content for m in messages if m.role == "system" and m.content]
        turns = [m for m in messages if m.role != "system"]
        if tools and not habits.knows_tools:
            system.append(instructions(tools, required))
        written = _native(turns) if habits.knows_tools else _as_text(turns)
        said = _with_system("\n\n".join(system), _joined(written), habits.takes_system)
        if not said:
            raise TaelError("messages: there is nothing to answer")
        schemas = [tool_schema(tool) for tool in tools] if habits.knows_tools else None
        return encode_template(self.tokenizer, said, mode, schemas)

    # --------------------------------------------------------- where it starts

    def _started(self, ids: list[int], way: Way) -> Prompt:
        stands = self._stands(ids)
        if not self.thinks:
            return Prompt(ids, "answer")
        if way == "think" and stands != "think":
            return Prompt(ids + self._tag(THINK), "think")
        if way == "direct" and stands != "answer":
            closed = [*self._plain_ids("\n"), *self._tag(END_THINK), *self._plain_ids("\n\n")]
            return Prompt(ids + closed if stands == "think" else ids, "answer")
        return Prompt(ids, stands or "free")

    def _continued(self, ids: list[int], prefix: recipe.Message, thinking: bool) -> Prompt:
        """The prompt with what the assistant has said; with nothing said yet, as any other."""
        reasoning, content = prefix.reasoning_content or "", prefix.content
        if prefix.tool_calls:
            calls = [call_text(call.name, arguments_of(call.arguments)) for call in prefix.tool_calls]
            content = "\n".join([*([content] if content else []), *calls])
        if not reasoning and not content:
            return self._started(ids, "think" if thinking else "direct")
        if reasoning:
            ids = self._started(ids, "think").ids if self.thinks else ids + self._tag(THINK)
            gap = "" if self.tokenizer.decode(ids[-1:], skip_special=False).endswith("\n") else "\n"
            ids = ids + self._plain_ids(gap + reasoning)
            if not content:
                return Prompt(ids, "think")
            ids = [*ids, *self._plain_ids("\n"), *self._tag(END_THINK), *self._plain_ids("\n\n")]
        else:
            ids = self._started(ids, "direct").ids
        return Prompt(ids + self._plain_ids(content), "answer")

    def _stands(self, ids: Sequence[int]) -> Starts | None:
        """Whether the template's last word (white space aside) opens or closes the thoughts."""
        think, end = self.tokenizer.think_id, self.tokenizer.end_think_id
        if think is None or end is None:
            tail = self.tokenizer.decode(ids[-24:], skip_special=False).rstrip()
            return "think" if tail.endswith(THINK) else "answer" if tail.endswith(END_THINK) else None
        for token in reversed(ids):
            if token in (think, end):
                return "think" if token == think else "answer"
            if self.tokenizer.decode([token], skip_special=False).strip():
                break
        return None

    def _tag(self, tag: str) -> list[int]:
        token = self.tokenizer.token_id(tag)
        return self._plain_ids(tag) if token is None else [token]

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) if text else []

    # ---------------------------------------------------------- what is written

    def translator(self, starts: Starts = "free") -> Translator:
        """Hermes' calls as DSML."""
        return HermesTranslator(starts)

    def tool_grammar(
        self, tools: Sequence[recipe.ToolDefinition], required: bool, parallel: bool
    ) -> Constraint | None:
        """Calls in Hermes' form."""
        return hermes_grammar(self.tokenizer, tools, required, parallel) if tools else None


def _mode(way: Way, prefix: recipe.Message | None, conversation: recipe.Conversation) -> Mode:
    """In which mode the template is rendered; an answer that goes on without thoughts had none."""
    if way != "continue":
        return way
    if prefix is not None and (prefix.reasoning_content or (not prefix.content and conversation.thinking_mode)):
        return "think"
    return "direct"


# ------------------------------------------------------------------- messages


def _native(messages: Iterable[recipe.Message]) -> list[Message | ToolTurn]:
    """Messages with calls and results as the template takes them."""
    names: dict[str, str] = {}
    turns: list[Message | ToolTurn] = []
    for message in messages:
        calls = message.tool_calls or []
        names |= {call.id: call.name for call in calls}
        if message.role == "tool":
            identity = message.tool_call_id or ""
            turns.append(ToolTurn("tool", message.content, None, (), identity, names.get(identity, "")))
        elif calls:
            made = tuple(ToolCall(call.name, arguments_of(call.arguments), call.id) for call in calls)
            turns.append(ToolTurn("assistant", message.content, message.reasoning_content or None, made))
        else:
            turns.append(_turn(message))
    return turns


def _as_text(messages: Iterable[recipe.Message]) -> list[Message | ToolTurn]:
    """The same in Hermes' form, for a template that knows nothing of tools."""
    turns: list[Message | ToolTurn] = []
    for message in messages:
        turn = _turn(message)
        if message.role == "tool":
            turn = Message("user", response_text(message.content))
        elif message.tool_calls:
            calls = [call_text(call.name, arguments_of(call.arguments)) for call in message.tool_calls]
            turn = replace(turn, content="\n".join([*([turn.content] if turn.content else []), *calls]))
        turns.append(turn)
    return turns


def _turn(message: recipe.Message) -> Message:
    """A message of the assistant's, or to it (a reminder too, for which templates have no place)."""
    role = "assistant" if message.role == "assistant" else "user"
    return Message(role, message.content, message.reasoning_content or None)


def _joined(turns: Iterable[Message | ToolTurn]) -> list[Message | ToolTurn]:
    """The same with neighbouring user messages in one: many templates want the speakers to take turns."""
    joined: list[Message | ToolTurn] = []
    for turn in turns:
        last = joined[-1] if joined else None
        if last is not None and last.role == turn.role == "user":
            joined[-1] = Message("user", f"{last.content}\n\n{turn.content}")
        else:
            joined.append(turn)
    return joined


def _with_system(system: str, turns: list[Message | ToolTurn], takes_system: bool) -> list[Message | ToolTurn]:
    if not system:
        return turns
    if takes_system:
        return [Message("system", system), *turns]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return [Message("user", system), *turns]
    return [*turns[:first], Message("user", f"{system}\n\n{turns[first].content}"), *turns[first + 1 :]]
