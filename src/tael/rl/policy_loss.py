"""Group-relative advantages and the clipped policy losses of the GRPO family, as pure functions of tensors.

Legend: N problems, G samples of each, B = N*G completions (some may be dropped), T completion tokens (padded).

One loss differs from the next in two choices, and only there: what is clipped (`_token_objective`) and what the
sum over tokens is divided by (`_aggregate`).

    grpo     token ratio, min of clipped and unclipped; mean over a sequence, then over sequences
             (DeepSeekMath, arXiv 2402.03300, eq. 3; DeepSeek-R1, arXiv 2501.12948, eq. 1)
    dr_grpo  as grpo; sum divided by sequences times a constant length (arXiv 2503.20783, sec. 3.2 and listing 1)
    dapo     as grpo; mean over all tokens of the batch (arXiv 2503.14476, eq. 8); clip_high > clip_low
    gspo     sequence ratio, the geometric mean of the token ratios; as grpo (arXiv 2507.18071, eqs. 5 and 7)
    cispo    detached ratio clipped from above weighs the log-probability; as dapo (arXiv 2506.13585, eqs. 4 and 5)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LossName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]

_EPSILON = 1e-4  # as TRL; keeps (r - mean)/std finite
_LARGEST_LOG_RATIO = 20.0  # as verl; exp overflows in float32 from 88 on, and inf * 0 would be NaN


def informative(rewards: Tensor) -> Tensor:
    """Which groups can teach anything: bool [N], False where all G rewards of `rewards` [N, G] are equal.

    DAPO, arXiv 2503.14476, eq. 11 (dynamic sampling) keeps exactly these.
    """
    return rewards.amax(dim=1) > rewards.amin(dim=1)


def group_advantages(rewards: Tensor, scale: bool) -> Tensor:
    """Advantages [N, G] of `rewards` [N, G] relative to their own group; exactly 0 in groups without variance.

    `scale` divides by the group's standard deviation: (r - mean) / (std + 1e-4) (DeepSeekMath, sec. 4.1.2), std with
    G - 1 as TRL and verl have it. Without it, r - mean (Dr. GRPO, arXiv 2503.20783, sec. 3.2).
    """
    rewards = rewards.float()
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + _EPSILON)
    return torch.where(informative(rewards)[:, None], advantages, torch.zeros_like(advantages))  # [N, G]


def policy_loss(
    logprobs: Tensor,  # [B, T], with gradient
    sampler_logprobs: Tensor,  # [B, T]
    old_logprobs: Tensor | None,  # [B, T]
    advantages: Tensor,  # [B]
    mask: Tensor,  # [B, T]
    *,
    loss: LossName,
    clip_low: float,
    clip_high: float,
    importance_cap: float,
    kl_weight: float = 0.0,
    reference_logprobs: Tensor | None = None,  # [B, T]
    max_length: int | None = None,
    batch_sequences: int | None = None,
    batch_tokens: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss (scalar, to be minimised) and metrics of one batch of completions.

    `old_logprobs` are the trainer's own before the rollout's first update; None says this is that update: the ratio
    is 1 and only carries the gradient. Where the sampler computed other probabilities than the trainer, each token
    is weighed by exp(old - sampler), and left out (weight 0, but still counted) beyond `importance_cap` (masked
    importance sampling). `mask` is 1 on the completion's tokens; elsewhere any value, NaN too, is ignored.
    `kl_weight` adds the k3 estimate of KL(policy || reference) (DeepSeekMath, eq. 4).

    `max_length` is dr_grpo's constant length; None takes T. When the batch comes in parts, `batch_sequences` and
    `batch_tokens` (mask's sum) are the counts of the whole: the parts' losses then add up to the whole's loss.

    Raises ValueError for an unknown loss, or `kl_weight` without `reference_logprobs`.
    """
    if kl_weight and reference_logprobs is None:
        raise ValueError("kl_weight is set, but reference_logprobs is None")
    mask = mask.bool()
    logprobs = logprobs.float().masked_fill(~mask, 0.0)
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach().float().masked_fill(~mask, 0.0)
    mismatch = old - sampler_logprobs.detach().float().masked_fill(~mask, 0.0)  # [B, T]
    importance = mismatch.exp()
    kept = importance <= importance_cap
    importance = importance.masked_fill(~kept, 0.0)

    advantage = advantages.detach().float()[:, None]  # [B, 1]
    objective, ratio = _token_objective(logprobs, old, advantage, mask, loss, clip_low, clip_high)
    per_token = -objective * importance  # [B, T]
    metrics: dict[str, float] = {}
    if kl_weight and reference_logprobs is not None:
        kl = k3_divergence(logprobs, reference_logprobs.detach().float().masked_fill(~mask, 0.0))
        per_token = per_token + kl_weight * kl
        metrics["kl"] = _mean(kl, mask)
    total = _aggregate(per_token, mask, loss, max_length, batch_sequences, batch_tokens)

    high = (ratio > 1 + clip_high) & (advantage > 0)
    low = (ratio < 1 - clip_low) & (advantage < 0) if loss != "cispo" else torch.zeros_like(high)
    metrics |= {
        "clipped_high": _mean(high.expand_as(mask), mask),
        "clipped_low": _mean(low.expand_as(mask), mask),
        "logprob_gap": _mean(mismatch.abs(), mask),
        "importance_masked": _mean(~kept, mask),
        "surprise": _mean(-logprobs, mask),
    }
    return total, metrics


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Unbiased, never negative estimate of KL(policy || reference) a token (DeepSeekMath, eq. 4; both [B, T]).

    pi_ref/pi - log(pi_ref/pi) - 1.
    """
    log_ratio = reference_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def _token_objective(
    logprobs: Tensor,  # [B, T]
    old: Tensor,  # [B, T]
    advantage: Tensor,  # [B, 1]
    mask: Tensor,  # [B, T]
    loss: LossName,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """What is to be maximised at each token, and the ratio to the old policy: [B, T], or [B, 1] for gspo."""
    log_ratio = (logprobs - old).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    if loss == "cispo":
        # The paper leaves the lower clip out of its runs ("eps_low large"); so do TRL and verl.
        ratio = log_ratio.detach().exp()
        return ratio.clamp(max=1 + clip_high) * advantage * logprobs, ratio
    if loss == "gspo":
        log_ratio = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)  # [B, 1]
    elif loss not in ("grpo", "dr_grpo", "dapo"):
        raise ValueError(f"unknown loss '{loss}'; valid are: grpo, dr_grpo, dapo, gspo, cispo")
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantage, clipped * advantage), ratio.detach()


def _aggregate(
    per_token: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    loss: LossName,
    max_length: int | None,
    batch_sequences: int | None,
    batch_tokens: int | None,
) -> Tensor:
    """One number from losses [B, T]; the second choice in which the members of the family differ."""
    sums = per_token.masked_fill(~mask, 0.0).sum(dim=1)  # [B]
    lengths = mask.sum(dim=1).clamp(min=1)  # [B]
    sequences = max(1, batch_sequences or mask.shape[0])
    if loss in ("dapo", "cispo"):
        tokens = mask.sum().clamp(min=1) if batch_tokens is None else max(1, batch_tokens)
        return sums.sum() / tokens
    if loss == "dr_grpo":
        return sums.sum() / (sequences * (max_length or mask.shape[1]))
    return (sums / lengths).sum() / sequences


def _mean(values: Tensor, mask: Tensor) -> float:
    """Mean of [B, T] over the tokens of `mask`; 0.0 when there are none."""
    return (values.detach().float().masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)).item()
