"""How long one training step takes: compute by roofline, communication that stays exposed, bubbles, the optimiser.

Docs: docs/cost.md has every equation. `Constants` are the only numbers here that are not data sheet or shape; they
hold for all runs alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tael.cost.chips import Chip
from tael.cost.collectives import all_gather, dispatch, group, point_to_point
from tael.cost.layout import Layout, rounds
from tael.cost.memory import GRADIENT, WEIGHT, local_parameters, optimiser_bytes
from tael.cost.shapes import Shape


@dataclass(frozen=True)
class Constants:
    """Five numbers for all runs. `sustained` is fitted (bench/planner_vs_published.py); `hidden` is a first guess,
    kept with the results in view (docs/cost.md); the others are taken from what was published about them."""

    sustained: float = 0.66
    """Fraction of the roofline's speed that whole training programs keep: launches, imbalance, clocks, data."""
    hidden: float = 0.7
    """Fraction of communication beside tensor parallelism that runs behind compute."""
    attention: float = 0.7
    """Speed of fused attention over that of a good matrix product (FlashAttention-2 and -3 papers, both ways)."""
    bandwidth: float = 0.8
    """Fraction of memory, link and network bandwidth reached (DeepEP: 153 of 200 GB/s NVLink, 43 of 50 network)."""
    lost_hours: float = 0.25
    """Hours lost at an interruption; one comes every `HOURS_BETWEEN` device-hours."""


HOURS_BETWEEN = 50_700.0
"""Device-hours between interruptions: Llama 3 had 419 unexpected ones in 54 days on 16,384 H100 (section 3.3.4)."""
ATTENTION_BACKWARD = 2.5
"""Backward over forward FLOPs of fused attention: the scores are made again (FlashAttention, 5 products to 2)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the critical path."""

    compute: float
    communication: float
    """Exposed only."""
    bubble: float
    optimiser: float
    hidden_communication: float = 0.0
    """What runs behind compute; no part of the total."""

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble + self.optimiser

    def to_dict(self) -> dict[str, float]:
        parts = ("compute", "communication", "bubble", "optimiser")
        return {**{part: getattr(self, part) for part in parts}, "hidden_communication": self.hidden_communication}


@dataclass(frozen=True)
class Transfer:
    """Seconds of one kind of communication in a step."""

    exposed: float
    hidden: float
    """Behind compute; no part of the step's total."""


