"""The baselines of bench/cost_to_quality.py: that what is counted of them is what they do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from baselines import Baseline


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_flops_against_torch(kind) -> None:
    """Attention is counted at half the length, as everywhere in Tael; torch counts the whole square."""
    baseline = Baseline("b", kind, 64, 3, 2, 96, 10, 2, 32, 1e-3)
    torch.manual_seed(0)
    model = baseline.build(128)
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    attention = 3 * baseline.layers * 4 * baseline.hidden_size * baseline.sequence_length / 2
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(
        baseline.flops_per_token(model) + attention, rel=0.01
    )


def test_both_are_what_their_papers_say() -> None:
    gpt2 = Baseline("b", "gpt2", 64, 2, 2, 256, 10, 2, 32, 1e-3).build(128)
    llama = Baseline("b", "llama", 64, 2, 2, 176, 10, 2, 32, 1e-3).build(128)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight and gpt2.transformer.wpe.weight.shape == (32, 64)
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    dropped = [m.p for model in (gpt2, llama) for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropped and not any(dropped)
