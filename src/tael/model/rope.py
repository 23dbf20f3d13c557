"""Rotary position embedding: plain, YaRN (DeepSeek), llama3 and linear scaling; on interleaved pairs or on halves.

No buffers: angles are computed from positions when they are needed, so that a model built on the meta device
cannot be left with uninitialised ones.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tael.model.config import ModelConfig


class Rope(NamedTuple):
    """cos and sin of every (position, pair), [B or 1, T, pairs] fp32, and which pairs are rotated."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature, 0.1 m ln s + 1 (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(d_qk), times mscale squared for V3's YaRN (V2 and V3 released code)."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if config.is_mla and scaling and _kind(scaling) == "yarn" and scaling.get("mscale_all_dim"):
        scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return scale


def _kind(scaling: dict[str, Any]) -> str:
    return scaling.get("rope_type", scaling.get("type", "default"))


def _yarn(frequency: Tensor, dim: int, theta: float, scaling: dict[str, Any], default_context: int) -> Tensor:
    """Blend interpolated and original frequencies by how often each turns within the original context."""
    original = scaling.get("original_max_position_embeddings") or default_context
    fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1

    def pair_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_of(fast)), 0), min(math.ceil(pair_of(slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=frequency.device) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)  # [pairs] 1: turns often, keep as it is; 0: interpolate
    return frequency / scaling["factor"] * (1 - keep) + frequency * keep


def _llama3(frequency: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are divided by the factor, middle ones blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def make_rope(config: ModelConfig, positions: Tensor) -> Rope:
    """Angles for `positions` [T] or [B, T]."""
    dim = config.qk_rope_head_dim if config.is_mla else config.gqa_head_dim
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    frequency = config.rope_theta ** -(pairs / dim)  # [pairs]
    scaling, temperature = config.rope_scaling, 1.0
    if scaling:
        kind = _kind(scaling)
        if kind == "yarn":
            frequency = _yarn(frequency, dim, config.rope_theta, scaling, config.max_position_embeddings)
            mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
            if scaling.get("attention_factor") is not None:
                temperature = scaling["attention_factor"]
            elif mscale and all_dim:
                temperature = yarn_mscale(scaling["factor"], mscale) / yarn_mscale(scaling["factor"], all_dim)
            else:
                temperature = yarn_mscale(scaling["factor"])
        elif kind == "llama3":
            frequency = _llama3(frequency, scaling)
        else:
            frequency = frequency / scaling["factor"]
    angle = positions.float().unsqueeze(-1) * frequency  # [.., T, pairs]
    if angle.dim() == 2:
        angle = angle.unsqueeze(0)
    return Rope(angle.cos() * temperature, angle.sin() * temperature, config.is_mla and config.rope_interleave)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the last dimension of `x` [B, T, H, dim]: pairs (0,1), (2,3).. when interleaved, else (i, i + dim/2)."""
    cos, sin = rope.cos.unsqueeze(2), rope.sin.unsqueeze(2)  # [B, T, 1, pairs]
    if rope.interleaved:
        a, b = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
    a, b = (half.float() for half in x.chunk(2, dim=-1))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
