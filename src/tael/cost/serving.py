"""What serving costs: decode and prefill by roofline, batch by latency and memory, dollars a million tokens.

Attention is data parallel, experts lie across all devices of a unit (DeepSeek's way: EP32 to read prompts, EP144 to
decode); a dense model is tensor parallel over the fewest devices that hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tael.cost.chips import BITS, Chip
from tael.cost.collectives import all_reduce, dispatch, group
from tael.cost.shapes import Flops, Shape
from tael.cost.timing import Constants
from tael.errors import TaelError

OCCUPANCY = 0.8
"""Share of its capacity a fleet works at in the mean: what keeps latency while the load moves. An assumption."""
MEMORY_SHARE = 0.9
MAX_BATCH = 4096


@dataclass(frozen=True)
class Service:
    """What is served, on what, how fast each reader has to get it."""

    shape: Shape
    chip: Chip
    devices: int
    """Of one decoding unit, over which experts are spread."""
    context: float = 4096.0
    """Tokens in the cache in the mean while one is decoded."""
    tokens_per_second: float = 20.0
    """The least one reader gets."""
    precision: str = "fp8"
    prefill_devices: int | None = None
    drafted: float = 0.0
    """Mean drafts accepted a step (MTP: 0.85 to 0.9 published); each step then verifies one draft."""
    occupancy: float = OCCUPANCY


@dataclass(frozen=True)
class Serving:
    """One service planned; rates are those of one device, without regard to occupancy."""

    service: Service
    batch: int
    """Sequences of one device; of all together where a dense model is tensor parallel."""
    readers: int
    """Sequences of the whole unit."""
    step_seconds: float
    decode_rate: float
    prefill_rate: float
    cache_bytes_per_token: float
    weight_bytes: float
    limited_by: str

    def dollars_per_million(self, per_hour: float, hit_rate: float = 0.0) -> tuple[float, float]:
        """Dollars a million tokens (input, output) at `per_hour` a device and the fleet's occupancy."""
        full = per_hour / 3600 * 1e6 / self.service.occupancy
        return full * (1 - hit_rate) / self.prefill_rate, full / self.decode_rate

    def to_dict(self, per_hour: float | None = None) -> dict[str, Any]:
        table: dict[str, Any] = {
            "devices": self.service.devices,
            "context": self.service.context,
            "readers": self.readers,
            "seconds_per_token": self.step_seconds / (1 + self.service.drafted),
            "decode_tokens_per_second_per_device": self.decode_rate,
            "prefill_tokens_per_second_per_device": self.prefill_rate,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "weight_bytes_per_device": self.weight_bytes,
            "limited_by": self.limited_by,
            "occupancy": self.service.occupancy,
        }
        if per_hour is not None:
            table["dollars_per_million_input"], table["dollars_per_million_output"] = self.dollars_per_million(
                per_hour
            )
        return table


