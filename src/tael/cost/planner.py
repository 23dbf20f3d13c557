"""Plans a training run: the best layout for a model on chips, and what the run will cost.

`plan_training` searches every layout `layouts()` gives, leaves out what does not fit into memory, and keeps the
fastest. Hours follow from the step, money from hours, energy from hours and the board's power.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tael.cost.chips import Chip, find_chip
from tael.cost.layout import Layout, check_layout, layouts
from tael.cost.memory import Memory, training_memory
from tael.cost.shapes import Flops, Shape
from tael.cost.timing import Constants, StepModel, StepTime, Transfer, goodput, with_recompute
from tael.errors import TaelError

MEAN_LOAD = 0.85
"""Mean draw of a training device over its board power (Meta reports energy at 0.7 to 1.0 of it)."""
OVERHEAD = 1.25
"""Cooling, power supply and host over the devices' own draw: BLOOM's and Meta's reports give 1.1 to 1.2 and more."""


@dataclass(frozen=True)
class Run:
    """What is to be trained, on what, at which price."""

    shape: Shape
    tokens: float
    sequence: int
    batch_tokens: float
    precision: str
    chip: Chip
    devices: int
    dollars_per_hour: float | None = None

    @property
    def price(self) -> float | None:
        return self.chip.dollars_per_hour if self.dollars_per_hour is None else self.dollars_per_hour


@dataclass(frozen=True)
class Plan:
    """A run planned."""

    run: Run
    precision: str
    layout: Layout
    step: StepTime
    communication: dict[str, Transfer]
    memory: Memory
    flops: Flops
    sequences: float
    goodput: float

    @property
    def steps(self) -> float:
        return self.run.tokens / (self.sequences * self.run.sequence)

    @property
    def seconds(self) -> float:
        return self.steps * self.step.total / self.goodput

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.run.devices / 3600

    @property
    def dollars(self) -> float | None:
        return None if self.run.price is None else self.gpu_hours * self.run.price

    @property
    def joules(self) -> float:
        return self.gpu_hours * 3600 * self.run.chip.watts * MEAN_LOAD * OVERHEAD

    @property
    def utilisation(self) -> float:
        """Model FLOPs over bf16 peak (MFU, interruptions counted)."""
        peak = self.run.chip.peaks.get("bf16", self.run.chip.peaks["fp32"])
        return self.flops.total * self.run.tokens / (self.seconds * self.run.devices * peak)

    @property
    def tokens_per_second(self) -> float:
        """Of one device, while steps run."""
        return self.sequences * self.run.sequence / self.step.total / self.run.devices

    def to_dict(self) -> dict[str, Any]:
        """The object `tael plan --json` prints."""
        run, shape = self.run, self.run.shape
        return {
            "model": shape.name,
            "chip": run.chip.name,
            "chips": run.devices,
            "tokens": run.tokens,
            "sequence": run.sequence,
            "batch_tokens": self.sequences * run.sequence,
            "precision": self.precision,
            "price_per_hour": run.price,
            "parameters_total": shape.parameters(mtp=False),
            "parameters_active": shape.parameters(active=True, mtp=False),
            "parameters_mtp": shape.parameters() - shape.parameters(mtp=False),
            "flops_per_token": self.flops.total,
            "flops_by_part": dict(vars(self.flops)),
            "memory_bytes_per_device": self.memory.total,
            "memory_by_part": dict(vars(self.memory)),
            "layout": {**self.layout.to_dict(), "text": str(self.layout)},
            "step_seconds": self.step.total,
            "step_by_part": self.step.to_dict(),
            "communication_by_kind": {kind: dict(vars(each)) for kind, each in self.communication.items()},
            "steps": self.steps,
            "goodput": self.goodput,
            "tokens_per_second_per_device": self.tokens_per_second,
            "utilisation": self.utilisation,
            "gpu_hours": self.gpu_hours,
            "days": self.seconds / 86400,
            "dollars": self.dollars,
            "joules": self.joules,
        }


def plan_training(run: Run, constants: Constants | None = None, layout: Layout | None = None) -> Plan:
    """The fastest plan that fits, or that of `layout` if one is given. Raises TaelError when there is none."""
    _check(run)
    constants = constants or Constants()
    model = StepModel(run.shape, run.chip, run.sequence, run.precision, constants)
    sequences = max(1.0, run.batch_tokens / run.sequence)
    if layout is not None:
        check_layout(layout, run.shape, run.devices, sequences)
        memory = training_memory(run.shape, run.chip, layout, run.sequence, model.precision)
        if memory.total > run.chip.memory_bytes:
            raise TaelError(
                f"layout: needs {memory.total / 1e9:.0f} GB a device, {run.chip.name} has "
                f"{run.chip.memory_bytes / 1e9:.0f} GB"
            )
        best: tuple[Layout, StepTime] | None = (layout, model.step(layout, sequences))
    else:
        best = _search(model, run, sequences)
    if best is None:
        raise TaelError(_too_large(run, sequences))
    return Plan(
        run=run,
        precision=model.precision,
        layout=best[0],
        step=best[1],
        communication=model.communication(best[0], sequences),
        memory=training_memory(run.shape, run.chip, best[0], run.sequence, model.precision),
        flops=run.shape.flops(run.sequence / 2),
        sequences=sequences,
        goodput=goodput(run.devices, constants),
    )


def _search(model: StepModel, run: Run, sequences: float) -> tuple[Layout, StepTime] | None:
    best: tuple[Layout, StepTime] | None = None
    for candidate in layouts(run.shape, run.chip, run.devices, sequences, run.sequence):
        for kind in ("none", "selective", "full"):
            layout = with_recompute(candidate, kind)
            memory = training_memory(run.shape, run.chip, layout, run.sequence, model.precision)
            if memory.total > run.chip.memory_bytes:
                continue
            step = model.step(layout, sequences)
            if best is None or step.total < best[1].total:
                best = layout, step
            break  # to make activations again never makes a step that fits faster
    return best


def _check(run: Run) -> None:
    for name, value in (
        ("tokens", run.tokens),
        ("sequence length", run.sequence),
        ("batch tokens", run.batch_tokens),
        ("chips", run.devices),
    ):
        if not 0 < value < 1e24:
            raise TaelError(f"{name} must be above 0, not {value:g}")
    if run.price is not None and not 0 <= run.price < 1e9:
        raise TaelError(f"price must be 0 or more dollars an hour, not {run.price:g}")


def _too_large(run: Run, sequences: float) -> str:
    least = run.shape.parameters() * 14 / run.devices / 1e9
    if least > run.chip.memory_bytes / 1e9:
        need = run.shape.parameters() * 18 / (run.chip.memory_bytes * 0.85)
        return (
            f"{run.shape.name} does not fit: weights, gradients and optimiser alone are {least:,.0f} GB a device, "
            f"{run.chip.name} has {run.chip.memory_bytes / 1e9:.0f} GB; about {need:,.0f} chips would do"
        )
    return (
        f"{run.shape.name}: no layout of {run.devices} {run.chip.name} fits a batch of {sequences:g} sequences of "
        f"{run.sequence} tokens; try fewer chips, a larger --batch-tokens or a shorter --sequence"
    )


def plan_on(run: Run, chip: str | Chip, constants: Constants | None = None) -> Plan:
    """The same run on another chip, at the same price where one was given."""
    return plan_training(replace(run, chip=find_chip(chip) if isinstance(chip, str) else chip), constants)
