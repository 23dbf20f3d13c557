"""From logits to a token: greedy, or by inverse transform with one uniform number a token.

The numbers of a request come from its own seed and are drawn beforehand, so what else is in the batch, and in which
row a request stands, plays no part in which numbers it gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tael.errors import TaelError


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. temperature 0 is greedy; `seed` fixes its random numbers."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for holds, message in (
            (self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}"),
            (self.temperature >= 0, f"temperature must be 0 or more, not {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}"),
        ):
            if not holds:
                raise TaelError(f"sampling: {message}")


def uniforms(params: list[SamplingParams], steps: int) -> Tensor:
    """One number in [0, 1) for every request and step, [B, steps] float64.

    Philox streams keyed by the seed: counter-based, so neighbouring seeds give independent numbers by construction.
    """
    rows = [np.random.Generator(np.random.Philox(key=p.seed % 2**64)).random(steps) for p in params]
    return torch.from_numpy(np.stack(rows))


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token a row. logits [B, V], temperature, top_p, uniform [B] -> tokens [B], logprobs [B] fp32.

    The log-probability is of the tempered distribution before top-p (of the plain one when greedy): what the trainer
    computes from the same logits.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature).unsqueeze(-1)
    logprobs = scaled.log_softmax(-1)
    probabilities = logprobs.exp()
    if bool((top_p < 1).any()):
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.double().cumsum(-1)
    target = (uniform.to(cumulative.device) * cumulative[:, -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    token = torch.where(greedy, logits.argmax(-1), drawn)
    return token, logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def _nucleus(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the fewest most likely tokens whose mass reaches top_p (Holtzman et al. 2020)."""
    ordered, index = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p.unsqueeze(-1), 0.0)
    return torch.zeros_like(probabilities).scatter(-1, index, ordered)
