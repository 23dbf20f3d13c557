"""Random small models of both kinds of attention, and a tokenizer without merges across characters."""

from __future__ import annotations

import pytest
import torch

from tael.data import Tokenizer, train_tokenizer
from tael.model import ModelConfig, Transformer, build_model

MLA = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    moe_intermediate_size=16,
    max_position_embeddings=96,
)
GQA = ModelConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=96,
)


def random_model(config: ModelConfig, seed: int = 3) -> Transformer:
    """Weights large enough that the distributions are far from uniform."""
    model = build_model(config, seed=seed, zero_residual=False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session", params=["mla", "gqa"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return random_model({"mla": MLA, "gqa": GQA}[request.param])


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["The quick brown fox. 漢字とかな 🙂🙃 naïve café\n" * 3], 320)
