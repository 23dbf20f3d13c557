"""What export limits cost, and what DeepSeek's answers to them buy back: the same run with one thing changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tael.cost.chips import Chip, cap_performance, cut_link, find_chip, without
from tael.cost.planner import Plan, Run, plan_training
from tael.cost.serving import Service, plan_serving
from tael.cost.shapes import Shape, grouped
from tael.cost.timing import Constants
from tael.errors import TaelError

GB = 1e9


@dataclass(frozen=True)
class Case:
    """One line: a change, the run under it, and what a million output tokens then cost to serve."""

    name: str
    gpu_hours: float | None
    days: float | None
    dollars: float | None
    output_dollars: float | None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def changed_chip(chip: Chip, link_gb: float | None, tpp: float | None, left_out: str | None) -> Chip:
    """The chip under the switches of `tael plan`: link in GB/s each way, cap on TPP, a precision taken out."""
    if link_gb is not None:
        if link_gb <= 0:
            raise TaelError(f"a link needs more than 0 GB/s, not {link_gb:g}")
        chip = cut_link(chip, link_gb * GB)
    chip = cap_performance(chip, tpp) if tpp is not None else chip
    return without(chip, left_out) if left_out is not None else chip


def export_limits(run: Run, constants: Constants | None = None) -> list[Case]:
    """The run on H100, H800 (links cut), H20 (performance capped) and H100 slowed to each rule's threshold.

    Dollars are at one price for all, the run's, so that only the limits speak. Thresholds: TPP 4800 (ECCN 3A090.a,
    2023-10), and 2400, above which the rule asks for a low performance density.
    """
    h100 = find_chip("H100")
    chips = [
        ("H100", h100),
        ("H800: links cut to 200 GB/s", find_chip("H800")),
        ("H20: TPP 2368", find_chip("H20")),
        ("H100 capped at TPP 4800", cap_performance(h100, 4800)),
        ("H100 capped at TPP 2400", cap_performance(h100, 2400)),
    ]
    return [case(name, replace(run, chip=chip, dollars_per_hour=run.price), constants) for name, chip in chips]


def answers(run: Run, constants: Constants | None = None) -> list[Case]:
    """The run as it is, then without each of DeepSeek's answers in turn."""
    shape = run.shape
    cases = [case("as it is", run, constants)]
    if shape.node_limit is not None:
        free = replace(shape, name=shape.name, node_limit=None)
        cases.append(case("without node-limited routing", replace(run, shape=free), constants))
    if run.precision == "fp8":
        cases.append(case("without FP8", replace(run, precision="bf16"), constants))
    if any(block.attention.decode_qk for block in shape.blocks):
        cases.append(
            case("without MLA: every head keeps keys, values", replace(run, shape=multi_head(shape)), constants)
        )
    if shape.mtp:
        plain = replace(shape, mtp=0)
        cases.append(
            case("without MTP", replace(run, shape=plain), constants, "training is cheaper, decoding dearer")
        )
    return cases


def multi_head(shape: Shape) -> Shape:
    """The shape with plain multi-head attention of the same heads and value width in MLA's place."""
    blocks = tuple(
        replace(
            block, attention=grouped(shape.hidden, block.attention.heads, block.attention.heads, block.attention.v)
        )
        for block in shape.blocks
    )
    return replace(shape, blocks=blocks)


def case(name: str, run: Run, constants: Constants | None = None, note: str = "") -> Case:
    """One line; where nothing fits, its note says so instead of figures."""
    plan: Plan | None = None
    try:
        plan = plan_training(run, constants)
    except TaelError as error:
        note = str(error)
    return Case(
        name=name,
        gpu_hours=plan.gpu_hours if plan else None,
        days=plan.seconds / 86400 if plan else None,
        dollars=plan.dollars if plan else None,
        output_dollars=_output_dollars(run, constants),
        note=note,
    )


def _output_dollars(run: Run, constants: Constants | None) -> float | None:
    """Dollars a million output tokens on a unit of 144 (with experts) or 8, MTP drafting where the model has it."""
    devices = 144 if run.shape.experts else 8
    drafted = 0.85 if run.shape.mtp else 0.0
    service = Service(run.shape, run.chip, devices, 4989.0, precision=run.precision, drafted=drafted)
    try:
        serving = plan_serving(service, constants)
    except TaelError:
        return None
    return None if run.price is None else serving.dollars_per_million(run.price)[1]