class _Model:
    """Seconds of decode steps and prefill for one service."""

    def __init__(self, service: Service, constants: Constants) -> None:
        if service.devices < 1 or service.context <= 0 or service.tokens_per_second <= 0:
            raise TaelError("serving needs at least one device, and a context and a speed above 0")
        self.service, self.constants = service, constants
        self.shape, self.chip = service.shape, service.chip
        self.precision = self.chip.best_precision(service.precision)
        self.bytes = BITS[self.precision] / 8
        self.bandwidth = self.chip.memory_bandwidth * constants.bandwidth
        routed = sum(b.count * b.experts * b.matrices * self.shape.hidden * b.expert_width for b in self.shape.blocks)
        self.dense_parameters, self.routed_parameters = self.shape.parameters(mtp=False) - routed, routed
        self.tensor = 1 if routed else service.devices
        self.weights = self.bytes * (self.dense_parameters / self.tensor + self.routed_parameters / service.devices)

    def decode_step(self, batch: float) -> float:
        """Seconds until each of a device's `batch` sequences has one more token."""
        flops = self.shape.decode_flops(self.service.context)
        queries = batch * (2 if self.service.drafted else 1)
        products, scores = self._seconds(flops.times(queries / self.tensor))
        products = max(products, self._weights_read(queries) / self.bandwidth)
        cache = batch * self.service.context * self.shape.cache_bytes() / self.tensor
        compute = (products + max(scores, cache / self.bandwidth)) / self.constants.sustained
        return compute + self._exposed(queries, compute, self.service.devices, limit=None)

    def prefill_seconds(self) -> float:
        """Seconds of one device for one token of a prompt."""
        flops = self.shape.flops(self.service.context / 2, training=False)
        products, scores = self._seconds(flops.times(1 / self.tensor))
        traffic = 2.0 * self.shape.traffic_values() / self.bandwidth / self.tensor
        tokens = 8192.0
        compute = tokens * (products + scores + traffic) / self.constants.sustained
        devices = self.service.prefill_devices or self.service.devices
        return (compute + self._exposed(tokens, compute, devices, self.shape.node_limit)) / tokens * self.tensor

    def _seconds(self, flops: Flops) -> tuple[float, float]:
        wide = self.chip.sustained(self.chip.best_precision("bf16"))
        low = flops.projections + flops.dense + flops.experts + flops.indexer
        products = low / self.chip.sustained(self.precision) + (flops.router + flops.head) / wide
        return products, flops.scores / (wide * self.constants.attention)

    def _weights_read(self, queries: float) -> float:
        """Bytes of weights a step touches: of the local experts those that some token of the unit chose."""
        experts = self.shape.experts
        if not experts:
            return self.weights
        chosen = max(block.chosen for block in self.shape.blocks)
        met = 1.0 - (1.0 - chosen / experts) ** (queries * self.service.devices)
        routed = self.routed_parameters / self.service.devices * met
        return self.bytes * (self.dense_parameters + routed)

    def _exposed(self, tokens: float, compute: float, devices: int, limit: int | None) -> float:
        """Communication that does not hide behind the other half of the batch."""
        c, d = self.constants, self.shape.hidden
        if self.tensor > 1:
            layers = self.shape.layers
            return 2.0 * layers * all_reduce(self.chip, group(self.chip, self.tensor), tokens * d * 2.0, c.bandwidth)
        layers = sum(block.count for block in self.shape.blocks if block.experts)
        chosen = max((block.chosen for block in self.shape.blocks), default=0)
        row = (min(self.bytes, 2.0) + 2.0) * d
        seconds = layers * dispatch(self.chip, group(self.chip, devices), tokens, row, chosen, limit, c.bandwidth)
        return max((1 - c.hidden) * seconds, seconds - compute)

    def largest_by_memory(self) -> int:
        room = MEMORY_SHARE * self.chip.memory_bytes - self.weights
        one = self.service.context * self.shape.cache_bytes() / self.tensor + 1e6
        return int(min(MAX_BATCH, room / one))


def plan_serving(service: Service, constants: Constants | None = None) -> Serving:
    """The largest batch that fits and keeps the readers' speed. Raises TaelError when nothing does."""
    model = _Model(service, constants or Constants())
    shape, chip = service.shape, service.chip
    fits = model.largest_by_memory()
    if fits < 1:
        need = math.ceil((model.bytes * shape.parameters(mtp=False)) / (0.8 * chip.memory_bytes))
        raise TaelError(
            f"{shape.name} does not fit {service.devices} {chip.name} to serve a context of {service.context:g} "
            f"tokens: {model.weights / 1e9:.0f} GB of weights a device; try --chips {max(need, service.devices + 1)}"
        )
    allowed = (1 + service.drafted) / service.tokens_per_second
    if model.decode_step(1) > allowed:
        raise TaelError(
            f"{shape.name} on {service.devices} {chip.name} gives one reader "
            f"{(1 + service.drafted) / model.decode_step(1):.1f} tokens a second, not {service.tokens_per_second:g}"
        )
    low, high = 1, fits
    while low < high:  # the largest batch within the latency: a step only grows with the batch
        middle = (low + high + 1) // 2
        low, high = (middle, high) if model.decode_step(middle) <= allowed else (low, middle - 1)
    seconds = model.decode_step(low)
    return Serving(
        service=service,
        batch=low,
        readers=low * service.devices // model.tensor,
        step_seconds=seconds,
        decode_rate=low * (1 + service.drafted) / seconds / model.tensor,
        prefill_rate=1.0 / model.prefill_seconds(),
        cache_bytes_per_token=shape.cache_bytes(),
        weight_bytes=model.weights,
        limited_by="memory" if low == fits else "latency",
    )
