"""Attention: MLA (DeepSeek-V2 section 2.1) and grouped-query attention for the dense baselines and students.

Both project a token to one cache *entry*, and attend from queries to entries. Who keeps the entries is not their
business: without a cache they attend within the sequence, with one they hand the new entries over and attend to
what comes back (`LayerCache`).

MLA runs in two forms that give the same numbers up to rounding. Many query tokens: expand the latents to keys and
values (MHA form). Few: absorb W_UK into the query and W_UV into the output, so that all heads attend to the R + P
cached values (MQA form); that reads R + P values a cached token in place of H (N + P + V). The cache's keeper says
which: a prompt is read in the first form, generated tokens in the second.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tael.model.config import ModelConfig
from tael.model.norm import RMSNorm
from tael.model.rope import Rope, rotate, softmax_scale


class LayerCache(Protocol):
    """Where one layer's entries live. `absorbed`: MLA is to read them in the absorbed form."""

    @property
    def absorbed(self) -> bool: ...

    def append(self, entry: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keep `entry` [B, T, width]; return all entries [B, S, width] and who may see whom [B, 1, T, S] bool.

        None for the latter means causal over equal T and S: the entries are those of the new tokens alone.
        """
        ...


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T scale) v. query [B, H, T, d], key [B, H, S, d], value [B, H, S, v] -> [B, H, T, v].

    `mask` [B or 1, 1, T, S] bool, True where attention is allowed; None means causal over equal T and S.
    On CPU the plain product is taken up to 1024 tokens: there the fused kernel is two to three times slower, forward
    and backward in bf16 (bench/attention_forms.py); elsewhere torch's fused kernels.
    """
    if query.device.type == "cpu" and key.shape[2] <= 1024:
        scores = (query * scale) @ key.transpose(-1, -2)  # [B, H, T, S]
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        # Added in place, not filled: the same numbers, and nothing to do on the way back (2 to 4% of a step).
        bias = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
        bias.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        return scores.add_(bias).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


class MultiHeadLatentAttention(nn.Module):
    """MLA, with or without a low-rank query. Parameter names are Hugging Face's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank = config.kv_lora_rank
        self.scale = softmax_scale(config)
        d, bias = config.hidden_size, config.attention_bias
        q_out = self.heads * (self.nope + self.rope)
        # The latent norms keep transformers' and the released code's fixed epsilon of 1e-6.
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(d, q_out, bias=False)
        else:
            self.q_a_proj = nn.Linear(d, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_out, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, 1e-6)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, d, bias=bias)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a cache, `mask` is ignored: the cache says what may be seen."""
        q_nope, q_rope = self._query(x, rope)
        entry = self._entry(x, rope)
        if cache is not None:
            entry, mask = cache.append(entry)
        latent, k_rope = entry.split((self.rank, self.rope), dim=-1)  # [B, S, R], [B, S, P]
        form = self._absorbed if cache is not None and cache.absorbed else self._expanded
        return self.o_proj(form(q_nope, q_rope, latent, k_rope, mask))

    def _query(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.heads, self.nope + self.rope))  # [B, T, H, N + P]
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)
        return q_nope, rotate(q_rope, rope)

    def _entry(self, x: Tensor, rope: Rope) -> Tensor:
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.rank, self.rope), dim=-1)
        k_rope = rotate(k_rope.unsqueeze(2), rope).squeeze(2)
        return torch.cat((self.kv_a_layernorm(latent), k_rope), dim=-1)  # [B, T, R + P]

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, self.nope + self.value))  # [B, S, H, N + V]
        k_nope, value = kv.split((self.nope, self.value), dim=-1)
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)  # [B, S, H, P]
        query = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)  # [B, H, T, N + P]
        key = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)
        out = attend(query, key, value.transpose(1, 2), mask, self.scale)  # [B, H, T, V]
        return out.transpose(1, 2).flatten(2)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        w_uk, w_uv = (
            self.kv_b_proj.weight.to(latent.dtype)
            .view(self.heads, self.nope + self.value, self.rank)
            .split((self.nope, self.value), dim=1)
        )  # [H, N, R], [H, V, R]
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_uk)
        scores = torch.einsum("bthr,bsr->bhts", q_latent, latent) + torch.einsum("bthp,bsp->bhts", q_rope, k_rope)
        scores = scores.float() * self.scale  # [B, H, T, S]
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(-1).to(latent.dtype)
        out = torch.einsum("bhts,bsr->bthr", weights, latent)
        return torch.einsum("bthr,hvr->bthv", out, w_uv).flatten(2)


class GroupedQueryAttention(nn.Module):
    """Llama's and Qwen's attention: H query heads share `num_key_value_heads` keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.kv_heads, config.gqa_head_dim
        self.scale = softmax_scale(config)
        d, kv = config.hidden_size, self.kv_heads * self.dim
        self.q_proj = nn.Linear(d, self.heads * self.dim, bias=config.has_qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=config.has_qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=config.has_qkv_bias)
        self.o_proj = nn.Linear(self.heads * self.dim, d, bias=config.has_output_bias)
        if config.has_qk_norm:
            self.q_norm = RMSNorm(self.dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a cache, `mask` is ignored: the cache says what may be seen."""
        query = self.q_proj(x).unflatten(-1, (self.heads, self.dim))  # [B, T, H, d]
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, self.dim))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, rope), rotate(key, rope)
        entry = torch.cat((key.flatten(2), self.v_proj(x)), dim=-1)  # [B, T, 2 kv d]
        if cache is not None:
            entry, mask = cache.append(entry)
        key, value = entry.unflatten(-1, (2, self.kv_heads, self.dim)).unbind(2)  # [B, S, kv, d]
        repeat = self.heads // self.kv_heads
        key, value = (t.repeat_interleave(repeat, dim=2).transpose(1, 2) for t in (key, value))
        out = attend(query.transpose(1, 2), key, value, mask, self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))
