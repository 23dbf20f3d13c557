"""What `torchrun` starts in these tests: train the jobs of a JSON file one after the other, note how each ended.

A job: {"name", "kind": "lm" | "rl", "steps", "precision", "matrices", "interrupt": [rank, step], "full_disk": step}.
`build` also serves the tests' own process, so that one and two processes train exactly the same thing.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tael.data import Loader, Rows, train_tokenizer
from tael.engine import Engine, SamplingParams
from tael.errors import TaelError
from tael.model import ModelConfig, build_model
from tael.recipe import OptimizerSettings, RlSettings, TaskSettings, TrainSettings
from tael.rl.grpo import PolicyGradient
from tael.rl.rollout import Rollouts
from tael.train import LanguageModelling, LoaderSource, Parallel, Trainer, TrainerSetup
from tael.train import checkpoint as checkpoints

CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=15,  # odd: not every tensor can be cut evenly in two
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    moe_intermediate_size=16,
    num_nextn_predict_layers=1,
    max_position_embeddings=128,
)


def make_rows() -> Rows:
    """Rows with borders and masked tokens anywhere: no two processes have equally many tokens to learn."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 48, (24, 17)).astype(np.uint16)
    border = generator.integers(2, 16, (24, 1))
    documents = (2 * np.arange(24)[:, None] + (np.arange(17)[None] >= border)).astype(np.int32)
    return Rows(tokens, generator.random((24, 17)) >= generator.random((24, 1)), documents)


def evaluation(model: Any, step: int) -> dict[str, Any]:
    completion = Engine(model).generate([[1, 2, 3], [4]], SamplingParams(max_tokens=4, seed=step))
    return {"tokens": [c.tokens for c in completion]}


class Guess:
    """Rewards in place of a verifier: whether the first sampled token is even, which random models get half right."""

    def __call__(self, problem: Any, answer: Any, finished: bool) -> float:
        return float(len(answer or "") % 2)


def build(job: dict[str, Any], parallel: Parallel, directory: Path) -> Trainer:
    """The trainer of a job, for however many processes."""
    directory = directory / job["name"]
    directory.mkdir(exist_ok=True, parents=True)
    optimizer = OptimizerSettings(matrices=job.get("matrices", "muon"), learning_rate=3e-4, clip=0.5)
    shared: dict[str, Any] = {
        "steps": job["steps"],
        "optimizer": optimizer,
        "precision": job.get("precision", "fp32"),
        "checkpoint_every": 2,
        "eval_every": 2,
        "bias_update_speed": 1e-2,
    }
    speed = 1e-2
    config = CONFIG
    if job["kind"] == "rl":
        tokenizer = train_tokenizer(["What is 1 + 2? 0123456789 Answer: three." * 4], 360)
        config = replace(CONFIG, vocab_size=tokenizer.vocab_size)
        tasks = [TaskSettings(name="addition", difficulty={"digits": 1})]
        settings = RlSettings(
            tasks=tasks,
            problems=3,
            group=job.get("group", 3),
            max_tokens=5,
            mode="direct",
            loss=job["loss"],
            **shared,
        )
        from tael.rl import rollout

        rollout.reward = Guess()
        source: Any = Rollouts(settings, tokenizer, 3, parallel.rank, parallel.world_size)
        objective: Any = PolicyGradient(settings)
    else:
        settings = TrainSettings(batch_size=4, balance_loss_weight=0.05, **shared)
        source = LoaderSource(Loader(make_rows(), 4, 1, parallel.rank, parallel.world_size))
        objective = LanguageModelling(settings)

    def on_step(step: int, metrics: dict[str, Any]) -> None:
        if job.get("interrupt") == [parallel.rank, step]:
            os.kill(os.getpid(), signal.SIGINT)
        if job.get("full_disk") == step and parallel.is_main:
            checkpoints._finish = _full  # type: ignore[assignment]

    parts = TrainerSetup(
        directory, job["steps"], settings, parallel, job.get("micro", 1), speed, None, evaluation, on_step
    )
    return Trainer(build_model(config, seed=1, zero_residual=False), source, objective, parts)


def _full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main() -> None:
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    parallel = Parallel.start(torch.device("cpu"))
    run(directory, parallel)
    parallel.finish()
    tasks = Path("/proc/self/task")
    threads = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.exists() else []
    (directory / f"threads-{parallel.rank}.json").write_text(json.dumps(threads))


def run(directory: Path, parallel: Parallel) -> None:
    finish = checkpoints._finish
    for job in json.loads((directory / "jobs.json").read_text()):
        trainer = build(job, parallel, directory)
        outcome: dict[str, Any] = {"separate_twin": trainer.twin.separate, "error": None}
        try:
            trainer.run()
        except TaelError as error:
            outcome["error"] = f"{type(error).__name__}: {error}"
        checkpoints._finish = finish
        outcome |= {"steps": trainer.result.steps, "tokens": trainer.result.tokens, "flops": trainer.result.flops}
        whole = parallel.gather(trainer.model)
        outcome["gathered"] = float(sum(p.detach().double().abs().sum() for p in whole.parameters()))
        (directory / job["name"] / f"outcome-{parallel.rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
