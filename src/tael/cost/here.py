"""Predicts a recipe on this machine, stage by stage: what `tael run` will take, before it runs.

Models that fit a desk are far from any roofline (operators of microseconds, two cores shared with others), so the
rate is measured, not taken from a sheet: `measured=True` times a few steps of the recipe's own shape on random
tokens, with the trainer's own pieces. Without it a quick matrix product stands in, and the answer is rough.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from tael.cost.measure import matrix_peak
from tael.cost.trainer_memory import FULL, TrainingStep, trainer_memory
from tael.data import Batch
from tael.engine import Engine, SamplingParams
from tael.errors import TaelError
from tael.model import ModelConfig, build_model
from tael.recipe import OptimizerSettings, PretrainSettings, Recipe, RlSettings, TrainSettings
from tael.train.objective import LanguageModelling
from tael.train.optim import Optimizer
from tael.train.precision import Twin, compute_dtype, limit_kernel_cache

TYPICAL_UTILISATION = 0.33
"""Training's share of a matrix product's rate on two cores, from the demo's ledger; only for the rough answer."""
SAMPLING_SHARE = 0.1
"""Sampling's rate over training's in FLOPs, as rough."""
PROMPT, ANSWER_SHARE = 24, 0.5
"""Tokens of a task's prompt, and the part of max_tokens that answers use in the mean over an RL stage."""
DOCUMENT = 350
"""Tokens of a held-out document, of which evaluation reads eval_documents."""
MODES = 3
TIMED_STEPS = 3
PROGRAM_BYTES = 0.5e9
"""Python, torch and the packed text: the peak of the demo's preparation."""
KERNEL_BYTES = 0.27e9
"""Where a CPU computes experts in bf16: code that oneDNN compiles for shapes it sees and never gives back. It stops
growing after a few steps (the demo's: bench/training_memory.py)."""


@dataclass(frozen=True)
class StagePlan:
    """One stage predicted."""

    name: str
    kind: str
    steps: int
    tokens: int
    flops: float
    seconds: float
    memory_bytes: float
    """Peak of the process: what it holds already, and a training step."""

    def to_dict(self, per_hour: float, watts: float | None) -> dict[str, Any]:
        joules = None if watts is None else self.seconds * watts
        return {**vars(self), "dollars": self.seconds / 3600 * per_hour, "joules": joules}


def plan_recipe(recipe: Recipe, *, measured: bool, peak: float | None = None) -> list[StagePlan]:
    """Every stage of `recipe` on this machine, its evaluations counted (as the run counts its seconds), not the
    preparation before the first. `peak`: FLOP/s of a matrix product here, where they are known; for the rough answer.

    Raises TaelError for a recipe that tunes a checkpoint (`base`).
    """
    if recipe.base is not None:
        raise TaelError("recipe: plan knows recipes with a [model] of their own; this one starts from a base")
    model = {"vocab_size": recipe.tokenizer.vocab_size, **recipe.model}
    config = ModelConfig.from_dict(model, where="recipe: model")
    rates = _Measured(config) if measured else _Rough(peak)
    plans = []
    for name, stage in recipe.stages.items():
        plan = _plan_rl if isinstance(stage, RlSettings) else _plan_training
        plans.append(plan(name, stage, config, rates))  # type: ignore[arg-type]
    return plans


