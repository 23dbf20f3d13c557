"""Trains models for two steps each in a process of its own and prints by how many bytes it grew.

    python train_and_weigh.py CASES DIRECTORY     prints {name: {"step": .., "judging": .., "saving": ..}}

CASES is JSON: {name: [model, settings]}. A small model of the same kind is trained before each, so that the
resting size holds the program's own pages: libraries are read into memory where they are first used. In bf16 the
model itself is trained once before: oneDNN keeps code for the shapes it sees (`tael.cost.here.KERNEL_BYTES`).
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from tael.cost.measure import peak_memory_bytes, reset_peak_memory
from tael.data import Document, Loader, Rows, train_tokenizer
from tael.evals.perplexity import bits_per_byte
from tael.model import ModelConfig, build_model
from tael.model.transformer import Transformer
from tael.recipe import PretrainSettings
from tael.train import LanguageModelling, LoaderSource, Parallel, Trainer, TrainerSetup
from tael.train.precision import limit_kernel_cache

STEPS = 2


def train(
    config: ModelConfig, settings: PretrainSettings, directory: Path, done: Callable[[str], None] = lambda phase: None
) -> None:
    """Pretrain on noise, put together as `tael.stages` does; `done` hears of each phase of the last step."""
    directory.mkdir()
    shape = (settings.batch_size, settings.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, shape).astype(np.uint16)
    rows = Rows(tokens, np.ones(shape, bool), np.zeros(shape, np.int32))
    tokenizer = train_tokenizer(["0123456789 some words"], 300)
    held_out = [Document("0123456789" * (settings.sequence_length // 10 + 1), "noise")] * settings.eval_documents

    def evaluate(model: Transformer, step: int) -> dict[str, Any]:
        if step == STEPS:
            bits_per_byte(model, tokenizer, held_out, settings.sequence_length)
            done("judging")
        return {}

    setup = TrainerSetup(
        directory,
        STEPS,
        settings,
        Parallel(torch.device("cpu")),
        micro_batches=settings.batch_size // (settings.micro_batch_size or settings.batch_size),
        bias_update_speed=settings.bias_update_speed,
        evaluate=evaluate,
        on_step=lambda step, metrics: done("step") if step == STEPS else None,
        on_saved=lambda before, now: done("saving"),
    )
    source = LoaderSource(Loader(rows, settings.batch_size, 0))
    Trainer(build_model(config), source, LanguageModelling(settings), setup).run()


def smaller(config: ModelConfig) -> ModelConfig:
    return replace(config, vocab_size=300, hidden_size=64, intermediate_size=64, moe_intermediate_size=32)


def weigh(config: ModelConfig, settings: PretrainSettings, directory: Path) -> dict[str, int]:
    """How much larger the process is at the peak of each phase than it was before the model."""
    few = settings.model_copy(update={"batch_size": 2, "micro_batch_size": None, "sequence_length": 32})
    train(smaller(config), few, directory / "warm")
    if settings.precision == "bf16":
        train(config, settings, directory / "kernels")
    gc.collect()
    resting, grown = psutil.Process().memory_info().rss, {}
    reset_peak_memory()

    def done(phase: str) -> None:
        grown[phase] = peak_memory_bytes() - resting
        reset_peak_memory()

    train(config, settings, directory / "stage", done)
    return grown


def main() -> None:
    torch.set_num_threads(1)
    limit_kernel_cache()
    if not reset_peak_memory():
        print(json.dumps(None))
        return
    result = {}
    for number, (name, (model, settings)) in enumerate(json.loads(sys.argv[1]).items()):
        directory = Path(sys.argv[2]) / str(number)
        directory.mkdir()
        result[name] = weigh(ModelConfig.from_dict(model), PretrainSettings.model_validate(settings), directory)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
