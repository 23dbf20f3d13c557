"""What a shape costs: parameters against counting, published sizes, FLOPs against torch's counter, cache bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tael.model import ModelConfig, Transformer, build_model

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)
DEEPSEEK_V2_LITE = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    num_attention_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
)
DEEPSEEK_V2 = dataclasses.replace(
    DEEPSEEK_V2_LITE,
    hidden_size=5120,
    intermediate_size=12288,
    num_hidden_layers=60,
    num_attention_heads=128,
    q_lora_rank=1536,
    n_routed_experts=160,
    moe_intermediate_size=1536,
)
LLAMA_3_1_8B = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
QWEN_2_5_1_5B = ModelConfig(
    model_type="qwen2",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


@st.composite
def configs(draw: Any) -> ModelConfig:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 2))
    experts = draw(st.integers(2, 5))
    return ModelConfig(
        model_type=draw(st.sampled_from(["deepseek_v3", "deepseek_v2", "dots1", "llama", "qwen2", "qwen3"])),
        vocab_size=draw(st.integers(4, 40)),
        hidden_size=heads * 2 * draw(st.integers(1, 6)),
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([None, 6])),
        q_lora_rank=draw(st.sampled_from([None, 5])),
        kv_lora_rank=draw(st.integers(1, 9)),
        qk_nope_head_dim=draw(st.integers(1, 9)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 9)),
        n_routed_experts=draw(st.sampled_from([None, experts])),
        n_shared_experts=draw(st.sampled_from([None, 1, 2])),
        num_experts_per_tok=draw(st.integers(1, experts)),
        moe_intermediate_size=draw(st.integers(1, 9)),
        first_k_dense_replace=draw(st.integers(0, 3)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )


def meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def counted(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def idle(config: ModelConfig, model: Transformer) -> int:
    """Parameters of the routed experts that a token does not pass."""
    banks = [module for name, module in model.named_modules() if name.endswith(".experts")]
    return sum(counted(b) * ((config.n_routed_experts or 0) - config.num_experts_per_tok) for b in banks) // (
        config.n_routed_experts or 1
    )


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(configs())
def test_parameters_equal_counting(config: ModelConfig) -> None:
    model = meta(config)
    assert config.parameters() == counted(model)
    assert config.parameters(mtp=False) == counted(model) - counted(model.mtp)
    assert config.parameters(active=True) == counted(model) - idle(config, model)
    # Without the input table: a tied one still multiplies as the head.
    table = 0 if config.tie_word_embeddings else counted(model.embed_tokens)
    assert config.parameters(embedding=False) == counted(model) - table


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        # V3 report, abstract: 671B total, 37B active a token (no MTP). 37.55B with the input table, 36.63B without.
        (DEEPSEEK_V3, 671.0e9, 37.55e9),
        # V2 report, abstract and appendix B (V2-Lite): 236B / 21B, and 15.7B / 2.4B. The 2.4B leaves the input table
        # out (2.45B); with it 2.66B.
        (DEEPSEEK_V2, 235.7e9, 21.4e9),
        (DEEPSEEK_V2_LITE, 15.7e9, 2.66e9),
        (LLAMA_3_1_8B, 8.03e9, 8.03e9),  # model card: 8.03B
        (QWEN_2_5_1_5B, 1.54e9, 1.54e9),  # model card: 1.54B
    ],
    ids=["v3", "v2", "v2-lite", "llama-3.1-8b", "qwen2.5-1.5b"],
)
def test_published_sizes(config: ModelConfig, total: float, active: float) -> None:
    assert config.parameters(mtp=False) == pytest.approx(total, rel=3e-3)
    assert config.parameters(mtp=False, active=True) == pytest.approx(active, rel=3e-3)
    assert config.parameters() == counted(meta(config))


def test_v3_numbers_exactly() -> None:
    """Worked out by hand from the report's section 4.2; the 58 x 256 selection biases are no weights."""
    attention = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    expert = 3 * 7168 * 2048
    layers = 61 * (attention + 2 * 7168) + 3 * 3 * 7168 * 18432 + 58 * (257 * expert + 256 * 7168)
    tables = 2 * 129280 * 7168
    assert DEEPSEEK_V3.parameters(mtp=False) == layers + tables + 7168 == 671_026_404_352
    # README_WEIGHTS.md of the release: 11.5B in the MTP module, which leaves its eh_proj (0.1B) out.
    module = DEEPSEEK_V3.parameters() - DEEPSEEK_V3.parameters(mtp=False)
    assert module - 2 * 7168 * 7168 == pytest.approx(11.5e9, rel=2e-3)
    assert DEEPSEEK_V3.cache_bytes_per_token() == 70_272  # bf16, 61 layers of 512 + 64
    assert DEEPSEEK_V3.mha_cache_bytes_per_token() == 4_997_120  # 128 heads of 192 + 128
    assert DEEPSEEK_V3.moe_layers == list(range(3, 62))
    # The release on Hugging Face is 685B (its README): with MTP and its copies of embedding and head.
    assert DEEPSEEK_V3.parameters() + tables == pytest.approx(685e9, rel=1e-3)


def test_cache_of_grouped_query_attention() -> None:
    assert LLAMA_3_1_8B.cache_bytes_per_token() == 32 * 2 * 8 * 128 * 2
    assert LLAMA_3_1_8B.mha_cache_bytes_per_token() == 32 * 2 * 32 * 128 * 2


SMALL = ModelConfig(
    vocab_size=50,
    hidden_size=30,  # 120-byte rows: experts take the looped path, which the counter sees
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=14,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=10,
)
DENSE = ModelConfig(
    model_type="llama",
    vocab_size=50,
    hidden_size=36,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=44,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(SMALL, q_lora_rank=None, n_shared_experts=None),
        dataclasses.replace(SMALL, num_nextn_predict_layers=1),
        dataclasses.replace(SMALL, tie_word_embeddings=True),
        DENSE,
    ],
    ids=["v3", "no-lora", "mtp", "tied", "gqa"],
)
def test_flops_against_torch(config: ModelConfig, training: bool) -> None:
    """Exact, with two conventions set out here.

    Attention: the plain product works out all T x T scores and masks them, so `context` is T; a causal count takes
    (T + 1) / 2. Vectors: the formula counts norm gains as if they were matrices; torch counts no elementwise work.
    """
    model, length, batch = build_model(config, zero_residual=False), 12, 2
    depths = config.num_nextn_predict_layers
    tokens = torch.randint(0, config.vocab_size, (batch, length + depths))
    with FlopCounterMode(display=False) as counter:
        features = model.features(tokens[:, :length])
        out = model.logits(features.hidden).sum()
        if training:
            for depth in model.mtp_features(features.hidden, tokens):
                out = out + model.logits(depth.hidden).sum()
            out.backward()
    parts = [model] if training else [model.layers, model.norm]
    vectors = sum(p.numel() for part in parts for p in part.parameters() if p.dim() == 1)
    predicted = config.flops_per_token(length, training=training) - (6 if training else 2) * vectors
    assert counter.get_total_flops() == predicted * batch * length
