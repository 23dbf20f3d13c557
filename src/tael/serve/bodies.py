"""Bodies of requests, read with care: what is no JSON, or of the wrong type, is refused by the field's name."""

from __future__ import annotations

import json
import re
from typing import Any

from tael.serve.errors import ApiError

Body = dict[str, Any]

DEEPEST = 100
"""Levels of lists and objects in a body."""


def parse_json(raw: bytes) -> Body:
    """The body as a JSON object. Raises ApiError 400.

    Beyond JSON's own rules: no half characters, which nobody can encode, no numbers beyond 20 digits, and so little
    depth that nothing that walks through it can run out of stack.
    """
    try:
        body = json.loads(raw.decode(), parse_int=_whole, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {kind_of(body)}")
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and _is_deep(body):
        raise ApiError(400, f"the body is nested deeper than {DEEPEST} levels")
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        _refuse_half_characters(body)
    return body


def _whole(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _is_deep(body: Body) -> bool:
    level: list[Any] = [body]
    for _ in range(DEEPEST):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return bool(level)


def _refuse_half_characters(body: Body) -> None:
    for name, value in body.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = name.encode("ascii", "backslashreplace").decode()
            message = f"{shown}: holds half of a surrogate pair, which is no character"
            raise ApiError(400, message, shown) from None


def field(body: Body, name: str, kind: type, default: Any = None) -> Any:
    """`body[name]` if it is of `kind`; a whole number will do for float, null and absence are the default."""
    value = body.get(name)
    if value is None:
        return default
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "an object"}
        raise ApiError(422, f"{name}: must be {words.get(kind, kind.__name__)}, not {kind_of(value)}", name)
    return value


def read_sampling(body: Body) -> dict[str, Any]:
    """Fields of SamplingParams that all protocols share and deepseek-recipe does not know. Raises ApiError."""
    return {
        "top_k": field(body, "top_k", int, 0),
        "min_p": field(body, "min_p", float, 0.0),
        "repetition_penalty": field(body, "repetition_penalty", float, 1.0),
        "presence_penalty": field(body, "presence_penalty", float, 0.0),
        "frequency_penalty": field(body, "frequency_penalty", float, 0.0),
        "logit_bias": _bias(body),
        "loop_guard": field(body, "loop_guard", bool, True),
    }


def _bias(body: Body) -> tuple[tuple[int, float], ...]:
    """logit_bias: token ids (as text, since JSON's keys are) to numbers."""
    bias = field(body, "logit_bias", dict, {})
    try:
        return tuple((int(token), float(value)) for token, value in bias.items())
    except (TypeError, ValueError):
        raise ApiError(422, "logit_bias: must map token ids to numbers", "logit_bias") from None


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"{value!r:.40}")
