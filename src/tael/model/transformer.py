"""The Transformer: one definition that trains, samples during RL, and serves.

    logits = Transformer(config)(tokens)                    tokens [B, T] -> logits [B, T, V]

Construct with `build_model` (tael.model.init), which also initialises every parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tael.model.attention import GroupedQueryAttention, LayerCache, MultiHeadLatentAttention
from tael.model.config import ModelConfig
from tael.model.moe import FeedForward, MixtureOfExperts, Routing
from tael.model.mtp import MTPModule
from tael.model.norm import RMSNorm
from tael.model.rope import Rope, make_rope


class Features(NamedTuple):
    """hidden [B, T, D], normalised and ready for the head; one Routing per MoE layer passed."""

    hidden: Tensor
    routing: list[Routing]


class Block(nn.Module):
    """Attention, then feed-forward or experts, each on a normalised input and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = MultiHeadLatentAttention(config) if config.is_mla else GroupedQueryAttention(config)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = (
            MixtureOfExperts(config) if config.is_moe_layer(index) else FeedForward(d, config.intermediate_size)
        )

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            out, routing = self.mlp(normed)
            return x + out, routing
        return x + self.mlp(normed), None


class Transformer(nn.Module):
    """A decoder-only language model of any shape `ModelConfig` can describe."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        first = config.num_hidden_layers
        self.mtp = nn.ModuleList(
            MTPModule(config, Block(config, first + i)) for i in range(config.num_nextn_predict_layers)
        )

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, T] int64 -> logits [B, T, V]. See `features` for the rest."""
        return self.logits(self.features(tokens, document_ids, cache, positions).hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [.., D] -> logits [.., V]; the same head serves the main model and the MTP depths."""
        return self.lm_head(hidden)

    def features(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
        positions: Tensor | None = None,
    ) -> Features:
        """Everything but the head.

        document_ids [B, T]: attention stays within equal ids (None: plain causal). cache: one LayerCache a layer;
        then `positions` [B, T] says where the tokens stand (default 0..T-1), and the cache says what they see.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        rope = make_rope(self.config, positions)
        mask = document_mask(document_ids) if document_ids is not None else None
        x = self.embed_tokens(tokens)  # [B, T, D]
        routing: list[Routing] = []
        for i, layer in enumerate(self.layers):
            x, decided = layer(x, rope, mask, cache[i] if cache is not None else None)
            if decided is not None:
                routing.append(decided)
        return Features(self.norm(x), routing)

    def mtp_features(self, hidden: Tensor, tokens: Tensor, document_ids: Tensor | None = None) -> list[Features]:
        """One Features per MTP depth k = 1.., for training on whole sequences.

        hidden [B, T, D] from `features`; tokens [B, T + depth]: the same tokens and those that follow. Position t of
        depth k has seen token t + k and predicts token t + k + 1 (V3 eq. 21 to 23).
        """
        length = hidden.shape[1]
        positions = torch.arange(length, device=tokens.device)
        results = []
        for depth in range(1, len(self.mtp) + 1):
            results.append(self.mtp_step(depth, hidden, tokens[:, depth : depth + length], positions, document_ids))
            hidden = results[-1].hidden
        return results

    def mtp_step(
        self,
        depth: int,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Features:
        """One MTP depth (1, 2, ..): `tokens` [B, T], each following the state in `hidden` [B, T, D].

        A common shift of `positions` ([T] or [B, T]) changes nothing: rotary attention is relative. With a cache they
        are the slots, and the cache says what is seen.
        """
        module = self.mtp[depth - 1]
        assert isinstance(module, MTPModule)
        rope = make_rope(self.config, positions)
        mask = document_mask(document_ids) if document_ids is not None else None
        out, routing = module.block(module.join(hidden, self.embed_tokens(tokens)), rope, mask, cache)
        return Features(module.norm(out), [routing] if routing is not None else [])


def document_mask(document_ids: Tensor) -> Tensor:
    """document_ids [B, T] -> [B, 1, T, T] bool: causal, and within one document."""
    same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    return same.tril().unsqueeze(1)
