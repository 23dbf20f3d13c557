"""The smallest model that trains, and a recipe of a few steps of it, for tests of runs."""

from __future__ import annotations

from pathlib import Path

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 160,
}
SHAPE_LINES = "\n".join(f"{key} = {value}" for key, value in SHAPE.items())


def tiny_recipe(book: Path, steps: int) -> str:
    """A recipe that pretrains on the text file `book`."""
    return f"""name = "tiny"
description = "A few steps"
[tokenizer]
vocab_size = 320
[data]
path = "{book}"
holdout = 0.2
[model]
{SHAPE_LINES}
[stages.pretrain]
kind = "pretrain"
steps = {steps}
batch_size = 2
sequence_length = 32
precision = "fp32"
eval_every = 4000
eval_documents = 2
"""
