"""JSON schemas as the client sent them.

deepseek-recipe keeps of a strict schema what DeepSeek's API enforces, and drops bounds of lengths in silence; here
they are enforced too. Of Messages' output formats it knows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tael.serve.errors import ApiError

Schema = dict[str, Any]
_DROPPED = ("minItems", "maxItems", "minLength", "maxLength")


def restored(kept: Any, given: Any) -> Any:
    """`kept` with the bounds that it has lost of `given`."""
    if isinstance(kept, dict) and isinstance(given, Mapping):
        found = {key: restored(value, given.get(key)) for key, value in kept.items()}
        is_schema = isinstance(kept.get("type"), str)  # and not a list of properties, one of them called maxItems
        lost = {key: given[key] for key in _DROPPED if key in given and key not in kept} if is_schema else {}
        return found | lost
    if isinstance(kept, list) and isinstance(given, list) and len(kept) == len(given):
        return [restored(*pair) for pair in zip(kept, given, strict=True)]
    return kept


def of_answer(body: Mapping[str, Any]) -> Any:
    """The schema for the answer in a Chat Completions request."""
    return _inside(body, "response_format", "json_schema", "schema")


def of_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the tools by name, in any of the protocols."""
    tools = body.get("tools")
    found: dict[str, Any] = {}
    for tool in tools if isinstance(tools, list) else ():
        holder = _inside(tool, "function") or tool
        if isinstance(holder, Mapping) and isinstance(holder.get("name"), str):
            found[holder["name"]] = holder.get("parameters", holder.get("input_schema"))
    return found


def of_message(body: Mapping[str, Any]) -> Schema | None:
    """The schema for the answer in a Messages request. Raises ApiError."""
    name = "output_format" if body.get("output_format") is not None else "output_config.format"
    form = body.get("output_format") if name == "output_format" else _inside(body, "output_config", "format")
    if form is None:
        return None
    if not isinstance(form, Mapping) or form.get("type") != "json_schema":
        raise ApiError(422, f"{name}: must be an object of type json_schema", name)
    schema = form.get("schema")
    if not isinstance(schema, dict):
        raise ApiError(422, f"{name}.schema: must be an object", name)
    if body.get("tools"):
        raise ApiError(400, f"{name}: cannot be had beside tools", name)
    return schema


def _inside(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
