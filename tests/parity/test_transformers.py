"""Tael's Transformer against Hugging Face transformers (an implementation nobody here wrote).

Random fp32 weights, norm gains and selection biases included; logits and every parameter's gradient must agree to
1e-4 of the tensor's largest value. The transformers side runs with eager attention and eager experts.

Where transformers and the released DeepSeek code part ways, and what Tael does:
- transformers' V2 ignores `norm_topk_prob`; so do we (`test_v2_ignores_norm_topk_prob`). The released V2 checkpoints
  all say false, so nobody's numbers depend on it.
- transformers' V3 always limits groups; `topk_method` is not looked at. The released V3 checkpoints all say noaux_tc.
- YaRN's mscale squared on the softmax scale is applied by transformers 5.23 for V2 as well as V3
  (`yarn_apply_mscale`), as in the released code. Older transformers' V2 left it out: V2-Lite logits then differ.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tael.model import ModelConfig, Transformer, build_model

transformers = pytest.importorskip("transformers")

# Ours leaves the shared experts out where there are none; transformers builds them with no width.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

TOLERANCE = 1e-4
CLASSES = {
    "deepseek_v3": "DeepseekV3",
    "deepseek_v2": "DeepseekV2",
    "dots1": "Dots1",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
few = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """Weights large enough to matter everywhere: gains around 1, biases and selection biases not zero."""
    model = build_model(config, seed=seed, zero_residual=False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and tensor.dim() == 1:
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
    return model


def reference(model: Transformer) -> Any:
    """transformers' model of the same config with the same weights."""
    table = model.config.to_dict()
    stem = CLASSES[table.pop("model_type")]
    theirs = getattr(transformers, f"{stem}Config")(**table)
    theirs._attn_implementation = "eager"
    theirs._experts_implementation = "eager"
    other = getattr(transformers, f"{stem}ForCausalLM")(theirs)
    state = {
        name if name.startswith("lm_head") else f"model.{name}": tensor.clone()
        for name, tensor in model.state_dict().items()
        if not name.startswith("mtp.")
    }
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if other.get_parameter(name).numel()]
    return other.eval()