def _plan_training(name: str, stage: TrainSettings, config: ModelConfig, rates: _Rough | _Measured) -> StagePlan:
    tokens = stage.batch_size * stage.sequence_length
    flops = config.flops_per_token(stage.sequence_length / 2)
    step = rates.training_step(config, stage, stage.batch_size, stage.sequence_length)
    evaluations = -(-stage.steps // stage.eval_every)  # every eval_every steps, and after the last
    kind = "pretrain" if isinstance(stage, PretrainSettings) else "sft"
    if isinstance(stage, PretrainSettings):
        one = stage.eval_documents * DOCUMENT / tokens * step / 3
    else:
        one = MODES * rates.sampling(config, getattr(stage, "eval_problems", 0), PROMPT)
    seconds = stage.steps * step + evaluations * one
    memory = _process_bytes(TrainingStep.of(config, stage))
    return StagePlan(name, kind, stage.steps, stage.steps * tokens, stage.steps * tokens * flops, seconds, memory)


def _plan_rl(name: str, stage: RlSettings, config: ModelConfig, rates: _Rough | _Measured) -> StagePlan:
    rows, answer = stage.problems * stage.group, max(1, round(stage.max_tokens * ANSWER_SHARE))
    length = PROMPT + answer
    learn = rates.training_step(config, TrainSettings(mtp_weight=0.0), rows, length)
    step = rates.sampling(config, rows, answer) + learn
    times = 1 + -(-stage.steps // stage.eval_every)  # before the first step as well
    evaluations = times * MODES * rates.sampling(config, stage.eval_problems, answer)
    # As PolicyGradient counts: a token is sampled (one forward pass) and, if its group is kept, learned (three).
    once = stage.steps * rows * length
    tokens, flops = 2 * once, 4.0 * once * config.flops_per_token(length / 2, training=False)
    longest = TrainingStep.of_policy(config, stage, PROMPT + stage.max_tokens, rows * answer)
    memory = _process_bytes(longest)
    return StagePlan(name, stage.kind, stage.steps, tokens, flops, stage.steps * step + evaluations, memory)


def _process_bytes(step: TrainingStep) -> float:
    """Peak of a process that trains by `step`, with what it is without it."""
    kernels = KERNEL_BYTES if step.value_bytes < FULL and step.config.n_routed_experts else 0
    return PROGRAM_BYTES + kernels + trainer_memory(step).peak


class _Rough:
    """Rates from one matrix product and typical shares."""

    def __init__(self, peak: float | None) -> None:
        dtype = compute_dtype("auto", torch.device("cpu"))
        self.rate = (matrix_peak("cpu", dtype) if peak is None else peak) * TYPICAL_UTILISATION

    def training_step(self, config: ModelConfig, stage: TrainSettings, rows: int, length: int) -> float:
        return rows * length * config.flops_per_token(length / 2) / self.rate

    def sampling(self, config: ModelConfig, rows: int, tokens: int) -> float:
        return rows * tokens * config.flops_per_token(tokens, training=False) / (self.rate * SAMPLING_SHARE)


class _Measured:
    """Rates of the recipe's own shape, timed on random tokens."""

    def __init__(self, config: ModelConfig) -> None:
        limit_kernel_cache()  # as the run will
        self.model = build_model(config, 0)
        self.engine = Engine(self.model)

    def training_step(self, config: ModelConfig, stage: TrainSettings, rows: int, length: int) -> float:
        """Median seconds of a step after one that warms up."""
        batch = _random_batch(config, rows, length)
        model = build_model(config, 0)
        twin = Twin(model, compute_dtype(stage.precision, torch.device("cpu")))
        optimizer, objective = Optimizer(model, OptimizerSettings()), LanguageModelling(stage)
        parts = -(-rows // (stage.micro_batch_size or rows))
        seconds = []
        for _ in range(TIMED_STEPS + 1):
            began = time.perf_counter()
            for part in batch.split(parts):
                objective(twin.compute, part).total.backward()
                twin.collect_gradients()
            optimizer.step(1e-3)
            twin.sync()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])

    def sampling(self, config: ModelConfig, rows: int, tokens: int) -> float:
        """Seconds until `rows` prompts have `tokens` more tokens each."""
        if not rows:
            return 0.0
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(16, config.vocab_size, (rows, PROMPT), generator=generator).tolist()
        began = time.perf_counter()
        list(self.engine.generate(prompts, SamplingParams(tokens, 1.0, seed=0)))
        return time.perf_counter() - began


def _random_batch(config: ModelConfig, rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    return Batch(
        tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(rows, length, dtype=torch.int64)
    )
