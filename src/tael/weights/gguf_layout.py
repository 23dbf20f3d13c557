"""How a model lies in a GGUF file: its metadata as a ModelConfig and back, and which tensors make which parameter.

| GGUF                                                | Tael                                                    |
|-----------------------------------------------------|---------------------------------------------------------|
| llama: rows of q and k in the order of RoPE's pairs | halves (i, i + d/2), as in Hugging Face's folders       |
| ffn_gate_exps, ffn_up_exps [E, F, D]                | mlp.experts.gate_up_proj [E, 2F, D]                     |
| attn_k_b [H, R, N] and attn_v_b [H, V, R]; or kv_b  | kv_b_proj [H (N + V), R]                                |
| output.weight missing                               | tied embeddings                                         |
| rope_freqs.weight: RoPE's divisors a pair           | rope_scaling "llama3", whose formula gives the divisors |

Names: gguf.constants; conventions: llama.cpp's conversion scripts and `llm_build_deepseek2`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tael.data.gguf_file import GGUFFile
from tael.errors import TaelError
from tael.model.config import ModelConfig
from tael.model.rope import make_rope

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "deepseek2": "deepseek_v2"}
"""GGUF architecture -> model_type; deepseek2 is V3 where experts are chosen by a sigmoid."""

_SOFTMAX, _SIGMOID = 1, 2
_YARN_LOG_UNIT = 0.1
"""llama.cpp stores 0.1 mscale_all_dim as yarn_log_multiplier (its pull request 17945)."""

_LLAMA3_DEFAULTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

Form = Literal["plain", "pairs", "gate_up", "kv_b"]


class Source(NamedTuple):
    """The tensors of the file that make one parameter, and how: `pairs` are rows to be put back into halves."""

    parameter: str
    names: tuple[str, ...]
    form: Form = "plain"


# --------------------------------------------------------------------- tensors


def sources(config: ModelConfig) -> Iterator[Source]:
    """One Source a parameter of a model of this shape, biases and MLA's split form included."""
    yield Source("embed_tokens.weight", ("token_embd.weight",))
    yield Source("norm.weight", ("output_norm.weight",))
    if not config.tie_word_embeddings:
        yield Source("lm_head.weight", ("output.weight",))
    for index in range(config.num_hidden_layers):
        to, of = f"layers.{index}", f"blk.{index}"
        yield Source(f"{to}.input_layernorm.weight", (f"{of}.attn_norm.weight",))
        yield Source(f"{to}.post_attention_layernorm.weight", (f"{of}.ffn_norm.weight",))
        yield from _latent_attention(config, to, of) if config.is_mla else _grouped_attention(config, to, of)
        if config.is_moe_layer(index):
            yield from _experts(config, to, of)
        else:
            for name in ("gate", "up", "down"):
                yield Source(f"{to}.mlp.{name}_proj.weight", (f"{of}.ffn_{name}.weight",))


def _grouped_attention(config: ModelConfig, to: str, of: str) -> Iterator[Source]:
    form: Form = "pairs" if config.model_type == "llama" else "plain"
    for leaf in ("weight", "bias") if config.has_qkv_bias else ("weight",):
        for name in ("q", "k"):
            yield Source(f"{to}.self_attn.{name}_proj.{leaf}", (f"{of}.attn_{name}.{leaf}",), form)
        yield Source(f"{to}.self_attn.v_proj.{leaf}", (f"{of}.attn_v.{leaf}",))
    yield Source(f"{to}.self_attn.o_proj.weight", (f"{of}.attn_output.weight",))
    if config.attention_bias and config.model_type == "llama":
        yield Source(f"{to}.self_attn.o_proj.bias", (f"{of}.attn_output.bias",))


def _latent_attention(config: ModelConfig, to: str, of: str) -> Iterator[Source]:
    if config.q_lora_rank is None:
        yield Source(f"{to}.self_attn.q_proj.weight", (f"{of}.attn_q.weight",))
    else:
        for mine, theirs in (("q_a_proj", "attn_q_a"), ("q_a_layernorm", "attn_q_a_norm"), ("q_b_proj", "attn_q_b")):
            yield Source(f"{to}.self_attn.{mine}.weight", (f"{of}.{theirs}.weight",))
    yield Source(f"{to}.self_attn.kv_a_proj_with_mqa.weight", (f"{of}.attn_kv_a_mqa.weight",))
    yield Source(f"{to}.self_attn.kv_a_layernorm.weight", (f"{of}.attn_kv_a_norm.weight",))
    yield Source(f"{to}.self_attn.kv_b_proj.weight", (f"{of}.attn_k_b.weight", f"{of}.attn_v_b.weight"), "kv_b")
    yield Source(f"{to}.self_attn.o_proj.weight", (f"{of}.attn_output.weight",))


