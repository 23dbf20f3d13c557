"""Codes given up once they are packed, and what the native runner counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tael.engine import Engine, SamplingParams
from tael.engine.native import NativeRunner, available
from tael.errors import TaelError
from tael.model import ModelConfig, Transformer, build_model
from tael.weights import quantize_model
from tael.weights.quantize import QuantizedEmbedding, QuantizedLinear

pytestmark = pytest.mark.skipif(not available(), reason="the C++ operator cannot be built here")

SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=4,
    moe_intermediate_size=32,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
)


def _model(tied: bool = False) -> Transformer:
    model = build_model(replace(SHAPE, tie_word_embeddings=tied), seed=5, zero_residual=False)
    quantize_model(model, "int8")
    return model


def _codes(model: Transformer) -> int:
    held = QuantizedLinear | QuantizedEmbedding
    return sum(m.codes.numel() for m in model.modules() if isinstance(m, held))


@pytest.mark.parametrize("tied", [False, True])
def test_a_released_model_says_the_same(tied):
    prompts, params = [[1, 2, 3], [5, 6, 7, 8]], SamplingParams(12, seed=4)
    kept = Engine(_model(tied), backend="native").generate(prompts, params)
    model = _model(tied)
    for speculate in ("off", "on"):  # the second engine needs the MTP modules, packed by the first
        engine = Engine(model, backend="native", release=True, speculate=speculate, cache_tokens=128)
        assert _codes(model) == 0
        found = engine.generate(prompts, params)
        if speculate == "off":
            assert [c.tokens for c in found] == [c.tokens for c in kept]
    with pytest.raises(TaelError, match="given up for another runner"):
        NativeRunner(model, 8, 16, threads=torch.get_num_threads() + 1)


def test_bytes_that_a_token_reads():
    model = build_model(SHAPE, seed=5)
    runner = NativeRunner(model, 8, 16)
    config = model.config
    vectors = sum(p.numel() for n, p in model.named_parameters() if n.endswith("norm.weight") and "mtp" not in n)
    assert runner.step_bytes == 4 * (config.parameters(active=True, embedding=False, mtp=False) - vectors)
    assert runner.model_bytes > runner.step_bytes
