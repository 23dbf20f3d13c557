"""Grammars that let a model call the tools it was offered, with arguments by their schemas, and no others.

Written in llguidance's dialect of Lark. Schemas go in as JSON (%json), names as JSON strings: nothing a client sends
is read as grammar. In DSML a schema's properties stand one by one, strings raw, all else as JSON. A string with a
pattern or a format goes as JSON too, which the parser reads as well. Not kept out are DSML's closing markers in a
string inside an array or an object: a model that spells one out ends its call early, as it would without a grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import deepseek_recipe as recipe

from tael.data import Tokenizer
from tael.engine.constrain import WHITE_SPACE, Constraint
from tael.errors import TaelError

MOST_CALLS = 16
"""In one answer; a weak model calls on and on."""
LONGEST_RAW = 1024
"""A longer string's length is not enforced: counting costs a state a character."""

_DSML = recipe.SpecialToken.Dsml.default_str()
_NAME = "[A-Za-z_][A-Za-z0-9_]{0,63}"
"""Of an argument that no schema lists."""
_DEFINITIONS = ("$defs", "definitions")
_WHOLE = (
    *("allOf", "anyOf", "oneOf", "not", "if", "enum", "const", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "dependentRequired", "dependentSchemas"),
)
"""Keywords about an object as a whole, which a grammar of one parameter after the other cannot keep."""
_NAMED = 'parameter name="'
_LINE_END = '"\\n"'
_BEYOND_LENGTH = ("pattern", "format", "allOf", "anyOf", "oneOf", "not", "if", "$ref")


def name_in_dsml(name: str) -> str:
    """A parameter's name between DSML's quotation marks: the parser takes it into JSON as it stands there, and takes
    a quotation mark or a space for its end."""
    text = json.dumps(name, ensure_ascii=False)[1:-1].replace('\\"', "\\u0022")
    return text.replace(" ", "\\u0020").replace("<", "\\u003c")


def dsml_grammar(
    tokenizer: Tokenizer, tools: Sequence[recipe.ToolDefinition], required: bool, parallel: bool
) -> Constraint:
    """DeepSeek's calls. `required`: the prompt has opened the block, so the answer begins with the first call."""
    writer = _Dsml(tokenizer)
    calls = [writer.call(_checked(tool), i) for i, tool in enumerate(tools)]
    block = f"({' | '.join(calls)}){_times(parallel)} {writer.line('</', 'tool_calls>')}"
    if required:
        start = [f"start: {block}"]
    else:
        opened = writer.line("<", "tool_calls>\n", before="TEXT")
        start = [f"start: TEXT | {opened} {block}", f"TEXT: ANY & ~(ANY {_quoted(f'<{_DSML}')} ANY)"]
    return Constraint.grammar("\n".join([*start, *writer.rules, "ANY: /(?s:.*)/", ""]))


def hermes_grammar(
    tokenizer: Tokenizer, tools: Sequence[recipe.ToolDefinition], required: bool, parallel: bool
) -> Constraint:
    """Hermes' calls: JSON between <tool_call> and </tool_call>."""
    rules = [f"call{i}: %json {_hermes_schema(_checked(tool))}" for i, tool in enumerate(tools)]
    either = " | ".join(f"call{i}" for i in range(len(tools)))
    opened, closed = _marker(tokenizer, "<tool_call>"), _marker(tokenizer, "</tool_call>")
    inner = f'"\\n" ({either}) "\\n" {closed}'
    more = f'("\\n" {opened} {inner}){{0,{MOST_CALLS - 1}}}' if parallel else ""
    if required:
        start = [f"start: {opened} {inner} {more}"]
    else:
        first = f"TEXT {opened}" if opened.startswith("<[") else "OPENED"
        start = [f"start: TEXT | {first} {inner} {more}", 'TEXT: ANY & ~(ANY "<tool_call>" ANY)']
        start += ['OPENED: TEXT "<tool_call>"', "ANY: /(?s:.*)/"]
    return Constraint.grammar("\n".join([*start, *rules, ""]))


# ------------------------------------------------------------------------ DSML