def gap(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest value."""
    return ((ours - theirs).abs().max() / max(theirs.abs().max().item(), floor, 1e-30)).item()


def compare(config: ModelConfig, seed: int = 0, batch: int = 2, length: int = 19) -> None:
    model = random_model(config, seed)
    other = reference(model)
    generator = torch.Generator().manual_seed(seed + 2)
    tokens = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    cotangent = torch.randn(batch, length, config.vocab_size, generator=generator)

    ours = model(tokens)
    theirs = other(tokens, use_cache=False).logits
    assert gap(ours, theirs) < TOLERANCE
    (ours * cotangent).sum().backward()
    (theirs * cotangent).sum().backward()
    gradients = {name: p.grad for name, p in other.named_parameters() if p.numel()}
    largest = max(g.abs().max().item() for g in gradients.values())
    compared = 0
    for name, parameter in model.named_parameters():
        if name.startswith("mtp."):
            continue
        their_name = name if name.startswith("lm_head") else f"model.{name}"
        assert parameter.grad is not None, name
        # A gradient a hundred times smaller than the largest is a difference of large numbers: rounding on both.
        assert gap(parameter.grad, gradients[their_name], floor=1e-2 * largest) < TOLERANCE, name
        compared += 1
    assert compared == sum(p.numel() > 0 for p in other.parameters())


# ------------------------------------------------------------------ strategies


def yarn(draw: Any) -> dict[str, Any]:
    mscales = [{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.707, "mscale_all_dim": 0.707}]
    mscales += [{"mscale": 1.0, "mscale_all_dim": 0.5}, {"attention_factor": 1.3}]
    return {
        "type": "yarn",
        "factor": draw(st.sampled_from([4.0, 40.0])),
        "original_max_position_embeddings": draw(st.sampled_from([64, 4096])),
        "beta_fast": draw(st.sampled_from([4, 32])),
        "beta_slow": 1,
        **draw(st.sampled_from(mscales)),
    }


@st.composite
def deepseek(draw: Any, model_type: str) -> ModelConfig:
    heads = draw(st.integers(1, 4))
    layers = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    odd = 7 if model_type == "deepseek_v3" else 6  # transformers' V2 rotates complex views: even offsets only
    extra: dict[str, Any] = {}
    if model_type == "deepseek_v3":
        extra["rope_interleave"] = draw(st.booleans())
        extra["norm_topk_prob"] = draw(st.booleans())
    else:
        extra["topk_method"] = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    return ModelConfig(
        model_type=model_type,
        vocab_size=draw(st.sampled_from([50, 64])),
        hidden_size=heads * draw(st.sampled_from([6, 16, 24])),  # 6: rows not 16-byte aligned, the looped path
        intermediate_size=draw(st.sampled_from([28, 48])),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        q_lora_rank=draw(st.sampled_from([None, 10, 16])),
        kv_lora_rank=draw(st.sampled_from([odd, 16])),
        qk_nope_head_dim=draw(st.sampled_from([odd, 16])),
        qk_rope_head_dim=draw(st.sampled_from([2, 8, 12])),
        v_head_dim=draw(st.sampled_from([6, 16])),
        n_routed_experts=groups * per_group,
        n_shared_experts=draw(st.sampled_from([0, 1, 2])),
        num_experts_per_tok=draw(st.integers(1, kept * per_group)),
        moe_intermediate_size=draw(st.sampled_from([9, 16])),
        first_k_dense_replace=draw(st.integers(0, 2)),
        n_group=groups,
        topk_group=kept,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=yarn(draw) if draw(st.booleans()) else None,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        **extra,
    )


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@st.composite
def dense(draw: Any, model_type: str) -> ModelConfig:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    scalings = [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}, yarn(draw)]
    extra: dict[str, Any] = {}
    if model_type in ("llama", "qwen3"):
        extra = {"attention_bias": draw(st.booleans()), "head_dim": draw(st.sampled_from([None, 6, 16]))}
    return ModelConfig(
        model_type=model_type,
        vocab_size=draw(st.sampled_from([50, 64])),
        hidden_size=heads * draw(st.sampled_from([6, 8])),
        intermediate_size=draw(st.sampled_from([28, 48])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        rope_scaling=draw(st.sampled_from(scalings)),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        tie_word_embeddings=draw(st.booleans()),
        **extra,
    )


# ------------------------------------------------------------------ logits and gradients


@few
@given(deepseek("deepseek_v3"), st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 33))
def test_v3(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    compare(config, seed, batch, length)


@few
@given(deepseek("deepseek_v2"), st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 33))
def test_v2(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    compare(config, seed, batch, length)


@few
@given(dense("llama"), st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 33))
def test_llama(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    compare(config, seed, batch, length)


@few
@given(dense("qwen2"), st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 33))
def test_qwen2(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    compare(config, seed, batch, length)


@few
@given(dense("qwen3"), st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 33))
def test_qwen3(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    compare(config, seed, batch, length)


@few
@given(deepseek("deepseek_v3"), dense("qwen3"), st.integers(0, 2**16), st.integers(1, 33))
def test_dots1(experts: ModelConfig, attention: ModelConfig, seed: int, length: int) -> None:
    """V3's experts on Qwen3's attention."""
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    names = [name for name in names if "expert" in name or "group" in name or name.startswith(("first_k", "moe"))]
    taken = {name: getattr(experts, name) for name in [*names, "norm_topk_prob", "routed_scaling_factor"]}
    compare(dataclasses.replace(attention, model_type="dots1", **taken), seed, 2, length)


V3_SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=16,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    rope_scaling={
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    max_position_embeddings=163840,
)


def test_v3_as_released_in_small() -> None:
    """Every switch as in the released V3 config, long enough for the fused attention path (more than 512 keys)."""
    compare(V3_SMALL, length=600, batch=1)


def test_v2_ignores_norm_topk_prob() -> None:
    config = ModelConfig(
        model_type="deepseek_v2",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        n_shared_experts=2,
        norm_topk_prob=True,
        topk_method="greedy",
    )
    assert not config.normalises_gates
    compare(config)


def test_v2_yarn_scales_the_softmax_by_mscale_squared() -> None:
    """V2-Lite's YaRN; needs a transformers that does so too, see the module's comment."""
    scaling = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    config = ModelConfig(model_type="deepseek_v2", vocab_size=64, hidden_size=32, rope_scaling=scaling)
    mscale = 0.1 * 0.707 * math.log(40) + 1
    other = reference(random_model(config, 0))
    assert other.model.layers[0].self_attn.scaling == pytest.approx(config.qk_head_dim**-0.5 * mscale**2)
    compare(config)
