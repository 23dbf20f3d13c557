"""Values and gradients of the policy losses against TRL's own `GRPOTrainer._compute_loss` (skipped without TRL).

    pip install -c constraints.txt trl

The trainer is stood in for by the attributes its loss reads; the loss itself is TRL's code, unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tael.rl.policy_loss import group_advantages, policy_loss

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)


def trl_loss(logprobs, sampler, old, advantages, mask, loss, clip_low, clip_high, cap, kl_weight, reference, length):
    ratio = ((old if old is not None else logprobs.detach()) - sampler).mul(mask).exp()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        beta=kl_weight,
        loss_type="grpo" if loss == "gspo" else loss,
        epsilon_low=clip_low,
        epsilon_high=1 + clip_high if loss == "cispo" else clip_high,  # TRL's bound on the cispo ratio is absolute
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=length,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    empty = torch.zeros(logprobs.shape[0], 0, dtype=torch.long)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "importance_sampling_ratio": ratio.masked_fill(ratio > cap, 0.0),  # their mode "token_mask"
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": reference,
    }
    if old is not None:
        inputs["old_per_token_logps"] = old
    return grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.05])
@pytest.mark.parametrize("on_policy", [True, False])
def test_equals_trl(loss, kl_weight: float, on_policy: bool) -> None:
    generator = torch.Generator().manual_seed(11)
    shape = (8, 7)
    old = -2 * torch.rand(shape, generator=generator) - 0.1
    noise = [0.4 * torch.randn(shape, generator=generator) for _ in range(3)]
    mask = torch.arange(7)[None] < torch.randint(1, 8, (8, 1), generator=generator)
    advantages = torch.randn(8, generator=generator)
    mine, theirs = ((old + noise[0]).requires_grad_() for _ in range(2))
    sampler, reference = old + 2 * noise[1], old + noise[2]
    given = None if on_policy else old
    value, metrics = policy_loss(
        mine, sampler, given, advantages, mask, loss=loss, clip_low=0.2, clip_high=0.28, importance_cap=3.0,
        kl_weight=kl_weight, reference_logprobs=reference, max_length=10,
    )  # fmt: skip
    expected, trl_metrics = trl_loss(
        theirs, sampler, given, advantages, mask, loss, 0.2, 0.28, 3.0, kl_weight, reference, 10
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, y)[0] for x, y in ((value, mine), (expected, theirs))))
    if kl_weight:
        assert metrics["kl"] == pytest.approx(trl_metrics["kl"][0], rel=1e-5)
    if loss in ("grpo", "dr_grpo", "dapo"):
        assert metrics["clipped_high"] == pytest.approx(trl_metrics["clip_ratio/high_mean"][0])
        assert metrics["clipped_low"] == pytest.approx(trl_metrics["clip_ratio/low_mean"][0])


def test_advantages_use_trls_standard_deviation() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.25, 1.0, 0.5]])
    std = grpo_trainer.nanstd(rewards, dim=1)[:, None]
    expected = (rewards - rewards.mean(dim=1, keepdim=True)) / (std + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, scale=True), expected)
