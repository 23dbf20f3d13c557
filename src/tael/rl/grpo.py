"""GRPO as an Objective for the one training loop (DeepSeekMath section 4; DeepSeek-R1 section 2.2).

One update a rollout: the policy that samples is the policy that is updated, so the ratio to the old policy is one and
only its gradient counts; the small mismatch between sampler and trainer numerics is measured (`logprob_gap`) and
corrected by truncated importance weights.
"""

from __future__ import annotations

import torch

from tael.model.config import ModelConfig
from tael.model.moe import Routing
from tael.model.transformer import Transformer
from tael.recipe import RlSettings
from tael.rl.policy_loss import policy_loss
from tael.rl.rollout import RolloutBatch
from tael.train.losses import token_logprobs
from tael.train.objective import Loss, Work


class PolicyGradient:
    """The policy loss of a RolloutBatch. `reference` is needed only when kl_weight is above 0."""

    def __init__(self, settings: RlSettings, reference: Transformer | None = None) -> None:
        self.settings, self.reference = settings, reference

    def __call__(self, model: Transformer, batch: RolloutBatch) -> Loss:
        settings = self.settings
        hidden, routing = model.features(batch.tokens)
        logprobs = self._logprobs(model, hidden, batch)
        reference = None
        if self.reference is not None and settings.kl_weight:
            with torch.no_grad():
                reference = self._logprobs(self.reference, self.reference.features(batch.tokens).hidden, batch)
        total, metrics = policy_loss(
            logprobs,
            batch.sampler_logprobs,
            None,
            batch.advantages,
            batch.mask,
            loss=settings.loss,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            importance_cap=settings.importance_cap,
            kl_weight=settings.kl_weight,
            reference_logprobs=reference,
            max_length=settings.max_tokens,
            batch_sequences=batch.whole_rows,
            batch_tokens=batch.whole_tokens,
        )
        if batch.whole_tokens is not None:
            # The loop weighs parts by their tokens; this one's share of the whole loss is counted already.
            total = total * (batch.whole_tokens / max(batch.tokens_to_learn, 1))
            real = batch.mask.any(1)  # rows that only fill up a part are no load
            routing = [Routing(r.scores[real], r.choice[real]) for r in routing]
        return Loss(total, {"loss": total.item(), **metrics}, routing)

    def _logprobs(self, model: Transformer, hidden: torch.Tensor, batch: RolloutBatch) -> torch.Tensor:
        """[B, T], zero outside the mask; the head runs only where a token was sampled."""
        picked = token_logprobs(
            hidden[batch.mask], model.lm_head.weight, batch.targets[batch.mask], self.settings.temperature
        )
        return torch.zeros(batch.mask.shape, device=picked.device).masked_scatter(batch.mask, picked)

    def work(self, config: ModelConfig, batch: RolloutBatch) -> Work:
        """Sampling (forward over every prompt and sampled token) plus training (3 forwards) on the kept rows."""
        forward = config.flops_per_token(batch.tokens.shape[1] / 2, training=False)
        sampled, trained = batch.sampled_tokens + batch.prompt_tokens, batch.tokens.numel()
        return Work(sampled + trained, (sampled + 3 * trained) * forward)
