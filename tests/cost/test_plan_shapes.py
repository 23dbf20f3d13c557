"""Shapes: parameters against published counts, ModelConfig and counting; FLOPs against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tael.cost.named import MODELS, find_model
from tael.cost.shapes import grouped, shape_of
from tael.errors import TaelError
from tael.model import ModelConfig, build_model

V3 = ModelConfig(
    model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
    num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
    first_k_dense_replace=3, n_group=8, topk_group=4, num_nextn_predict_layers=1,
)  # fmt: skip
SMALL = ModelConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3, q_lora_rank=48)
KINDS = {
    "moe": SMALL,
    "mtp": ModelConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_nextn_predict_layers=1),
    "dense mla": ModelConfig(vocab_size=512, hidden_size=128, n_routed_experts=None, num_hidden_layers=2),
    "llama": ModelConfig(
        model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=320, num_hidden_layers=3,
        num_key_value_heads=2, n_routed_experts=None,
    ),
    "qwen2": ModelConfig(
        model_type="qwen2", vocab_size=512, hidden_size=128, intermediate_size=320, num_hidden_layers=3,
        num_key_value_heads=2, n_routed_experts=None, tie_word_embeddings=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MODELS))
def test_named_models_have_their_published_size(name: str) -> None:
    model = find_model(name)
    assert model.shape.parameters(mtp=False) == pytest.approx(model.published_parameters, rel=0.02)
    if model.published_active:
        assert model.shape.parameters(active=True, mtp=False) == pytest.approx(model.published_active, rel=0.06)


def test_v3_is_the_config_of_v3() -> None:
    shape = find_model("deepseek-v3").shape
    for mtp in (False, True):
        assert shape.parameters(mtp=mtp) == V3.parameters(mtp=mtp)
        assert shape.parameters(active=True, mtp=mtp) == V3.parameters(active=True, mtp=mtp)
    assert shape.cache_bytes() == V3.cache_bytes_per_token() == 70272
    assert shape.flops(2048).total == pytest.approx(V3.flops_per_token(2048), rel=1e-3)
    assert shape.node_limit == 4


@pytest.mark.parametrize("kind", list(KINDS))
def test_shape_of_counts_what_the_model_holds(kind: str) -> None:
    config = KINDS[kind]
    shape = shape_of(config)
    held = sum(p.numel() for name, p in build_model(config).named_parameters() if "correction_bias" not in name)
    assert shape.parameters() == config.parameters() == held
    assert shape.cache_bytes() == config.cache_bytes_per_token()
    assert shape.flops(64).total == pytest.approx(config.flops_per_token(64), rel=0.01)


def grouped_product_flops(rows: tuple[int, ...], weights: tuple[int, ...], *_: object, **__: object) -> int:
    """[M, K] rows, each by one of the weights [E, K, N]."""
    return 2 * rows[0] * rows[1] * weights[2]


@pytest.mark.parametrize("kind", ["moe", "dense mla", "llama", "qwen2"])
def test_flops_are_what_torch_counts(kind: str) -> None:
    config, length = KINDS[kind], 32
    model = build_model(config)
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    grouped_product = {torch.ops.aten._grouped_mm: grouped_product_flops}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=grouped_product) as counter, torch.no_grad():
        model(tokens)
    counted = counter.get_total_flops() / tokens.numel()
    ours = shape_of(config).flops(length, training=False)  # the counter takes all keys of causal attention
    assert ours.total == pytest.approx(counted, rel=0.01)


def test_backward_costs_twice_forward() -> None:
    config = KINDS["llama"]
    model = build_model(config)
    tokens = torch.randint(config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(tokens).float().sum().backward()
    assert shape_of(config).flops(32).total == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=0.03)


def test_sparse_attention_stops_growing() -> None:
    v32, v3 = find_model("deepseek-v3.2").shape, find_model("deepseek-v3").shape
    assert v32.flops(2048).scores == v3.flops(2048).scores
    assert v32.flops(65536).scores == v32.flops(2048).scores < v3.flops(65536).scores
    assert v32.flops(65536).indexer > v32.flops(2048).indexer > 0
    assert find_model("v4-flash").shape.cache_bytes() < v3.cache_bytes() / 5


def test_latent_decoding_reads_the_latent() -> None:
    shape = find_model("deepseek-v3").shape
    assert shape.decode_flops(4096).scores == pytest.approx(61 * 2 * 128 * (576 + 512) * 4096)
    assert shape.flops(4096, training=False).scores == pytest.approx(61 * 2 * 128 * (192 + 128) * 4096)


def test_grouped_attention_by_hand() -> None:
    attention = grouped(1024, 16, 4)
    assert attention.matrices == 1024 * (1024 + 256 + 256 + 1024)
    assert attention.cache == 2 * 4 * 64
    assert attention.score_flops(10) == 2 * 16 * 128 * 10


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(TaelError, match="did you mean 'deepseek-v3'"):
        find_model("deepsek-v3")
    assert find_model("DeepSeek-R1").name == "deepseek-v3"
