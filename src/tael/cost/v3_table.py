"""DeepSeek-V3's published cost table (report, table 1) from tokens, sequence lengths and prices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tael.cost.chips import find_chip
from tael.cost.named import find_model
from tael.cost.planner import Plan, Run, plan_training
from tael.cost.timing import Constants


@dataclass(frozen=True)
class Stage:
    name: str
    plans: tuple[Plan, ...]
    reported_hours: float

    @property
    def hours(self) -> float:
        return sum(plan.gpu_hours for plan in self.plans)

    @property
    def dollars(self) -> float:
        return sum(plan.dollars or 0.0 for plan in self.plans)


def v3_cost_table(constants: Constants | None = None) -> list[Stage]:
    """The stages: 14.8T tokens at 4K; 1000 steps of 1920 sequences at 32K and 1000 of 480 at 128K; SFT.

    Post-training counts two epochs of SFT over 1.5M samples; their length is not published: 1,000 tokens assumed
    (the report's 5K hours hold RL as well, which it does not describe in tokens).
    """
    model = find_model("deepseek-v3")
    base = Run(model.shape, model.tokens, 4096, model.batch_tokens, "fp8", find_chip("H800"), 2048, 2.0)
    long = [
        replace(base, tokens=1000.0 * sequences * length, sequence=length, batch_tokens=float(sequences * length))
        for sequences, length in ((1920, 32768), (480, 131072))
    ]
    tuning = replace(base, tokens=2 * 1.5e6 * 1000.0)
    stages = (
        ("pre-training", (base,), 2_664_000.0),
        ("context extension", tuple(long), 119_000.0),
        ("post-training", (tuning,), 5_000.0),
    )
    return [Stage(name, tuple(plan_training(run, constants) for run in runs), hours) for name, runs, hours in stages]
