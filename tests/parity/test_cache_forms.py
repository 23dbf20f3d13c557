"""The absorbed form of MLA, fed token by token from a cache, against the expanded form over the whole sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tael.model import ModelConfig, Transformer, build_model

MLA = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale_all_dim": 1.0},
)
GQA = ModelConfig(
    model_type="qwen2",
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class GrowingCache:
    """Keeps every entry; a token sees itself and what came before. `absorbed` says the form, and may be changed."""

    def __init__(self, absorbed: bool = True) -> None:
        self.entries: Tensor | None = None
        self.absorbed = absorbed

    def append(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        before = 0 if self.entries is None else self.entries.shape[1]
        self.entries = entry if self.entries is None else torch.cat((self.entries, entry), dim=1)
        batch, new, total = entry.shape[0], entry.shape[1], self.entries.shape[1]
        mask = torch.arange(total) <= before + torch.arange(new).unsqueeze(1)  # [T, S]
        return self.entries, mask.expand(batch, 1, new, total)


def random_model(config: ModelConfig) -> Transformer:
    model = build_model(config, seed=3, zero_residual=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("config", [MLA, dataclasses.replace(MLA, q_lora_rank=None), GQA], ids=["lora", "mla", "gqa"])
@pytest.mark.parametrize("pieces", [[1] * 20, [12, 1, 1, 1, 5], [20], [3, 9, 8]])
def test_cached_pieces_equal_the_whole(config: ModelConfig, pieces: list[int]) -> None:
    """Short pieces take the absorbed form, longer ones the expanded; both continue one cache."""
    model = random_model(config)
    tokens = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(5))
    caches = [GrowingCache() for _ in model.layers]
    found, start = [], 0
    with torch.no_grad():
        for size in pieces:
            positions = torch.arange(start, start + size).expand(3, -1)
            for cache in caches:
                cache.absorbed = size <= 8
            found.append(model(tokens[:, start : start + size], cache=caches, positions=positions))
            start += size
        whole = model(tokens)
    difference = (torch.cat(found, dim=1) - whole).abs().max() / whole.abs().max()
    assert difference < 1e-5
    assert all(c.entries is not None and c.entries.shape[2] == config.cache_values_per_token() for c in caches)


def test_absorbed_gradients_equal_expanded() -> None:
    """Learning through the absorbed form would be the same as through the expanded one."""
    model = random_model(MLA)
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(6))
    gradients = []
    for cache in (None, [GrowingCache() for _ in model.layers]):
        model.zero_grad()
        model(tokens, cache=cache).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(list(model.parameters()))
    for expanded, absorbed in zip(*gradients, strict=True):
        torch.testing.assert_close(absorbed, expanded, rtol=1e-3, atol=1e-5 * expanded.abs().max().item() + 1e-7)
