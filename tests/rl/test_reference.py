"""The KL term's reference: a frozen copy of its own, which costs nothing while the policy has not moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tael.model import ModelConfig, build_model
from tael.recipe import RlSettings, TaskSettings
from tael.rl.grpo import PolicyGradient
from tael.rl.rollout import RolloutBatch
from tael.stages import _reference

CPU = torch.device("cpu")
CONFIG = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48)


def settings(**more: Any) -> RlSettings:
    return RlSettings(tasks=[TaskSettings(name="chain")], precision="fp32", **more)


def batch() -> RolloutBatch:
    tokens = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, 3:] = True
    return RolloutBatch(tokens[:, :-1], tokens[:, 1:], mask, torch.zeros(4, 8), torch.ones(4), 20, 12)


def test_no_reference_without_a_kl_term() -> None:
    assert _reference(settings(), build_model(CONFIG), CPU) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_is_frozen_and_its_own(precision: str) -> None:
    model = build_model(CONFIG, zero_residual=False)
    chosen = settings(kl_weight=0.1).model_copy(update={"precision": precision})
    reference = _reference(chosen, model, CPU)
    assert reference is not None and not any(p.requires_grad for p in reference.parameters())
    before = reference.lm_head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(before, reference.lm_head.weight)


def test_kl_is_zero_until_the_policy_moves() -> None:
    model, chosen = build_model(CONFIG, zero_residual=False), settings(kl_weight=0.1)
    objective = PolicyGradient(chosen, _reference(chosen, model, CPU))
    assert objective(model, batch()).metrics["kl"] == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    moved = objective(model, batch())
    assert moved.metrics["kl"] > 1e-3
    moved.total.backward()
