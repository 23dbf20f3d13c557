"""Conversations in a model's own chat format: its chat template, with no way for a text to pass for a special token.

    ids = encode_chat(tokenizer, messages, "free")

The template never sees what people wrote. Each content goes in as an unguessable placeholder (its outer white space
kept, so that `trim` works); in what comes out, the template's own text may hold special tokens, and the contents are
put back as plain text. Plain text between two special tokens is encoded in one piece, so that the ids are those of
transformers' `apply_chat_template` wherever no content spells out a special token.

Models with DeepSeek's tokens for turns and thoughts take DeepSeek's format from `tael.data.dialogue` instead.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tael.data.dialogue import encode_prompt
from tael.data.sandbox import render
from tael.data.tokenizer import Tokenizer, clean_text
from tael.data.types import Message, Mode
from tael.errors import TaelError, did_you_mean

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_DEEPEST = 64


def speaks_deepseek(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has DeepSeek's tokens for turns and for thoughts."""
    ids = (tokenizer.user_id, tokenizer.assistant_id, tokenizer.think_id, tokenizer.end_think_id)
    return None not in ids


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], mode: Mode, tools: Sequence[dict[str, Any]] | None = None
) -> list[int]:
    """Ids of the prompt after which the model answers `messages`, in the format it was trained on.

    In DeepSeek's format as `encode_prompt`; otherwise through the model's chat template, to which mode "think" and
    "direct" are passed as `enable_thinking` and `thinking`, and `tools` (JSON schemas of functions) as they are.
    Raises TaelError when there is no message to answer, no template, when it refuses the conversation or is wrong,
    and for tools in DeepSeek's format, which the service encodes.
    """
    if mode not in get_args(Mode):
        raise TaelError(f"unknown mode {mode!r}{did_you_mean(mode, get_args(Mode))}")
    if speaks_deepseek(tokenizer):
        if tools:
            raise TaelError("tools in DeepSeek's format go through the service, not through encode_chat")
        return encode_prompt(tokenizer, messages, mode)
    if not messages or messages[-1].role == "assistant":
        raise TaelError("a prompt must end with a user or system message")
    return encode_template(tokenizer, messages, mode, tools)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of the past, as templates see it; `arguments` is JSON."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class ToolTurn:
    """A turn that has to do with tools: an assistant's calls, or (role "tool") what one of them brought."""

    role: Literal["assistant", "tool"]
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    """Of the tool that answers."""


def encode_template(
    tokenizer: Tokenizer,
    messages: Sequence[Message | ToolTurn],
    mode: Mode = "free",
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """`encode_chat` for the model's own template, whatever its tokens."""
    hidden = _Hidden(tokenizer)
    variables: dict[str, Any] = {key: _spelled(tokenizer.config.get(key)) for key in _TOKENS}
    variables["messages"] = [_hide_message(hidden, message) for message in messages]
    variables["add_generation_prompt"] = True
    if tools:
        variables["tools"] = [hidden.schema(tool) for tool in tools]
    if mode != "free":
        variables["enable_thinking"] = variables["thinking"] = mode == "think"
    about_tools = bool(tools) or any(isinstance(message, ToolTurn) for message in messages)
    text = render(chat_template(tokenizer, about_tools), variables)
    return hidden.encode(text)


def takes_system(tokenizer: Tokenizer, tools: bool = False) -> bool:
    """Whether the chat template writes a system message down: some refuse it, some leave it out."""
    hidden = _Hidden(tokenizer)
    messages = [_hide_message(hidden, Message(role, role)) for role in ("system", "user")]
    variables = {key: _spelled(tokenizer.config.get(key)) for key in _TOKENS}
    try:
        return messages[0]["content"] in render(
            chat_template(tokenizer, tools), {**variables, "messages": messages, "add_generation_prompt": True}
        )
    except TaelError:
        return False


def chat_template(tokenizer: Tokenizer, tools: bool = False) -> str:
    """The tokenizer's chat template; of several the one for tools, or the default. Raises TaelError without one."""
    template = tokenizer.config.get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template if isinstance(t, dict) and {"name", "template"} <= set(t)}
        wanted = ["tool_use", "default"] if tools else ["default"]
        template = next((named[name] for name in wanted if name in named), None)
    if not isinstance(template, str) or not template:
        raise TaelError(
            "this model has no chat format: neither DeepSeek's tokens nor a chat template; `tael complete` goes on "
            "from plain text"
        )
    return template


