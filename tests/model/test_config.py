"""ModelConfig: what it refuses, in words a user can act on, and what it reads and writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tael.errors import TaelError
from tael.model import ModelConfig


def refused(table: dict[str, Any], *words: str) -> None:
    with pytest.raises(TaelError) as caught:
        ModelConfig.from_dict(table)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"n_routed_expert": 8}, ["n_routed_expert", "did you mean 'n_routed_experts'"]),
        ({"hiden_size": 8}, ["did you mean 'hidden_size'"]),
        ({"model_type": "mamba"}, ["mamba", "deepseek_v3"]),
        ({"hidden_size": 0}, ["hidden_size", ">= 1"]),
        ({"hidden_size": "256"}, ["hidden_size", "'256'"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"qk_rope_head_dim": 7}, ["qk_rope_head_dim", "even"]),
        ({"n_routed_experts": 8, "n_group": 3}, ["n_routed_experts 8", "n_group 3"]),
        ({"n_routed_experts": 8, "n_group": 2, "topk_group": 3}, ["topk_group 3"]),
        ({"n_routed_experts": 8, "num_experts_per_tok": 9}, ["num_experts_per_tok 9"]),
        ({"n_routed_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, ["num_experts_per_tok 3"]),
        ({"n_routed_experts": 4, "n_group": 4, "topk_group": 4}, ["n_group 4", "2 experts"]),
        ({"scoring_func": "tanh"}, ["tanh", "sigmoid"]),
        ({"rope_scaling": {"type": "magic", "factor": 2}}, ["magic", "yarn"]),
        ({"rope_scaling": {"type": "yarn"}}, ["factor"]),
        ({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}, ["num_key_value_heads 3"]),
        ({"model_type": "llama", "hidden_size": 34, "num_attention_heads": 4}, ["hidden_size 34"]),
        ({"model_type": "llama", "head_dim": 5}, ["head_dim 5", "even"]),
        ({"n_group": "2"}, ["n_group", "'2'"]),
        ({"n_group": 2, "topk_group": 0}, ["topk_group", "0"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "a table"]),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, ["factor", "'x'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, ["factor"]),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps"]),
        ({"rope_theta": 0}, ["rope_theta"]),
        ({"rope_theta": float("nan")}, ["rope_theta"]),
        ({"rope_theta": 10**400}, ["rope_theta"]),
        ({"q_lora_rank": 0}, ["q_lora_rank"]),
        ({"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers"]),
        ({"n_shared_experts": 1.5}, ["n_shared_experts"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings"]),
        ({"topk_method": "magic"}, ["topk_method", "noaux_tc"]),
        ({"hidden_size": 10**30}, ["hidden_size"]),
    ],
)
def test_refusals(table: dict[str, Any], words: list[str]) -> None:
    refused(table, *words)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", "\ufeff\x00", "{}", '{"hidden_size": ' + "9" * 5000 + "}", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(TaelError, match=r"config\.json"):
            ModelConfig.load(tmp_path)
    with pytest.raises(TaelError, match="no such file"):
        ModelConfig.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(n_routed_experts=None, num_nextn_predict_layers=2),
        ModelConfig(n_group=4, topk_group=2, norm_topk_prob=False, q_lora_rank=8, rope_interleave=False),
        ModelConfig(model_type="deepseek_v2", n_group=2, topk_group=1),
        ModelConfig(model_type="deepseek_v2", n_group=2, topk_group=1, topk_method="greedy"),
        ModelConfig(model_type="llama", head_dim=12, attention_bias=True, num_nextn_predict_layers=1),
        ModelConfig(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True),
        ModelConfig(model_type="qwen3", num_key_value_heads=2, head_dim=24),
        ModelConfig(model_type="dots1", num_key_value_heads=2, n_group=2, topk_group=1, num_nextn_predict_layers=1),
        ModelConfig(model_type="dots1", n_routed_experts=None),
    ],
)
def test_written_and_read_again_it_is_the_same_model(config: ModelConfig, tmp_path: Path) -> None:
    """Not field by field (what is derived gets written out), but in everything that decides the numbers."""
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    again = ModelConfig.load(tmp_path)
    assert again.parameters() == config.parameters()
    assert again.moe_layers == config.moe_layers
    assert ModelConfig.load(tmp_path) == again
    derived = ["scoring", "uses_selection_bias", "normalises_gates", "kv_heads", "qk_head_dim", "has_qkv_bias"]
    plain = ["rope_theta", "rope_scaling", "rope_interleave", "rms_norm_eps", "tie_word_embeddings"]
    if config.can_have_experts:
        plain += ["routed_scaling_factor"]
    if config.is_mla:
        plain += ["q_lora_rank"]
    for key in derived + plain + ["num_nextn_predict_layers"]:
        assert getattr(again, key) == getattr(config, key), key
    groups = [
        (c.n_group or 1, c.topk_group or 1, c.topk_method != "greedy" and (c.n_group or 1) > 1)
        for c in (config, again)
    ]
    assert groups[0] == groups[1] or not (config.can_have_experts and config.n_routed_experts)


def test_newer_spellings() -> None:
    """transformers 5 writes rope_parameters and knows num_mtp_layers; released files have the older keys."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    table = {"rope_parameters": {"rope_theta": 500.0, **yarn}, "rope_scaling": None, "num_mtp_layers": 1}
    config = ModelConfig.from_dict(table)
    assert (config.rope_theta, config.rope_scaling, config.num_nextn_predict_layers) == (500.0, yarn, 1)
    plain = ModelConfig.from_dict({"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}})
    assert (plain.rope_theta, plain.rope_scaling) == (300.0, None)


def test_a_released_config_loads_with_its_many_other_keys() -> None:
    table = {
        **dataclasses.asdict(ModelConfig()),
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "auto_map": {},
        "eos_token_id": [1, 2],
        "first_k_dense_replace": None,
        "transformers_version": "4.33.1",
    }
    config = ModelConfig.from_dict(table, strict=False)
    assert config.eos_token_id == 1
    assert config.hidden_size == ModelConfig().hidden_size
