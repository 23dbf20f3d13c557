"""How a model is spread over devices, and which ways there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tael.cost.chips import Chip
from tael.cost.shapes import Shape
from tael.errors import TaelError

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; tensor * context * pipeline * data = devices. Experts lie across data and context."""

    data: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    shard: int = 1
    """ZeRO stage: 1 shards the optimiser over the data ranks, 2 also gradients, 3 also weights (FSDP)."""
    recompute: Recompute = "none"
    micro_batch: int = 1
    """Sequences."""

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        named = (("DP", self.data), ("TP", self.tensor), ("PP", self.pipeline), ("CP", self.context))
        parts = [f"{name} {size}" for name, size in (*named, ("EP", self.expert)) if size > 1]
        kind = "FSDP" if self.shard == 3 else f"ZeRO-{self.shard}"
        return (
            f"{' x '.join(parts) or 'one device'}, {kind}, micro-batch {self.micro_batch}, recompute {self.recompute}"
        )


def check_layout(layout: Layout, shape: Shape, devices: int, sequences: float) -> None:
    """Raise TaelError for what cannot be run at all."""
    for name, size in asdict(layout).items():
        if isinstance(size, int) and size < 1:
            raise TaelError(f"layout: {name} must be 1 or more, not {size}")
    if layout.devices != devices:
        raise TaelError(
            f"layout: data {layout.data} x tensor {layout.tensor} x pipeline {layout.pipeline} x context "
            f"{layout.context} are {layout.devices} devices, not the {devices} there are"
        )
    if layout.pipeline > shape.layers:
        raise TaelError(f"layout: pipeline {layout.pipeline} is more than the {shape.layers} layers")
    heads = shape.blocks[0].attention.heads
    if heads % layout.tensor:
        raise TaelError(f"layout: tensor {layout.tensor} does not divide the {heads} heads")
    if layout.expert > 1 and (not shape.experts or shape.experts % layout.expert):
        raise TaelError(f"layout: expert {layout.expert} does not divide the {shape.experts} experts")
    if layout.expert > layout.data * layout.context:
        raise TaelError(f"layout: expert {layout.expert} is more than data x context {layout.data * layout.context}")
    if layout.data * layout.micro_batch > sequences:
        raise TaelError(
            f"layout: {layout.data} data ranks of {layout.micro_batch} sequences are more than the {sequences:g} "
            "of a batch; use fewer data ranks or a larger batch"
        )


def rounds(shape: Shape, pipeline: int) -> int:
    """Times a micro-batch goes round the pipeline: up to four of interleaved 1F1B, one layer a turn at least."""
    return max(1, min(4, shape.layers // pipeline)) if pipeline > 1 else 1


def layouts(shape: Shape, chip: Chip, devices: int, sequences: float, sequence: int) -> Iterator[Layout]:
    """Every layout worth a look: degrees that divide what they must, tensor parallelism within a domain only."""
    heads = shape.blocks[0].attention.heads
    for tensor in _divisors(devices, min(chip.domain, heads, 16)):
        if heads % tensor:
            continue
        for pipeline in _divisors(devices // tensor, min(shape.layers, 64)):
            for context in _divisors(devices // tensor // pipeline, max(1, sequence // 8192)):
                data = devices // tensor // pipeline // context
                if data > sequences:
                    continue
                for expert in _expert_degrees(shape, data * context):
                    for shard in (1, 2, 3) if data > 1 else (1,):
                        if shard == 3 and pipeline > 1:
                            continue  # gathering weights anew for every micro-batch of every stage never pays
                        for micro_batch in (1, 2, 4, 8, 16):
                            if data * micro_batch <= sequences:
                                yield Layout(data, tensor, pipeline, context, expert, shard, micro_batch=micro_batch)


def _expert_degrees(shape: Shape, ranks: int) -> list[int]:
    if not shape.experts:
        return [1]
    return [size for size in _divisors(shape.experts, min(ranks, 128)) if ranks % size == 0]


def _divisors(number: int, limit: int) -> list[int]:
    """Divisors up to `limit`; only those of 2, 3, 5 and 7 alone, which is how machines are built."""
    found = []
    for size in range(1, min(number, limit) + 1):
        rest = size
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and number % size == 0:
            found.append(size)
    return found
