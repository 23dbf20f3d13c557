"""A token put in by the thinking budget may be the first of a block."""

from __future__ import annotations

import torch

from tael.data import train_tokenizer
from tael.engine import Engine, SamplingParams
from tael.model import ModelConfig, build_model


def test_a_thinking_budget_may_end_at_any_slot_of_a_block():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["The quick brown fox.\n" * 3], 300)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 2}
    config = ModelConfig(model_type="llama", vocab_size=300, max_position_embeddings=96, **shape)
    engine = Engine(build_model(config), tokenizer, cache_tokens=96, backend="torch")
    assert tokenizer.think_id is not None
    for budget in range(1, 36):
        sampling = SamplingParams(48, seed=budget, thinking_budget=budget)
        [found] = engine.generate([[5, 6, tokenizer.think_id]], sampling)
        assert tokenizer.end_think_id in found.tokens[: budget + 1] and len(found.tokens) == 48
    engine.pool.scheduler.check_integrity()
