"""Tools in the form NousResearch's Hermes models brought up and most open models since were trained on.

Schemas stand in <tools></tools>, a call is `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, its result comes
in <tool_response>. `HermesTranslator` turns such calls into DSML, which deepseek-recipe's parser reads.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from typing import Any

import deepseek_recipe as recipe

from tael.data.tokenizer import END_THINK, THINK
from tael.serve.formats.base import Starts
from tael.serve.formats.grammar import name_in_dsml

CALL, END_CALL = "<tool_call>", "</tool_call>"
_DSML = recipe.SpecialToken.Dsml.default_str()
_MARKED, _DEFUSED = f"<{_DSML}", f"<\u200b{_DSML}"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_TRIES = 8
"""Closing tags looked at for one call, of which all but the last may stand inside a JSON string."""


def tool_schema(tool: recipe.ToolDefinition) -> dict[str, Any]:
    """A tool as templates and Hermes' system text want it."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = tool.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def instructions(tools: Sequence[recipe.ToolDefinition], required: bool = False) -> str:
    """The system text that offers `tools`."""
    schemas = "\n".join(json.dumps(tool_schema(tool), ensure_ascii=False) for tool in tools)
    must = (
        "You must answer with a call of one of them." if required else "You may call one or more of them to answer."
    )
    return (
        f"You have these functions, whose signatures are given within <tools></tools> XML tags. {must} Do not make "
        f"assumptions about what values to plug into them.\n<tools>\n{schemas}\n</tools>\n\n"
        f"For each function call return a JSON object with function name and arguments within {CALL}{END_CALL} XML "
        f'tags:\n{CALL}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{END_CALL}'
    )


def call_text(name: str, arguments: Any) -> str:
    """A call of the past."""
    return f"{CALL}\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n{END_CALL}"


def response_text(content: str) -> str:
    """What a tool answered."""
    return f"<tool_response>\n{content}\n</tool_response>"


def arguments_of(text: str) -> dict[str, Any]:
    """A historical call's arguments; what is no JSON object is kept as one argument, as deepseek-recipe does."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


# ------------------------------------------------------------------- to DSML


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is too large")
    return value


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse, parse_float=_finite)
"""Models write line ends into strings as they are; NaN and what no float holds would not be JSON again."""


def call_in_dsml(text: str) -> str | None:
    """The call that `text` (what stands between the tags) is, in DSML; None where it is none."""
    try:
        value = _DECODER.decode(text)
        arguments = value["arguments"] if "arguments" in value else value.get("parameters", {})
        if isinstance(arguments, str):  # some models quote them once more
            arguments = _DECODER.decode(arguments)
        parameters = "".join(_parameter(key, argument) for key, argument in arguments.items())
        name = value["name"]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    if not isinstance(name, str) or not name or not name.isprintable() or set(name) & set(' "<'):
        return None
    if "" in arguments:  # which the parser cannot write down
        return None
    return f'<{_DSML}invoke name="{name}">\n{parameters}</{_DSML}invoke>\n'


def _parameter(name: str, value: Any) -> str:
    """A string goes raw, unless it holds what ends it, or half a UTF-16 pair: then as JSON, with escapes."""
    raw = isinstance(value, str) and f"</{_DSML}" not in value and _encodes(value)
    text = value if raw else _json(value)
    name = name_in_dsml(name) if _encodes(name) else "".join(f"\\u{unit:04x}" for unit in _utf16(name))
    return f'<{_DSML}parameter name="{name}" string="{str(raw).lower()}">{text}</{_DSML}parameter>\n'


def _utf16(text: str) -> tuple[int, ...]:
    data = text.encode("utf-16-le", "surrogatepass")
    return struct.unpack(f"<{len(data) // 2}H", data)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return (text if _encodes(text) else json.dumps(value)).replace("<", "\\u003c")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class HermesTranslator:
    """Hermes' calls out of an answer as it comes, and one DSML block with all of them at its end.

    Text passes at once; only what may begin a tag is held back. Calls are given out by `finish`: after the block the
    parser takes no more text, and so none is lost, wherever the model put its calls. What is no call (JSON that is
    malformed) stays text. Between `<think>` and `</think>` no call is looked for. DSML that the model spells out (it
    can only be a quotation) gets a zero-width space, so that the parser does not take it for a call.
    """

    def __init__(self, starts: Starts = "free") -> None:
        self._rest = ""
        self._thinking = starts == "think"
        self._calls: list[str] = []
        self._space = ""
        """White space after a call, which is kept only where text follows."""
        self._looked: list[int] = []
        """Places of closing tags that stand inside a string of the call that is coming."""

    def push(self, text: str) -> str:
        """What `text` makes certain."""
        self._rest += text
        return self._take(over=False)

    def finish(self) -> str:
        """The rest, and all calls."""
        text = self._take(over=True)
        calls, self._calls = "".join(self._calls), []
        return f"{text}\n\n<{_DSML}tool_calls>\n{calls}</{_DSML}tool_calls>" if calls else text

    def _take(self, over: bool) -> str:
        shown: list[str] = []
        while True:
            text, tag = self._before((END_THINK if self._thinking else THINK, _MARKED, *self._tags()), over)
            shown.append(self._kept(text))
            if tag == CALL:
                text = self._call(over)
                if text is None:
                    self._rest = CALL + self._rest
                    break
                shown.append(self._kept(text))
            elif tag:
                self._thinking = tag == THINK or (self._thinking and tag != END_THINK)
                shown.append(self._kept(_DEFUSED if tag == _MARKED else tag))
            else:
                break
        return "".join(shown)

    def _tags(self) -> tuple[str, ...]:
        return () if self._thinking else (CALL,)

    def _before(self, tags: Sequence[str], over: bool) -> tuple[str, str]:
        """Cut from the rest: the text before the first of `tags`, and that tag; what may begin one stays, unless
        `over`."""
        places = [(at, tag) for tag in tags if (at := self._rest.find(tag)) >= 0]
        if places:
            at, tag = min(places)
            text, self._rest = self._rest[:at], self._rest[at + len(tag) :]
            return text, tag
        end = len(self._rest) - (0 if over else max(_overlap(self._rest, tag) for tag in tags))
        text, self._rest = self._rest[:end], self._rest[end:]
        return text, ""

    def _call(self, over: bool) -> str | None:
        """After <tool_call>: take the call, or return what was none as text; None: it is not all here yet."""
        looked, self._looked = self._looked, []
        while len(looked) < _TRIES:
            at = self._rest.find(END_CALL, looked[-1] + 1 if looked else 0)
            if at < 0 and not over:
                self._looked = looked
                return None
            # At the end of the answer the closing tag may be missing.
            text = self._rest if at < 0 else self._rest[:at]
            call = call_in_dsml(text)
            if call is not None:
                self._calls.append(call)
                self._rest = self._rest[len(text) + len(END_CALL) :]
                return ""
            if at < 0 or not _unterminated(text):
                break
            looked.append(at)
        return CALL

    def _kept(self, text: str) -> str:
        """Text of the answer; white space between calls and after them goes."""
        if not self._calls:
            return text
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return shown


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of `text` that may begin `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def _unterminated(text: str) -> bool:
    """Does `text` break off inside a JSON string, so that what looked like the end was part of it?"""
    return '"' in _STRING.sub("", text)
