"""What a run was predicted to take beside what it took, by stage: rows for the report, a line for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tael.cost import units
from tael.cost.ledger import EVALUATION, Ledger
from tael.cost.prediction import Prediction, Stage
from tael.cost.runcosts import run_entries, stage_totals
from tael.cost.rundata import RunRecord

Show = Callable[[float | None], str]
_NAMES: tuple[tuple[str, Show], ...] = (
    ("time", units.duration),
    ("tokens", units.count),
    ("FLOPs", units.flops),
    ("peak memory", units.size),
    ("cost", units.money),
)


@dataclass(frozen=True)
class Amounts:
    """What is compared of a stage, predicted or measured; in the order of _NAMES."""

    seconds: float
    tokens: float
    flops: float
    memory_bytes: float
    dollars: float

    @property
    def values(self) -> tuple[float, ...]:
        return self.seconds, self.tokens, self.flops, self.memory_bytes, self.dollars


@dataclass(frozen=True)
class Row:
    """One quantity as it is read."""

    name: str
    predicted: str
    measured: str
    ratio: str


@dataclass(frozen=True)
class Compared:
    """One stage, or several together. `measured` is None before it begins; ratios are told once it is finished."""

    name: str
    status: str
    predicted: Amounts
    measured: Amounts | None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def rows(self) -> list[Row]:
        measured = (None,) * len(_NAMES) if self.measured is None else self.measured.values
        pairs = zip(_NAMES, self.predicted.values, measured, strict=True)
        return [Row(name, show(one), show(other), self._ratio(one, other)) for (name, show), one, other in pairs]

    def _ratio(self, predicted: float, measured: float | None) -> str:
        return f"{measured / predicted:.2f}" if self.finished and predicted and measured else units.MISSING


def compare(run: RunRecord, ledger: Ledger | None, prediction: Prediction) -> list[Compared]:
    """Every stage of the prediction, then those that are finished together (when there is more than one).

    Time, memory and dollars are a stage's with its evaluations, tokens and FLOPs those it was trained on: so they are
    predicted.
    """
    status = {stage.name: stage.status for stage in run.stages}
    measured = _measured(run, ledger)
    stages = [
        Compared(s.name, status.get(s.name, "waiting"), _predicted(s, prediction), measured.get(s.name))
        for s in prediction.stages
    ]
    done = [stage for stage in stages if stage.finished and stage.measured is not None]
    if len(done) > 1:
        name = "all stages" if len(done) == len(stages) else "the finished stages"
        found = [stage.measured for stage in done if stage.measured is not None]
        stages.append(Compared(name, "finished", _sum([s.predicted for s in done]), _sum(found)))
    return stages


def _predicted(stage: Stage, prediction: Prediction) -> Amounts:
    dollars = prediction.dollars(stage.seconds)
    return Amounts(stage.seconds, stage.tokens, stage.flops, stage.memory_bytes, dollars)


def _measured(run: RunRecord, ledger: Ledger | None) -> dict[str, Amounts]:
    """By stage, for those that have begun."""
    evaluated = [entry for entry in run_entries(run, ledger) if entry.kind == EVALUATION]
    found = {}
    for total in stage_totals(run, ledger):
        beside = [entry for entry in evaluated if entry.stage == total.key]
        tokens = total.tokens - sum(entry.tokens for entry in beside)
        flops = total.flops - sum(entry.flops for entry in beside)
        found[total.key] = Amounts(
            total.seconds, max(0, tokens), max(0.0, flops), total.peak_memory_bytes, total.dollars
        )
    return found


def _sum(parts: Sequence[Amounts]) -> Amounts:
    """Sums; of memory the largest."""
    seconds, tokens, flops, memory, dollars = zip(*(part.values for part in parts), strict=True)
    return Amounts(sum(seconds), sum(tokens), sum(flops), max(memory), sum(dollars))


def summary_line(stages: Sequence[Compared], prediction: Prediction) -> str:
    """As in `predicted 25.1 min (rough, 2026-11-24), took 38.3 min: 1.53 times`; empty before a stage is finished."""
    done = [stage for stage in stages if stage.finished and stage.measured is not None]
    if not done or done[-1].measured is None:
        return ""
    last = done[-1]
    one, other, ratio = last.rows[0].predicted, last.rows[0].measured, last.rows[0].ratio
    times = f": {ratio} times" if ratio != units.MISSING else ""
    return f"{last.name}: predicted {one} ({prediction.how}), took {other}{times}"
