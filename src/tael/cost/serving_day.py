"""DeepSeek's published day of serving, from its inputs: cost, theoretical revenue, margin, tokens a second of a node.

Source: "DeepSeek-V3/R1 Inference System Overview", open-infra-index, 2025-03-01 (24 hours from 2025-02-27 12:00).
Inputs are the tokens, the cache hits, the prices, the chip, the sizes of the units (EP32, EP144), the mean length of
the cache (4,989 tokens) and the readers' speed (20 to 22 tokens a second). What comes out is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tael.cost.chips import find_chip
from tael.cost.named import find_model
from tael.cost.serving import Service, plan_serving
from tael.cost.timing import Constants

NODE = 8


@dataclass(frozen=True)
class DayInputs:
    """What is given; dollars are a million tokens (R1's list) and a device-hour."""

    input_tokens: float = 608e9
    output_tokens: float = 168e9
    hit_rate: float = 0.563
    price_hit: float = 0.14
    price_miss: float = 0.55
    price_output: float = 2.19
    device_hour: float = 2.0
    context: float = 4989.0
    reader_speed: float = 21.0
    occupancy: float = 0.8


@dataclass(frozen=True)
class Day:
    """Rates are tokens a second of a node, input with its cache hits; margin is profit over cost."""

    prefill_node_rate: float
    decode_node_rate: float
    nodes: float
    cost: float
    revenue: float

    @property
    def margin(self) -> float:
        return (self.revenue - self.cost) / self.cost

    def compared(self, reported: Day) -> list[tuple[str, float, float]]:
        """(figure, reported, this) for a table."""
        names = {
            "input tokens/s a node, with hits": "prefill_node_rate",
            "output tokens/s a node": "decode_node_rate",
            "nodes in the mean": "nodes",
            "cost, $": "cost",
            "theoretical revenue, $": "revenue",
            "profit over cost": "margin",
        }
        return [(name, getattr(reported, key), getattr(self, key)) for name, key in names.items()]


DAY = Day(prefill_node_rate=73_700, decode_node_rate=14_800, nodes=226.75, cost=87_072, revenue=562_027)
"""As published."""


def day_of_serving(inputs: DayInputs | None = None, constants: Constants | None = None) -> Day:
    """The day predicted."""
    i = inputs or DayInputs()
    service = Service(
        shape=find_model("deepseek-v3").shape,
        chip=find_chip("H800"),
        devices=144,
        prefill_devices=32,
        context=i.context,
        tokens_per_second=i.reader_speed,
        occupancy=i.occupancy,
    )
    plan = plan_serving(service, constants)
    prefill = NODE * i.occupancy * plan.prefill_rate / (1 - i.hit_rate)
    decode = NODE * i.occupancy * plan.decode_rate
    nodes = (i.input_tokens / prefill + i.output_tokens / decode) / 86400
    revenue = i.input_tokens * (i.hit_rate * i.price_hit + (1 - i.hit_rate) * i.price_miss)
    revenue += i.output_tokens * i.price_output
    return Day(prefill, decode, nodes, nodes * NODE * 24 * i.device_hour, revenue / 1e6)


def sensitivities(constants: Constants | None = None, change: float = 0.2) -> list[tuple[str, float, float]]:
    """(input, margin with it lower, margin with it higher) by `change`, the one that moves the margin most first."""
    base, moved = DayInputs(), []
    for name in vars(base):
        value = getattr(base, name)
        low = day_of_serving(replace(base, **{name: value * (1 - change)}), constants).margin
        high = day_of_serving(replace(base, **{name: min(value * (1 + change), 1.0) if name == "occupancy" else
                                               value * (1 + change)}), constants).margin  # fmt: skip
        moved.append((name.replace("_", " "), low, high))
    return sorted(moved, key=lambda row: -abs(row[2] - row[1]))