class _Dsml:
    """Rules for calls in DSML, whose marker is a token of its own or, where the tokenizer has none, text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.id = tokenizer.token_id(_DSML)
        self.rules = [f"RAW: ANY & ~(ANY {_quoted(f'</{_DSML}')} ANY)"]

    def line(self, opening: str, rest: str, before: str = "") -> str:
        """`opening` ("<" or "</"), the marker and `rest`, after the terminal `before`.

        That terminal and the opening are one: a terminal ends where it cannot go on, and text may go on with "<".
        """
        if self.id is None:
            return self._terminal(f"{before} {_quoted(f'{opening}{_DSML}{rest}')}")
        return f"{self._terminal(f'{before} {_quoted(opening)}')} <[{self.id}]> {_quoted(rest)}"

    def _terminal(self, content: str) -> str:
        rule = f"T{len(self.rules)}"
        self.rules.append(f"{rule}: {content}")
        return rule

    def call(self, tool: recipe.ToolDefinition, number: int) -> str:
        """Name of the rule for one call of `tool`."""
        schema = _object_schema(tool)
        parts = []
        for place, (name, value) in enumerate(schema["properties"].items()):
            rule = f"p{number}-{place}"
            self._parameters(rule, _quoted(name_in_dsml(name)), _in_definitions(value, schema), tool)
            parts.append(rule if name in schema["required"] else f"{rule}?")
        if schema["others"] is not None:
            rule = f"o{number}"
            self._parameters(rule, f"/{_NAME}/", _in_definitions(schema["others"], schema), tool)
            parts.append(f"{rule}{{0,{MOST_CALLS}}}")
        opened = self.line("<", f'invoke name="{tool.name}">\n')
        self.rules.append(f"call{number}: {opened} {' '.join(parts)} {self.line('</', 'invoke>')} {_LINE_END}")
        return f"call{number}"

    def _parameters(self, rule: str, name: str, schema: dict[str, Any], tool: recipe.ToolDefinition) -> None:
        """A rule for one parameter, whose name is the terminal `name`."""
        options = []
        for raw, value in self._shapes(schema, _lenient(tool)):
            opened = f"{self.line('<', _NAMED)} {name}"
            closed = self.line("</", "parameter>", before=value if raw else "")
            kind = _quoted(f'" string="{str(raw).lower()}">')
            options.append(f"{opened} {kind} {'' if raw else value} {closed} {_LINE_END}")
        self.rules.append(f"{rule}: {' | '.join(options)}")

    def _shapes(self, schema: dict[str, Any], lenient: bool) -> list[tuple[bool, str]]:
        """How a value may be written: (raw?, terminal or rule), one or both."""
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(listed, list) and listed and all(_can_be_raw(value) for value in listed):
            return [(True, f"({' | '.join(_quoted(value) for value in listed)})")]
        as_json = (False, f"%json {_json_schema(schema, lenient)}")
        if not ("string" in kinds or kinds == [None]) or listed is not None or set(schema) & set(_BEYOND_LENGTH):
            return [as_json]
        length = _length(schema)
        if length is None:
            return [as_json]
        text = (True, self._terminal(f"RAW & {length}") if length else "RAW")
        return [text] if kinds == ["string"] else [text, as_json]


def _can_be_raw(value: Any) -> bool:
    return isinstance(value, str) and f"</{_DSML}" not in value and value != ""


def _length(schema: dict[str, Any]) -> str | None:
    """A terminal of as many characters as the schema allows; empty for any number, None where JSON has to count."""
    least, most = schema.get("minLength") or 0, schema.get("maxLength")
    if least == 0 and most is None:
        return ""
    numbers = [n for n in (least, most) if n is not None]
    if not all(isinstance(n, int) and 0 <= n <= LONGEST_RAW for n in numbers) or (most is not None and least > most):
        return None
    return f"/(?s:.){{{least},{'' if most is None else most}}}/"


# --------------------------------------------------------------------- schemas


def _checked(tool: recipe.ToolDefinition) -> recipe.ToolDefinition:
    if not re.fullmatch(r'[^"<>\\\x00-\x20]{1,256}', tool.name):
        raise TaelError(f"tools: {tool.name!r:.80} is no name for a tool")
    if not isinstance(tool.parameters, dict | None):
        raise TaelError(f"tools: the parameters of {tool.name} must be a JSON schema (an object)")
    return tool


def _lenient(tool: recipe.ToolDefinition) -> bool:
    """Keywords that cannot be enforced are passed over, unless the tool is `strict`."""
    return tool.strict is not True


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in _DEFINITIONS if key in schema}


def _parameters(tool: recipe.ToolDefinition) -> dict[str, Any]:
    """The schema; a tool without one takes no arguments."""
    return {"properties": {}, "additionalProperties": False} if tool.parameters is None else dict(tool.parameters)


def _object_schema(tool: recipe.ToolDefinition) -> dict[str, Any]:
    """The parameters' schema: properties, required, definitions, and `others`: the schema of parameters that are not
    listed, None where there are none. Raises TaelError where it says something about the object as a whole."""
    schema = _parameters(tool)
    for _ in range(8):  # pydantic writes a recursive model as a reference to its definition
        place = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(schema.get("$ref")))
        known = schema.get(place[1]) if place else None
        target = known.get(place[2]) if place and isinstance(known, dict) else None
        if not isinstance(target, dict):
            break
        schema = _definitions(schema) | target
    whole = [key for key in ("$ref", *_WHOLE) if key in schema]
    if whole or schema.get("type", "object") != "object":
        what = f"'{whole[0]}' at the top" if whole else f"type {schema['type']!r}"
        raise TaelError(f"tools: the parameters of {tool.name} cannot be enforced: {what}; list them in 'properties'")
    properties, others = _arguments(tool.name, schema)
    if "" in properties:
        raise TaelError(f"tools: the parameters of {tool.name} cannot be enforced: one has an empty name")
    return _definitions(schema) | {
        "properties": properties,
        "required": schema.get("required") or [],
        "others": None if others is False else others,
    }


def _arguments(tool: str, schema: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Arguments that have a name, the required ones among them, and the schema of all others: False where some are
    listed, since one of another name could not be told from those, though JSON schema would allow it."""
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise TaelError(f"tools: the parameters of {tool} are no JSON schema: 'properties' or 'required'")
    more = schema.get("additionalProperties", "properties" not in schema)
    unlisted = {str(name): schema.get("additionalProperties", {}) for name in required if name not in properties}
    return properties | unlisted, False if properties or unlisted else more


