"""What the plan page computes, outside the event loop: the plan, its curves, the tables of export limits.

The search for a layout takes from a hundredth to a few seconds, and does not depend on price and tokens: points of
curves are remembered without them. `going` tells a long computation whether anybody still wants it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tael.cost.plan_request import Request
from tael.cost.planner import Run, plan_training
from tael.cost.what_if import Case, answers, export_limits
from tael.errors import TaelError
from tael.serve.pages.plan_question import Question

Going = Callable[[], bool]
CHIP_SPAN = 32
"""Curves go from so many times fewer chips to so many times more."""
LINK_FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Answer:
    """A plan with what its pictures need, or the one line that says why there is none."""

    question: Question
    run: Run | None = None
    table: dict[str, Any] | None = None
    problem: str = ""


@dataclass(frozen=True)
class Point:
    """A plan at one place of a curve; None where nothing can be planned."""

    at: float
    days: float | None
    dollars: float | None


@dataclass(frozen=True)
class Curves:
    """Days and dollars over the number of chips and over the link's speed; `chips` and `link` are where we are."""

    over_chips: tuple[Point, ...]
    over_link: tuple[Point, ...]
    chips: float
    link: float


@dataclass(frozen=True)
class Limits:
    """What export limits cost, and what each answer to them buys back."""

    chip: str
    limits: tuple[Case, ...]
    bought: tuple[Case, ...]


def plan(question: Question) -> Answer:
    """The plan; never raises for what was asked."""
    run = None
    try:
        request = question.request()
        run = request.run()
        return Answer(question, run, request.answer())
    except TaelError as error:
        return Answer(question, run, problem=str(error))


def taken(question: Question) -> Run:
    """The run with every blank filled, quickly. Raises TaelError."""
    return question.request().run()


def curves(question: Question, going: Going) -> Curves | None:
    """None when nobody wants them any more, or nothing could be planned."""
    try:
        run = taken(question)
    except TaelError:
        return None
    chips = sorted({*_powers(run.devices), run.devices})
    own = run.chip.link_bandwidth / 1e9 if question.link is None else _own_link(question)
    links = sorted({*(float(f"{own * factor:.3g}") for factor in LINK_FACTORS), run.chip.link_bandwidth / 1e9})
    over_chips = _points(chips, lambda n: replace(question, chips=float(n)), run, going)
    if over_chips is None:
        return None
    over_link = _points(links, lambda g: replace(question, chips=float(run.devices), link=g), run, going)
    if over_link is None:
        return None
    return Curves(over_chips, over_link, run.devices, run.chip.link_bandwidth / 1e9)


def _own_link(question: Question) -> float:
    return taken(replace(question, link=None)).chip.link_bandwidth / 1e9


def _powers(devices: int) -> list[int]:
    """Powers of two around `devices`."""
    low, high = max(1, devices / CHIP_SPAN), min(2**20, devices * CHIP_SPAN)
    return [2**n for n in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]


def _points(places: list[Any], asked: Callable[[Any], Question], run: Run, going: Going) -> tuple[Point, ...] | None:
    points = []
    for place in places:
        if not going():
            return None
        question = asked(place)
        request = replace(question, tokens=None, price=None, layout=None, context=None, speed=None).request()
        found = seconds_a_token(request)
        if found is None:
            points.append(Point(float(place), None, None))
            continue
        seconds, devices = found * run.tokens, question.chips or run.devices
        dollars = None if run.price is None else seconds / 3600 * devices * run.price
        points.append(Point(float(place), seconds / 86400, dollars))
    return tuple(points)


@lru_cache(maxsize=4096)
def seconds_a_token(request: Request) -> float | None:
    """Seconds of the whole cluster for one token of training, by the best layout; None where nothing fits."""
    try:
        run = request.run()
        return plan_training(run).seconds / run.tokens
    except TaelError:
        return None


def limits(question: Question) -> Limits | None:
    """The tables; None where the run itself cannot be planned."""
    try:
        run = taken(question)
        return Limits(run.chip.name, tuple(export_limits(run)), tuple(answers(run)))
    except TaelError:
        return None
