"""Learning rate over a stage: warmup, stable, decay (MiniCPM, DeepSeek-V3 section 4.2)."""

from __future__ import annotations

import math

from tael.recipe import ScheduleSettings


def learning_rate_factor(step: int, steps: int, settings: ScheduleSettings) -> float:
    """Multiplier of the peak rate for update number `step` (0-based) of `steps`, in (0, 1]."""
    warmup = settings.warmup * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    decay = settings.decay * steps
    left = steps - step
    if decay <= 0 or left >= decay:
        return 1.0
    share = left / decay  # 1 at the start of the decay, 1/decay at the last step
    if settings.shape == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return settings.final + (1 - settings.final) * share