def _spelled(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _hide_message(hidden: _Hidden, message: Message | ToolTurn) -> dict[str, Any]:
    roles = ("assistant", "tool") if isinstance(message, ToolTurn) else ("system", "user", "assistant")
    if message.role not in roles:
        raise TaelError(f"unknown role {message.role!r}{did_you_mean(message.role, roles)}")
    shown: dict[str, Any] = {"role": message.role, "content": hidden.text(message.content)}
    if message.reasoning is not None:
        shown["reasoning_content"] = hidden.text(message.reasoning)
    if isinstance(message, ToolTurn):
        if message.tool_calls:
            shown["tool_calls"] = [_hide_call(hidden, call) for call in message.tool_calls]
        for key, value in (("tool_call_id", message.tool_call_id), ("name", message.name)):
            if value:
                shown[key] = hidden.schema(value)
    return shown


def _hide_call(hidden: _Hidden, call: ToolCall) -> dict[str, Any]:
    function = {"name": hidden.schema(call.name), "arguments": hidden.schema(dict(call.arguments))}
    return {"type": "function", "function": function} | ({"id": hidden.schema(call.id)} if call.id else {})


class _Hidden:
    """Texts behind placeholders, and how a rendered template becomes ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.key = secrets.token_hex(16)
        self.texts: list[str] = []
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self.special = _either(added)

    def text(self, content: str) -> str:
        """A placeholder for `content`; white space around it stays, for templates that trim or test for empty."""
        content = clean_text(content)
        core = content.strip()
        if not core:
            return content
        start = content.index(core)
        return f"{content[:start]}{self._placeholder(core)}{content[start + len(core) :]}"

    def schema(self, value: Any, depth: int = 0) -> Any:
        """JSON with every string hidden that spells a special token, as it will stand between quotes."""
        if depth > _DEEPEST:
            raise TaelError(f"a tool's schema or arguments are nested more than {_DEEPEST} deep")
        if isinstance(value, dict):
            return {self.schema(str(k), depth + 1): self.schema(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.schema(item, depth + 1) for item in value]
        if isinstance(value, str):
            value = clean_text(value)
            risky = self.special is not None and self.special.search(value)
            return self._placeholder(json.dumps(value, ensure_ascii=False)[1:-1]) if risky else value
        if value is None or isinstance(value, bool | int | float):
            return value
        raise TaelError(f"a tool's schema and arguments must be JSON, not {type(value).__name__}")

    def _placeholder(self, text: str) -> str:
        self.texts.append(text)
        return f"{self.key}x{len(self.texts) - 1}x"

    def encode(self, rendered: str) -> list[int]:
        """Ids of `rendered`: special tokens where the template wrote them, plain text everywhere else."""
        ids: list[int] = []
        plain: list[str] = []
        for i, part in enumerate(re.split(rf"{self.key}x(\d+)x", rendered)):
            if i % 2:
                plain.append(self.texts[int(part)])
                continue
            if self.key[:8] in part.lower():
                raise TaelError("the model's chat template changes what was said (it cuts or converts the text)")
            at = 0
            for match in self.special.finditer(part) if self.special else ():
                plain.append(part[at : match.start()])
                ids += self.tokenizer.encode("".join(plain))
                plain, at = [], match.end()
                token = self.tokenizer.token_id(match[match.lastgroup or 0])
                ids += [] if token is None else [token]
            plain.append(part[at:])
        return ids + self.tokenizer.encode("".join(plain))


def _either(added: Any) -> re.Pattern[str] | None:
    """A pattern that finds any added token, the longest first, with the white space it swallows."""
    tokens = sorted((token for token in added if token.content), key=lambda token: -len(token.content))
    space = {True: r"\s*", False: ""}
    parts = [
        f"{space[token.lstrip]}(?P<t{i}>{re.escape(token.content)}){space[token.rstrip]}"
        for i, token in enumerate(tokens)
    ]
    return re.compile("|".join(parts)) if parts else None