class StepModel:
    """Times layouts of one model on one kind of chip; what does not depend on the layout is worked out once."""

    def __init__(self, shape: Shape, chip: Chip, sequence: int, precision: str, constants: Constants | None = None):
        self.shape, self.chip, self.sequence = shape, chip, sequence
        self.precision = chip.best_precision(precision)
        self.constants = constants or Constants()
        main, extra = shape.flops(sequence / 2), shape.mtp_flops(sequence / 2).times(3.0 * shape.mtp)
        parts = {key: value + getattr(extra, key) for key, value in vars(main).items()}
        self._low = parts["projections"] + parts["dense"] + parts["experts"] + parts["indexer"]
        self._high = parts["router"] + parts["head"]
        self._scores = parts["scores"] * (1 + ATTENTION_BACKWARD) / 3
        self._values = shape.traffic_values() * (1 + shape.mtp / shape.layers)
        self._moe_layers = sum(b.count for b in shape.blocks if b.experts) + (shape.mtp if shape.experts else 0)
        self._chosen = max((block.chosen for block in shape.blocks), default=0)

    # ------------------------------------------------------------------ one device, one token

    def token_seconds(self, recompute: str = "none") -> float:
        """Compute seconds one token costs a whole model replica of one device, both ways, at the roofline."""
        chip, c = self.chip, self.constants
        low, high = chip.sustained(self.precision), chip.sustained(chip.best_precision("bf16"))
        passes = {"none": 1.0, "selective": 1.0, "full": 4.0 / 3.0}[recompute]
        low_flops = self._low * passes
        if recompute == "selective":  # MLA's up-projections and the products; a tenth of a forward pass
            low_flops *= 1 + 0.1 / 3
        products = low_flops / low + self._high * passes / high
        scores = self._scores * passes / (high * c.attention)
        traffic = 3.0 * passes * self._values * 2.0 / (chip.memory_bandwidth * c.bandwidth)
        return products + scores + traffic

    # ------------------------------------------------------------------------------- one step

    def step(self, layout: Layout, sequences: float) -> StepTime:
        """Seconds of a step over `sequences` sequences under `layout`."""
        c = self.constants
        micros, tokens, compute = self._micro(layout, sequences)
        tensor = self._tensor_seconds(layout, tokens)
        beside = self._beside_seconds(layout, tokens) + self._data_seconds(layout, micros) / micros
        exposed = max((1 - c.hidden) * beside, beside - compute)
        per_micro = compute + tensor + exposed
        bubble = (layout.pipeline - 1) / rounds(self.shape, layout.pipeline) * per_micro
        return StepTime(
            compute=micros * compute,
            communication=micros * (tensor + exposed),
            bubble=bubble,
            optimiser=self._optimiser_seconds(layout),
            hidden_communication=micros * (beside - exposed),
        )

    def communication(self, layout: Layout, sequences: float) -> dict[str, Transfer]:
        """The step's communication by what it is for. The exposed parts add up to the step's `communication`.

        What hides behind compute is not told apart by kind in the model of time: every kind beside tensor
        parallelism is taken to hide in the same proportion.
        """
        micros, tokens, compute = self._micro(layout, sequences)
        beside = {
            "expert": self._expert_seconds(layout, tokens),
            "pipeline": self._pipeline_seconds(layout, tokens),
            "context": self._context_seconds(layout, tokens),
            "data": self._data_seconds(layout, micros) / micros,
        }
        whole = sum(beside.values())
        exposed = max((1 - self.constants.hidden) * whole, whole - compute)
        share = exposed / whole if whole else 0.0
        kinds = {"tensor": Transfer(micros * self._tensor_seconds(layout, tokens), 0.0)}
        for kind, seconds in beside.items():
            kinds[kind] = Transfer(micros * seconds * share, micros * seconds * (1 - share))
        return kinds

    def _micro(self, layout: Layout, sequences: float) -> tuple[int, float, float]:
        """(micro-batches of a data rank, tokens of one on a device, compute seconds of one)."""
        micros = max(1, math.ceil(sequences / (layout.data * layout.micro_batch) - 1e-9))
        tokens = layout.micro_batch * self.sequence / layout.context
        stage = math.ceil(self.shape.layers / layout.pipeline) / self.shape.layers
        compute = tokens * self.token_seconds(layout.recompute) * stage / layout.tensor
        return micros, tokens, max(compute, self._weight_seconds(layout)) / self.constants.sustained

    def _weight_seconds(self, layout: Layout) -> float:
        """Reading a stage's weights from memory three times: what a small micro-batch cannot go below."""
        dense, routed = local_parameters(self.shape, layout)
        return 3.0 * WEIGHT * (dense + routed) / (self.chip.memory_bandwidth * self.constants.bandwidth)

    def _tensor_seconds(self, layout: Layout, tokens: float) -> float:
        """Tensor parallelism with sequence parallelism: an all-gather and a reduce-scatter before and after
        attention and feed-forward, forward and backward (Korthikanti et al. 2022): 8 a layer, on the critical path.
        """
        if layout.tensor == 1:
            return 0.0
        layers = math.ceil(self.shape.layers / layout.pipeline)
        size = tokens * self.shape.hidden * 2.0
        one = all_gather(self.chip, group(self.chip, layout.tensor), size, self.constants.bandwidth)
        return 8.0 * layers * one

    def _beside_seconds(self, layout: Layout, tokens: float) -> float:
        """Expert dispatch and combine, pipeline and context transfers of one micro-batch."""
        return (
            self._expert_seconds(layout, tokens)
            + self._pipeline_seconds(layout, tokens)
            + self._context_seconds(layout, tokens)
        )

    def _expert_seconds(self, layout: Layout, tokens: float) -> float:
        """Dispatch and combine, forward and backward."""
        if layout.expert == 1 or not self._chosen:
            return 0.0
        chip, shape, c = self.chip, self.shape, self.constants
        stage = math.ceil(shape.layers / layout.pipeline) / shape.layers
        members = group(chip, layout.expert, layout.tensor)
        there = 1.0 if self.precision in ("fp8", "fp4") else 2.0
        row = (there + 2.0) * shape.hidden  # dispatch in fp8 where trained so, combine in bf16 (V3, 3.3.3)
        once = dispatch(chip, members, tokens / layout.tensor, row, self._chosen, shape.node_limit, c.bandwidth)
        return 2.0 * self._moe_layers * stage * once

    def _pipeline_seconds(self, layout: Layout, tokens: float) -> float:
        """A stage's outputs to the next stage, and their gradients back."""
        if layout.pipeline == 1:
            return 0.0
        size = tokens * self.shape.hidden * 2.0 / layout.tensor
        inner = layout.tensor * layout.data * layout.context
        once = point_to_point(self.chip, size, remote=inner >= self.chip.domain, efficiency=self.constants.bandwidth)
        return 2.0 * rounds(self.shape, layout.pipeline) * once

    def _context_seconds(self, layout: Layout, tokens: float) -> float:
        """Keys and values of a sequence's other parts, three times."""
        if layout.context == 1:
            return 0.0
        shape = self.shape
        stage = math.ceil(shape.layers / layout.pipeline) / shape.layers
        kv = sum(block.count * block.attention.kv_heads * (block.attention.qk + block.attention.v)
                 for block in shape.blocks)  # fmt: skip
        size = tokens * layout.context * kv * 2.0 * stage / layout.tensor
        members = group(self.chip, layout.context, layout.tensor)
        return 3.0 * all_gather(self.chip, members, size, self.constants.bandwidth)

    def _data_seconds(self, layout: Layout, micros: int) -> float:
        """Gradients to their shards and weights back, once a step.

        Sharded gradients (ZeRO-2) go with every micro-batch; FSDP fetches weights twice a micro-batch as well.
        """
        dense, routed = local_parameters(self.shape, layout)
        ranks = layout.data * layout.context
        own = group(self.chip, ranks, layout.tensor)
        others = group(self.chip, max(1, ranks // layout.expert), layout.tensor * layout.expert)
        times = 2.0 * micros if layout.shard == 3 else 1.0
        seconds = 0.0
        for members, parameters in ((own, dense), (others, routed)):
            weights = all_gather(self.chip, members, WEIGHT * parameters, self.constants.bandwidth)
            gradients = all_gather(self.chip, members, GRADIENT * parameters, self.constants.bandwidth)
            seconds += times * weights + (micros if layout.shard >= 2 else 1.0) * gradients
        return seconds

    def _optimiser_seconds(self, layout: Layout) -> float:
        """Reading and writing the states of this device's shard."""
        dense, routed = local_parameters(self.shape, layout)
        ranks = layout.data * layout.context
        mine = dense / ranks + routed / (ranks / layout.expert)
        touched = 2.0 * optimiser_bytes(self.precision) + GRADIENT + WEIGHT
        return mine * touched / (self.chip.memory_bandwidth * self.constants.bandwidth)


def goodput(devices: int, constants: Constants) -> float:
    """Share of the time that trains: 1 / (1 + devices x lost hours / hours between interruptions)."""
    return 1.0 / (1.0 + devices * constants.lost_hours / HOURS_BETWEEN)


def with_recompute(layout: Layout, kind: str) -> Layout:
    return replace(layout, recompute=kind)  # type: ignore[arg-type]
