"""What is shown of a run: its curves over steps, tokens, seconds and dollars, its costs, and what is left of it.

What cannot be known is None and is named: no figure here is made up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tael.cost.ledger import Ledger, Total
from tael.cost.prices import dollars
from tael.cost.report import Pair
from tael.cost.runcosts import recipe_price, stage_totals, sum_totals
from tael.cost.rundata import MODES, Line, RunRecord, StageRecord, number, read_accuracy
from tael.serve.run_files import StageFiles

State = Literal["running", "stopped", "finished", "failed"]
Axis = Literal["steps", "tokens", "seconds", "dollars"]

POINTS = 500
"""Of a curve, as many as a plot can show; longer ones are thinned, first and last stay."""
OF_STEPS = (
    "loss", "mtp_loss", "reward", "completion_tokens", "think_rate", "tokens_per_second", "learning_rate",
    "utilisation", "load_max_over_mean",
)  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One quantity of a stage in step order; tokens, seconds and dollars are counted from the stage's beginning."""

    steps: list[float]
    tokens: list[float]
    seconds: list[float]
    dollars: list[float]
    values: list[float]

    def along(self, axis: Axis) -> list[float]:
        """Where the values stand on `axis`."""
        return getattr(self, axis)


@dataclass(frozen=True)
class StageView:
    """One stage. `seconds_left` is None when nothing tells it."""

    name: str
    kind: str
    state: Literal["waiting", "begun", "finished"]
    step: int
    steps: int | None
    """Of the whole stage, as the recipe says."""
    seconds: float
    seconds_left: float | None
    dollars: float
    series: dict[str, Series]
    """By metric name: those of OF_STEPS, bits_per_byte, accuracy.MODE, balance.LAYER (max over mean load)."""

    @property
    def progress(self) -> float:
        """Share of the stage's steps that are done."""
        if self.state == "finished":
            return 1.0
        return min(1.0, self.step / self.steps) if self.steps else 0.0


@dataclass(frozen=True)
class Prediction:
    """What the whole will have cost and how long it takes from here; lower bounds when `unknown` names stages."""

    dollars: float | None
    seconds_left: float | None
    unknown: list[str] = field(default_factory=list)
    basis: str = ""


@dataclass(frozen=True)
class RunHead:
    """A run in a line."""

    name: str
    state: State
    reason: str
    """Why it stopped or failed, where it said so."""
    stage: str
    """The stage at work, or the next one; empty when all are done."""
    progress: float
    """Mean of the stages' shares of steps done."""
    updated: float
    """When it last wrote something (seconds since 1970)."""
    dollars: float
    headline: str
    ours: bool
    """Begun by a RunBook: it can be stopped from here."""


@dataclass(frozen=True)
class RunView:
    """A run in full."""

    head: RunHead
    record: RunRecord
    stages: list[StageView]
    totals: list[Total]
    whole: Total
    price_per_hour: float
    prediction: Prediction
    samples: list[tuple[str, int, list[Pair]]]
    """As in the report: (stage, how many there are, the first of them)."""
    log: list[str]
    notes: list[str] = field(default_factory=list)
    """What could not be read."""


def price(record: RunRecord) -> float:
    """Dollars an hour, as the run's recipe says."""
    return recipe_price(record.recipe)


def costs(record: RunRecord, ledger: Ledger | None) -> tuple[list[Total], Total]:
    """The stages' costs and their sum. The ledger is as old as the last checkpoint: the stage's own clock goes on."""
    per_hour, records = price(record), {stage.name: stage for stage in record.stages}
    totals = []
    for total in stage_totals(record, ledger):
        stage = records.get(total.key)
        if stage is not None and stage.result is None and stage.seconds > total.seconds:
            tokens = number(stage.steps[-1].get("tokens")) if stage.steps else None
            newer = {"seconds": stage.seconds, "dollars": dollars(stage.seconds, per_hour)}
            total = total.model_copy(update=newer | {"tokens": max(total.tokens, int(tokens or 0))})
        totals.append(total)
    return totals, sum_totals(totals)


# ---------------------------------------------------------------------- curves


