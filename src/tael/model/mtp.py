"""Multi-token prediction (V3 section 2.2): a block per depth that predicts one token further.

Depth k takes the previous depth's normalised hidden state of position t and the embedding of token t + k, and
predicts token t + k + 1. Embedding and head are the main model's. The projection's input is
[enorm(embedding); hnorm(hidden)], as in the released weights, the reverse of the paper's equation 21.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tael.model.config import ModelConfig
from tael.model.norm import RMSNorm


class MTPModule(nn.Module):
    """One depth. `block` is a decoder layer, built by the Transformer."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(d, eps)
        self.hnorm = RMSNorm(d, eps)
        self.eh_proj = nn.Linear(2 * d, d, bias=False)
        self.block = block
        self.norm = RMSNorm(d, eps)

    def join(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden [B, T, D] of tokens t, embedding [B, T, D] of tokens t + depth -> block input [B, T, D]."""
        return self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))
