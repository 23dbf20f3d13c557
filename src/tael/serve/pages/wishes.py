"""What a conversation is asked with: its settings, files in a question, and the request that comes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tael.errors import TaelError
from tael.serve.history import Node

MAX_FILE = 200_000
"""Bytes of one file."""
MAX_FILES = 50
MAX_QUESTION = 400_000
"""Characters of a question with its files (what NiceGUI's socket carries is limited to a megabyte)."""


class Settings(BaseModel):
    """How answers of one conversation are sampled; None leaves it to the model."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    thinking: Literal["auto", "enabled", "disabled"] = "auto"
    effort: Literal["low", "medium", "high"] | None = None
    budget: int | None = Field(default=None, ge=1, le=10_000_000)
    """Tokens of thought."""
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1, le=10_000_000)
    min_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1, le=10_000_000)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: list[str] = Field(default=[], max_length=16)
    json_mode: bool = False
    tools: str = ""
    """A JSON list of functions, as the API takes them."""

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> Settings:
        """Of a conversation: what there makes no sense (it may be imported) is left out."""
        try:
            return cls.model_validate(dict(kept))
        except ValidationError as error:
            wrong = {problem["loc"][0] for problem in error.errors()}
            try:
                return cls.model_validate({name: value for name, value in kept.items() if name not in wrong})
            except ValidationError:
                return cls()

    @classmethod
    def of_form(cls, form: Mapping[str, Any]) -> Settings:
        """Of what someone typed; empty fields mean the model's own. Raises TaelError naming the field."""
        values = {name: value for name, value in form.items() if value not in ("", None)}
        if isinstance(values.get("stop"), str):
            values["stop"] = [line.replace("\\n", "\n") for line in values["stop"].split("\n") if line]
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            raise TaelError(f"{_named(problem['loc'])}: {problem['msg']}") from None
        settings.functions()
        return settings

    def functions(self) -> list[dict[str, Any]]:
        """The tools. Raises TaelError where they are no list of functions with names."""
        if not self.tools.strip():
            return []
        try:
            tools = json.loads(self.tools)
        except (ValueError, RecursionError) as error:
            raise TaelError(f"tools: not JSON ({error})") from None
        tools = tools if isinstance(tools, list) else [tools]
        # A bare function is taken too: {"name": ..} for {"type": "function", "function": {"name": ..}}.
        tools = [
            t if not isinstance(t, dict) or "function" in t else {"type": "function", "function": t} for t in tools
        ]
        for tool in tools:
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise TaelError('tools: a list like [{"name": "add", "parameters": {..}}] is needed')
        return tools


def request_body(
    model: str, thinks: bool | None, system: str, settings: Settings, path: Sequence[Node]
) -> dict[str, Any]:
    """The Chat Completions request for an answer to the branch `path`.

    Where it ends with an answer, that answer is to go on. Raises TaelError when the tools are no JSON.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    messages += [_message(node) for node in path]
    if path and path[-1].role == "assistant":
        messages[-1] = _beginning(path[-1])
    body: dict[str, Any] = {"model": model, "messages": messages}
    for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"):
        if getattr(settings, name) is not None:
            body[name] = getattr(settings, name)
    if settings.stop:
        body["stop"] = settings.stop
    if settings.json_mode:
        body["response_format"] = {"type": "json_object"}
    if functions := settings.functions():
        body["tools"] = functions
    return body | (_thinking(settings) if thinks is not False else {})


def _thinking(settings: Settings) -> dict[str, Any]:
    thinking: dict[str, Any] = {"type": settings.thinking}
    if settings.thinking == "disabled":
        return {"thinking": thinking}
    if settings.budget is not None:
        thinking["budget_tokens"] = settings.budget
    return {"thinking": thinking} | ({"reasoning_effort": settings.effort} if settings.effort else {})


def _message(node: Node) -> dict[str, Any]:
    if node.role == "tool":
        call = node.tool_calls[0].get("id", "") if node.tool_calls else ""
        return {"role": "tool", "tool_call_id": call, "content": node.content}
    message: dict[str, Any] = {"role": node.role, "content": node.content}
    if node.role == "assistant" and node.tool_calls:
        message["tool_calls"] = node.tool_calls
        if node.reasoning:  # between tool calls a model reads its own thoughts again, otherwise not
            message["reasoning_content"] = node.reasoning
    return message


def _beginning(node: Node) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": node.content, "prefix": True}
    return message | ({"reasoning_content": node.reasoning} if node.reasoning else {})


def _named(place: Sequence[Any]) -> str:
    return str(place[0]).replace("_", " ") if place else "settings"


# ------------------------------------------------------------------------ files


@dataclass(frozen=True)
class File:
    """A text file given with a question."""

    name: str
    text: str


_FILE = re.compile(r"\n\nFile ([^\n]+):\n\n(`{3,})\n(.*?)\n\2(?=\n\nFile |\Z)", re.DOTALL)


def with_files(question: str, files: Sequence[File]) -> str:
    """The question with the files quoted after it. Raises TaelError for what is no text, or too much of it."""
    if len(files) > MAX_FILES:
        raise TaelError(f"{len(files)} files are more than {MAX_FILES}; leave some out")
    parts = [question]
    for file in files:
        name = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", "", file.name).strip()[:200] or "file"
        if len(file.text.encode("utf-8", "replace")) > MAX_FILE:
            raise TaelError(f"{name}: larger than {MAX_FILE // 1000} kB; give the part that matters")
        if "\0" in file.text or file.text.count("\ufffd") > max(3, len(file.text) // 100):
            raise TaelError(f"{name}: not a text file")
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", file.text)), default=0))
        parts.append(f"\n\nFile {name}:\n\n{fence}\n{file.text}\n{fence}")
    whole = "".join(parts)
    if len(whole) > MAX_QUESTION:
        raise TaelError(f"that is {len(whole):,} characters, more than {MAX_QUESTION:,}; leave something out")
    return whole


def split_files(content: str) -> tuple[str, list[File]]:
    """A question and the files in it, as `with_files` joined them; anything else stays in the question."""
    if content.count("\n\nFile ") > MAX_FILES:  # made to keep the pattern busy
        return content, []
    files = [(match.start(), File(match[1], match[3])) for match in _FILE.finditer(content)]
    for start, _ in files:  # the first place from which there is nothing but files
        found = [file for place, file in files if place >= start]
        if with_files(content[:start], found) == content:
            return content[:start], found
    return content, []


def title_of(question: str) -> str:
    """What a conversation is called at first: the beginning of its first question."""
    words = " ".join(split_files(question)[0].split()) or "Files"
    return words if len(words) <= 60 else words[:59].rsplit(" ", 1)[0] + "…"