def stage_series(stage: StageRecord, balance: Mapping[float, list[float]], per_hour: float) -> dict[str, Series]:
    """All curves of a stage that have a value."""
    clock, lines = _clock(stage, per_hour), stage.steps[:: -(-len(stage.steps) // POINTS) or 1]
    lines += stage.steps[-1:] if lines and lines[-1] is not stage.steps[-1] else []
    found = {name: _curve(clock, lines, [number(line.get(name)) for line in lines]) for name in OF_STEPS}
    bits = [number(line.get("bits_per_byte")) for line in stage.evals]
    found["bits_per_byte"] = _curve(clock, stage.evals, bits)
    for mode in MODES:
        accuracies = [read_accuracy(line.get("accuracy"), mode) for line in stage.evals]
        found[f"accuracy.{mode}"] = _curve(clock, stage.evals, [a.share if a else None for a in accuracies])
    steps = sorted(balance)
    for layer in range(max((len(ratios) for ratios in balance.values()), default=0)):
        ratios = [balance[step][layer] if layer < len(balance[step]) else None for step in steps]
        found[f"balance.{layer}"] = _curve(clock, [{"step": step} for step in steps], ratios)
    return {name: series for name, series in found.items() if series is not None}


@dataclass(frozen=True)
class _Clock:
    """Tokens and seconds by step."""

    steps: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    per_hour: float


def _clock(stage: StageRecord, per_hour: float) -> _Clock:
    rows = [(0.0, 0.0, 0.0)]
    for line in stage.steps:
        step, tokens, seconds = (number(line.get(key)) for key in ("step", "tokens", "seconds"))
        if step is not None:
            rows.append(
                (step, rows[-1][1] if tokens is None else tokens, rows[-1][2] if seconds is None else seconds)
            )
    steps, tokens, seconds = np.array(rows).T
    return _Clock(steps, tokens, seconds, per_hour)


def _curve(clock: _Clock, lines: list[Line], values: list[float | None]) -> Series | None:
    pairs = [(number(line.get("step")) or 0.0, v) for line, v in zip(lines, values, strict=True) if v is not None]
    if not pairs:
        return None
    stride = -(-len(pairs) // POINTS)
    kept = [pair for i, pair in enumerate(pairs) if i % stride == 0 or i == len(pairs) - 1]
    steps = np.array([step for step, _ in kept])
    tokens, seconds = (np.interp(steps, clock.steps, column) for column in (clock.tokens, clock.seconds))
    spent = seconds * (clock.per_hour / 3600)
    return Series(steps.tolist(), tokens.tolist(), seconds.tolist(), spent.tolist(), [value for _, value in kept])


# ------------------------------------------------------------------ what is left


def stage_views(
    record: RunRecord, files: Mapping[str, StageFiles], totals: Iterable[Total], known: Mapping[str, float]
) -> list[StageView]:
    """The run's stages; `known`: seconds that a stage not yet begun took in an earlier run of the same kind."""
    per_hour, spent = price(record), {total.key: total.dollars for total in totals}
    views: list[StageView] = []
    for stage in record.stages:
        steps = _whole(stage_settings(record, stage.name).get("steps"))
        step = int(number(stage.steps[-1].get("step")) or 0) if stage.steps else 0
        begun = bool(stage.steps or stage.evals)
        views.append(
            StageView(
                name=stage.name,
                kind=stage.kind,
                state="finished" if stage.result is not None else "begun" if begun else "waiting",
                step=step,
                steps=steps,
                seconds=stage.seconds,
                seconds_left=_seconds_left(record, stage, step, steps, known),
                dollars=spent.get(stage.name, 0.0),
                series=stage_series(stage, files[stage.name].balance, per_hour),
            )
        )
    return views


def stage_settings(record: RunRecord, name: str) -> dict[str, Any]:
    """The stage's table in the run's recipe, as it is written; empty when there is none."""
    tables = record.recipe.get("stages")
    table = tables.get(name) if isinstance(tables, dict) else None
    return table if isinstance(table, dict) else {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _seconds_left(
    record: RunRecord, stage: StageRecord, step: int, steps: int | None, known: Mapping[str, float]
) -> float | None:
    if stage.result is not None:
        return 0.0
    if steps is None:
        return None
    pace = seconds_a_step(stage)
    if pace is not None:
        return pace * max(0, steps - step)
    if stage.name in known and step == 0:
        return known[stage.name]
    return _from_tokens(record, stage, steps) if step == 0 else None


def seconds_a_step(stage: StageRecord) -> float | None:
    """Mean over the steps so far, what evaluations came between them included; None before the second step.

    The first is left out: it is slower, and what came before it was measured too.
    """
    ends = [(number(line.get("step")), number(line.get("seconds"))) for line in (*stage.steps[:1], *stage.steps[-1:])]
    if len(ends) < 2 or None in ends[0] or None in ends[1]:
        return None
    (first, began), (last, now) = ends
    taken = (last or 0.0) - (first or 0.0)
    return max(0.0, (now or 0.0) - (began or 0.0)) / taken if taken > 0 else None


def _from_tokens(record: RunRecord, stage: StageRecord, steps: int) -> float | None:
    """Seconds of a stage over text that is to come: its tokens at the speed of the last such stage of this run."""
    table = stage_settings(record, stage.name)
    rows, length = _whole(table.get("batch_size")), _whole(table.get("sequence_length"))
    speed = _text_speed(record)
    if stage.kind not in ("pretrain", "sft") or rows is None or length is None or speed is None:
        return None
    return steps * rows * length / speed


def _text_speed(record: RunRecord) -> float | None:
    """Tokens a second of the last stage over text that has begun."""
    for stage in reversed(record.stages):
        pace, last = seconds_a_step(stage), stage.steps[-1] if stage.steps else {}
        tokens, step = number(last.get("tokens")), number(last.get("step"))
        if stage.kind in ("pretrain", "sft") and pace and tokens and step:
            return tokens / step / pace
    return None


def predict(stages: list[StageView], whole: Total, per_hour: float) -> Prediction:
    """Total cost and time left, from what every stage that is not finished is known to need."""
    open_ = [stage for stage in stages if stage.state != "finished"]
    unknown = [stage.name for stage in open_ if stage.seconds_left is None]
    left = [stage.seconds_left for stage in open_ if stage.seconds_left is not None]
    if not open_:
        return Prediction(whole.dollars, 0.0)
    if not left:
        return Prediction(None, None, unknown, "Nothing is predicted yet: no stage has taken two steps.")
    basis = "Predicted from the seconds a step so far; later ones by their tokens at that speed, or by an equal run."
    if unknown:
        basis += f" How long {', '.join(unknown)} takes is not known yet and not in the sums."
    return Prediction(whole.dollars + dollars(sum(left), per_hour), sum(left), unknown, basis)