def _experts(config: ModelConfig, to: str, of: str) -> Iterator[Source]:
    yield Source(f"{to}.mlp.gate.weight", (f"{of}.ffn_gate_inp.weight",))
    if config.uses_selection_bias:
        yield Source(f"{to}.mlp.gate.e_score_correction_bias", (f"{of}.exp_probs_b.bias",))
    both = (f"{of}.ffn_gate_exps.weight", f"{of}.ffn_up_exps.weight")
    yield Source(f"{to}.mlp.experts.gate_up_proj", both, "gate_up")
    yield Source(f"{to}.mlp.experts.down_proj", (f"{of}.ffn_down_exps.weight",))
    if config.n_shared_experts:
        for name in ("gate", "up", "down"):
            yield Source(f"{to}.mlp.shared_experts.{name}_proj.weight", (f"{of}.ffn_{name}_shexp.weight",))


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows [heads head_dim, ..] in the order of RoPE's pairs, (0, 0'), (1, 1').. -> halves 0, 1, .., 0', 1', ..."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """`to_halves` undone."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# -------------------------------------------------------------------- metadata


def read_config(file: GGUFFile, rope_divisors: Tensor | None = None) -> ModelConfig:
    """The model's shape from the metadata; `rope_divisors` [pairs] is rope_freqs.weight, where there is one.

    Raises TaelError for another architecture, and for settings Tael's model does not have.
    """
    arch = file.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise TaelError(f"{file.path}: architecture '{arch}' is not supported, only {', '.join(ARCHITECTURES)}")
    _refuse_unknown(file, arch)
    layers = file.integer(f"{arch}.block_count")
    if layers > len(file.tensors):  # before a model of as many layers is laid out
        raise TaelError(f"{file.path}: damaged: {layers} layers, but {len(file.tensors)} tensors")
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0
    table: dict[str, Any] = {
        "model_type": ARCHITECTURES[arch],
        "vocab_size": rows or file.integer(f"{arch}.vocab_size"),
        "hidden_size": file.integer(f"{arch}.embedding_length"),
        "intermediate_size": file.integer(f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": file.integer(f"{arch}.attention.head_count"),
        "max_position_embeddings": file.integer(f"{arch}.context_length"),
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number(f"{arch}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    table |= _read_mla(file) if arch == "deepseek2" else _read_gqa(file, arch)
    if (scaling := _read_scaling(file, arch)) is not None:
        table["rope_scaling"] = scaling
    config = ModelConfig.from_dict(table, where=str(file.path))
    return config if rope_divisors is None else _with_llama3(file, config, rope_divisors)


def _refuse_unknown(file: GGUFFile, arch: str) -> None:
    if arch != "deepseek2" and file.integer(f"{arch}.expert_count", 0):
        raise TaelError(f"{file.path}: experts in architecture '{arch}' are not supported")
    window = file.integer(f"{arch}.attention.sliding_window", 0)
    if 0 < window < file.integer(f"{arch}.context_length"):
        raise TaelError(f"{file.path}: attention within a sliding window of {window} is not supported")


def _read_gqa(file: GGUFFile, arch: str) -> dict[str, Any]:
    heads = file.integer(f"{arch}.attention.head_count")
    plain = file.integer(f"{arch}.embedding_length") // max(heads, 1)
    width = file.integer(f"{arch}.attention.key_length", plain)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.integer(f"{arch}.{key}", width) != width:
            raise TaelError(f"{file.path}: {arch}.{key} must be the heads' width {width} in Tael's attention")
    return {
        "num_key_value_heads": file.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": width,
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in file.tensors,
    }


def _read_mla(file: GGUFFile) -> dict[str, Any]:
    arch = "deepseek2"
    rotary = file.integer(f"{arch}.rope.dimension_count")
    experts = file.integer(f"{arch}.expert_count", 0)
    v3 = file.integer(f"{arch}.expert_gating_func", _SOFTMAX) == _SIGMOID
    split = f"{arch}.attention.key_length_mla" in file.metadata
    suffix = "_mla" if split else ""
    groups = file.integer(f"{arch}.expert_group_count", 1)
    return {
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "q_lora_rank": file.metadata.get(f"{arch}.attention.q_lora_rank"),
        "kv_lora_rank": file.integer(f"{arch}.attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": file.integer(f"{arch}.attention.key_length{suffix}") - rotary,
        "v_head_dim": file.integer(f"{arch}.attention.value_length{suffix}"),
        "n_routed_experts": experts or None,
        "n_shared_experts": file.integer(f"{arch}.expert_shared_count", 0),
        "num_experts_per_tok": file.integer(f"{arch}.expert_used_count", 1),
        "moe_intermediate_size": file.integer(f"{arch}.expert_feed_forward_length", 1),
        "first_k_dense_replace": file.integer(f"{arch}.leading_dense_block_count", 0),
        "routed_scaling_factor": file.number(f"{arch}.expert_weights_scale", 1.0),
        "norm_topk_prob": file.flag(f"{arch}.expert_weights_norm", False),
        "n_group": groups,
        "topk_group": file.integer(f"{arch}.expert_group_used_count", 1),
        "topk_method": None if v3 else ("group_limited_greedy" if groups > 1 else "greedy"),
    }


def _read_scaling(file: GGUFFile, arch: str) -> dict[str, Any] | None:
    prefix = f"{arch}.rope.scaling"
    kind = file.text(f"{prefix}.type", "none")
    factor = file.number(f"{prefix}.factor", 1.0)
    if kind == "none" or factor == 1.0:
        return None
    scaling: dict[str, Any] = {"type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = file.integer(f"{prefix}.original_context_length")
        for mine, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if f"{prefix}.{theirs}" in file.metadata:
                scaling[mine] = file.number(f"{prefix}.{theirs}")
        if arch == "deepseek2" and (unit := file.number(f"{prefix}.yarn_log_multiplier", 0.0)):
            scaling["mscale"] = scaling["mscale_all_dim"] = round(unit / _YARN_LOG_UNIT, 6)
    return scaling


def _with_llama3(file: GGUFFile, config: ModelConfig, divisors: Tensor) -> ModelConfig:
    """`config` with the llama3 scaling whose formula gives the divisors of the file."""
    prefix = f"{file.text('general.architecture')}.rope.scaling"
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": round(float(divisors.max()), 4)}
    for key, default in _LLAMA3_DEFAULTS.items():
        scaling[key] = type(default)(file.number(f"{prefix}.{key}", default))
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    expected = llama3_divisors(scaled) if scaling["factor"] > 0 else divisors
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise TaelError(f"{file.path}: rope_freqs.weight follows no scaling of RoPE that Tael knows (llama3)")
    return scaled if scaling["factor"] > 1 else config


def llama3_divisors(config: ModelConfig) -> Tensor:
    """By how much Llama 3.1's scaling divides each pair's frequency, [pairs] fp32."""
    one = torch.ones(1)
    plain = make_rope(dataclasses.replace(config, rope_scaling=None), one)
    scaled = make_rope(config, one)
    # The angle at position 1 is the frequency itself, at most 1: atan2 takes it back exactly enough.
    return (torch.atan2(plain.sin, plain.cos) / torch.atan2(scaled.sin, scaled.cos)).flatten()


def write_config(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """(architecture, metadata) of a model; raises TaelError for what llama.cpp's graphs cannot express."""
    arch = "deepseek2" if config.is_mla else config.model_type
    if arch not in ARCHITECTURES:
        raise TaelError(f"model_type '{config.model_type}' cannot be written as GGUF yet; keep the model folder")
    table: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
    }
    table |= _write_mla(config) if config.is_mla else _write_gqa(config)
    table |= _write_scaling(config)
    return arch, {f"{arch}.{key}": value for key, value in table.items()}


def _write_gqa(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.gqa_head_dim,
        "attention.value_length": config.gqa_head_dim,
        "rope.dimension_count": config.gqa_head_dim,
    }


def _write_mla(config: ModelConfig) -> dict[str, Any]:
    if config.attention_bias:
        raise TaelError("attention_bias: llama.cpp's deepseek2 has no biases; this model cannot be written as GGUF")
    if not config.rope_interleave:
        raise TaelError(
            "rope_interleave = false: llama.cpp's deepseek2 rotates pairs; this cannot be written as GGUF"
        )
    experts = config.n_routed_experts or 0
    table: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace if experts else config.num_hidden_layers,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts or 0,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.normalises_gates,
        "expert_gating_func": _SIGMOID if config.scoring == "sigmoid" else _SOFTMAX,
    }
    if config.q_lora_rank is not None:
        table["attention.q_lora_rank"] = config.q_lora_rank
    if experts:
        table |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
    if experts and (config.n_group or 1) > 1 and config.topk_method != "greedy":
        table |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group or 1}
    return table


def _write_scaling(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if not scaling:
        return {}
    kind = scaling.get("rope_type", scaling.get("type"))
    prefix = "rope.scaling"
    if kind == "llama3":  # llama.cpp reads the divisors (rope_freqs.weight); these say where they come from
        return {f"{prefix}.{key}": scaling[key] for key in _LLAMA3_DEFAULTS}
    table: dict[str, Any] = {f"{prefix}.type": kind, f"{prefix}.factor": float(scaling["factor"])}
    if kind != "yarn":
        return table
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    table[f"{prefix}.original_context_length"] = int(original)
    table[f"{prefix}.yarn_beta_fast"] = float(scaling.get("beta_fast") or 32)
    table[f"{prefix}.yarn_beta_slow"] = float(scaling.get("beta_slow") or 1)
    mscale, all_dim = scaling.get("mscale") or 0, scaling.get("mscale_all_dim") or 0
    if scaling.get("attention_factor") is not None or not math.isclose(mscale, all_dim):
        raise TaelError("rope_scaling: GGUF has no place for attention_factor, nor for mscale beside mscale_all_dim")
    if all_dim:
        table[f"{prefix}.yarn_log_multiplier"] = _YARN_LOG_UNIT * all_dim
    return table
