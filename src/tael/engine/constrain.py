"""Answers in a given form: JSON, a JSON schema, a regular expression, or one of some choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["json_object", "json_schema", "regex", "choice"]


@dataclass(frozen=True)
class Constraint:
    """What an answer has to look like."""

    kind: Kind
    value: str | tuple[str, ...] = ()