def _in_definitions(value: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """One property's schema, with the definitions it may refer to."""
    if value is False:
        value = {"not": {}}
    return _definitions(schema) | (value if isinstance(value, dict) else {})


def _json_schema(schema: dict[str, Any], lenient: bool) -> str:
    guidance = {"whitespace_pattern": WHITE_SPACE, "lenient": lenient}
    try:
        return json.dumps(schema | {"x-guidance": guidance}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise TaelError("tools: a schema is not JSON, or too deep") from None


def _hermes_schema(tool: recipe.ToolDefinition) -> str:
    arguments = _closed(tool)
    properties = {"name": {"const": tool.name}, "arguments": {"type": "object"} | arguments}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return _json_schema(_definitions(arguments) | schema, _lenient(tool))


def _closed(tool: recipe.ToolDefinition) -> dict[str, Any]:
    """The schema without arguments of any odd name: none but the listed ones, or with names as programs have."""
    schema = _parameters(tool)
    if set(schema) & {"$ref", *_WHOLE} or schema.get("additionalProperties") is False:
        return schema
    properties, others = _arguments(tool.name, schema)
    named = {} if others is False else {"patternProperties": {f"^{_NAME}$": others}}
    return schema | {"properties": properties, "additionalProperties": False} | named


# ------------------------------------------------------------------------ Lark


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _marker(tokenizer: Tokenizer, text: str) -> str:
    token = tokenizer.token_id(text)
    return f"<[{token}]>" if token in tokenizer.special_ids else _quoted(text)


def _times(parallel: bool) -> str:
    return f"{{1,{MOST_CALLS}}}" if parallel else ""
