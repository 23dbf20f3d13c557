"""A small training run for a process that will be killed: `python train_tiny.py DIRECTORY STEPS [SLOW_SAVE_SECONDS]`.

Prints a line a step; with SLOW_SAVE_SECONDS every write of a checkpoint's files, and the moment before its rename,
takes that long, so that a kill can be aimed at it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tael.data import Loader, Rows
from tael.model import ModelConfig, build_model
from tael.recipe import TrainSettings
from tael.train import LanguageModelling, LoaderSource, Parallel, Stopped, Trainer, TrainerSetup
from tael.train import checkpoint as checkpoints

CONFIG = ModelConfig(
    vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=16, n_routed_experts=4
)


def slow_down(seconds: float) -> None:
    """Announce and stretch both halves of a save."""
    write, sync = checkpoints.HuggingFaceStorageWriter.write_data, checkpoints.sync

    def slow_write(self: Any, plan: Any, planner: Any) -> Any:
        result = write(self, plan, planner)
        print("saving", flush=True)
        time.sleep(seconds)
        return result

    def slow_sync(path: Path) -> None:
        print("syncing", flush=True)
        time.sleep(seconds / 10)
        sync(path)

    checkpoints.HuggingFaceStorageWriter.write_data = slow_write  # type: ignore[method-assign]
    checkpoints.sync = slow_sync


def main() -> None:
    directory, steps = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        slow_down(float(sys.argv[3]))
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 48, (16, 17)).astype(np.uint16)
    rows = Rows(tokens, np.ones((16, 17), bool), np.zeros((16, 17), np.int32))
    settings = TrainSettings(steps=steps, batch_size=4, checkpoint_every=3, eval_every=1000, mtp_weight=0)

    def on_step(step: int, metrics: dict[str, Any]) -> None:
        print(f"step {step}", flush=True)

    setup = TrainerSetup(
        directory, steps, settings, Parallel(torch.device("cpu")), bias_update_speed=1e-3, on_step=on_step
    )
    source, objective = LoaderSource(Loader(rows, 4, 1)), LanguageModelling(settings)
    trainer = Trainer(build_model(CONFIG, seed=1), source, objective, setup)
    print("ready", flush=True)
    try:
        trainer.run()
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
