"""What the plan page is asked: read from its address, written to it, and as the command that asks the same.

    question = read_question({"model": "deepseek-v3", "chips": "2048", "price": "2"})
    question.address()       /plan?model=deepseek-v3&chips=2048&price=2
    question.command()       tael plan deepseek-v3 --chips 2048 --price 2

Everything in an address is a stranger's: models and chips are looked up by name, never opened as files.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from urllib.parse import urlencode

from tael.cost.chips import BITS, find_chip
from tael.cost.named import NamedModel, find_model
from tael.cost.plan_request import Request, parse_layout
from tael.errors import TaelError, did_you_mean

MODEL = "deepseek-v3"
LONGEST = 200
"""Characters of a value that are read."""
_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_WORDS = {
    "chips": "number of chips", "tokens": "number of tokens", "price": "price an hour", "link": "link speed",
    "sequence": "sequence length", "batch_tokens": "tokens of a batch", "context": "context", "speed": "speed",
}  # fmt: skip
_WHOLE = ("chips", "sequence")


@dataclass(frozen=True)
class Question:
    """The choices on the page; None is the model's or the chip's own, or what the planner takes."""

    model: str = MODEL
    chip: str = "H800"
    chips: float | None = None
    tokens: float | None = None
    price: float | None = None
    link: float | None = None
    """GB/s, one direction."""
    precision: str | None = None
    layout: str | None = None
    sequence: float | None = None
    batch_tokens: float | None = None
    context: float | None = None
    speed: float | None = None

    def request(self) -> Request:
        """The same for the planner. Raises TaelError for an unknown model: its name is never taken for a path."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        given = {key: value for key, value in given.items() if value is not None}
        for key in _WHOLE:
            if key in given:
                given[key] = int(given[key])
        return Request(self.known_model().name, **given)

    def known_model(self) -> NamedModel:
        return find_model(self.model)

    def with_value(self, key: str, value: str) -> Question:
        """The question with one choice changed, as it was typed; empty is the model's or chip's own again.

        Another model takes its own tokens and as many chips as it needs; another chip its own price and link.
        Raises TaelError for what is no number, or a name nobody knows.
        """
        value = value.strip()[:LONGEST]
        if key == "model":
            return replace(self, model=find_model(value).name, chips=None, tokens=None, precision=None, layout=None,
                           sequence=None, batch_tokens=None)  # fmt: skip
        if key == "chip":
            return replace(self, chip=find_chip(value).name, price=None, link=None)
        return replace(self, **{key: _read(key, value)})

    def values(self) -> dict[str, str]:
        """What differs from the page's first question."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: written(value) for key, value in known.items() if value is not None and value != getattr(FIRST, key)
        }

    def address(self) -> str:
        return "/plan" + (f"?{urlencode({'model': self.model, **self.values()})}" if self != FIRST else "")

    def command(self) -> str:
        """As it is typed in a terminal."""
        values = self.values()
        values.pop("model", None)
        options = [f"--{key.replace('_', '-')} {shlex.quote(value)}" for key, value in values.items()]
        return " ".join(["tael plan", self.model, *options])


FIRST = Question()


def read_question(query: Mapping[str, str]) -> tuple[Question, list[str]]:
    """(the question of an address, a line for each choice in it that cannot be read and was left out)."""
    question, problems = FIRST, []
    for field in fields(Question):  # in this order: a model and a chip reset what belongs to the one before
        value = query.get(field.name, "")
        if value:
            try:
                question = question.with_value(field.name, value)
            except TaelError as error:
                problems.append(str(error))
    return question, problems


def written(value: float | str) -> str:
    """A value as it stands in an address or a command."""
    if isinstance(value, str):
        return value
    return str(int(value)) if value == int(value) and abs(value) < 1e9 else f"{value:.12g}"


def parse_number(text: str) -> float:
    """`2,048`, `14.8T`, `14.8e12`, `$2` -> a finite number; raises ValueError."""
    plain = text.strip().removeprefix("$").replace(",", "").replace("_", "").replace(" ", "")
    factor = _SUFFIXES.get(plain[-1:].upper(), 1.0)
    number = float(plain[:-1] if factor != 1.0 else plain) * factor
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _read(key: str, value: str) -> float | str | None:
    if not value:
        return None
    if key == "precision":
        if value not in BITS:
            raise TaelError(f"unknown precision '{value}'{did_you_mean(value, BITS)}")
        return value
    if key == "layout":
        parse_layout(value, 1)  # what it says must make sense; whether it fits the chips, the plan says
        return value
    try:
        number = parse_number(value)
    except ValueError:
        raise TaelError(f"{_WORDS[key]}: '{value}' is not a number; write it as 2048, 14.8T or 1.5e12") from None
    if not (0 <= number < 1e24 if key == "price" else 0 < number < 1e24):
        raise TaelError(f"{_WORDS[key]} must be above 0, not {value}")
    if key in _WHOLE and (number != int(number) or number > 1e9):
        raise TaelError(f"{_WORDS[key]} must be a whole number of at most a billion, not {value}")
    return number
