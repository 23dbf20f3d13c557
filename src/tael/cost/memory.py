"""Bytes each device holds while training: weights, gradients, optimiser, activations, logits, reserve."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from tael.cost.chips import Chip
from tael.cost.layout import Layout, rounds
from tael.cost.shapes import Attention, Block, Shape

WEIGHT, GRADIENT = 2, 4
"""bf16 weights; gradients are summed in fp32 (Megatron's and DeepSeek-V3's way)."""
RESERVE_FRACTION, RESERVE_BYTES = 0.06, 1.5e9
"""Fragmentation, and what driver, libraries and communication buffers keep."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def to_dict(self) -> dict[str, float]:
        return {**vars(self), "total": self.total}


def optimiser_bytes(precision: str) -> int:
    """AdamW's bytes a parameter: fp32 master and moments; with fp8 training the moments are bf16 (V3, 3.3.3)."""
    return 8 if precision in ("fp8", "fp4") else 12


def training_memory(shape: Shape, chip: Chip, layout: Layout, sequence: int, precision: str) -> Memory:
    """Memory of the fullest device under `layout`."""
    dense, routed = local_parameters(shape, layout)
    ranks = layout.data * layout.context
    sharded = layout.shard == 3
    held = dense / (ranks if sharded else 1) + routed / (ranks / layout.expert if sharded else 1)
    states = dense / ranks + routed / (ranks / layout.expert)
    summed = states if layout.shard >= 2 else held
    # FSDP gathers one layer at a time, and the next one early.
    gathered = 2.0 * (dense + routed) / shape.layers * layout.pipeline if sharded else 0.0
    tokens = layout.micro_batch * sequence / layout.context
    return Memory(
        weights=WEIGHT * (held + gathered),
        gradients=GRADIENT * summed + (WEIGHT * gathered / 2),
        optimiser=optimiser_bytes(precision) * states,
        activations=tokens * _activation_bytes(shape, layout),
        logits=tokens * shape.vocab * (2 + 4) / layout.tensor,
        reserve=RESERVE_FRACTION * chip.memory_bytes + min(RESERVE_BYTES, 0.05 * chip.memory_bytes),
    )


def local_parameters(shape: Shape, layout: Layout) -> tuple[float, float]:
    """(parameters outside routed experts, routed experts') of one device before data sharding."""
    routed = shape.expert_parameters()
    tables = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    layers = shape.parameters() - routed - tables
    share = math.ceil(shape.layers / layout.pipeline) / shape.layers
    ends = tables / (1 if layout.pipeline == 1 else 2)
    return (layers * share + ends) / layout.tensor, routed * share / layout.expert


def saved_bytes(block: Block, hidden: int, recompute: str) -> float:
    """Bytes a token leaves for the backward pass in one layer (bf16; attention keeps no matrix of scores).

    none: both norms' inputs and outputs, queries, keys, values, attention's output, latents before and after their
    norms, and the feed-forward's inputs and three widths. selective (V3, section 3.2.3): norms' outputs, SwiGLU's
    product and up-projections are made again. full: the layer's input.
    """
    attention = block.attention
    mixed = attention.heads * attention.v
    shared = block.shared * (block.shared_width or block.expert_width)
    widths = block.dense_width + block.chosen * block.expert_width + shared
    branches = block.matrices - 1
    if recompute == "full":
        return 2.0 * hidden
    if recompute == "selective":
        return 2.0 * (2 * hidden + _small_qkv(attention) + mixed + branches * widths)
    heads = attention.heads * attention.qk + attention.kv_heads * (attention.qk + attention.v)
    latents = 0
    if attention.decode_v is not None:
        latents = 2 * attention.vectors + attention.cache - attention.decode_v
    copies = block.chosen * hidden
    return 2.0 * (4 * hidden + heads + latents + mixed + (branches + 1) * widths + copies)


def _small_qkv(attention: Attention) -> float:
    """Values to keep instead of queries, keys and values: latents where there are some."""
    if attention.decode_qk is not None:
        return attention.vectors + attention.cache
    return attention.heads * attention.qk + attention.cache


def _activation_bytes(shape: Shape, layout: Layout) -> float:
    """Bytes a token of a micro-batch holds on a device of the first stage, all micro-batches in flight counted."""
    layers = math.ceil(shape.layers / layout.pipeline)
    mean = sum(block.count * saved_bytes(block, shape.hidden, layout.recompute) for block in shape.blocks)
    per_layer = mean / shape.layers
    live = max(saved_bytes(block, shape.hidden, "none") for block in shape.blocks)
    # Interleaved 1F1B holds p (1 + (p - 1) / (p v)) micro-batches of a stage (Narayanan et al. 2021, section 2.2).
    p, v = layout.pipeline, rounds(shape, layout.pipeline)
    flight = p * (1 + (p - 1) / (p * v)) if v > 1 else p
    return (layers * per_layer * flight + live) / layout.tensor
