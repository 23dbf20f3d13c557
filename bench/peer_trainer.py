"""Training steps in a process of its own, as a child of bench/peers.py: their seconds, and the process's memory."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from peers import serve

from tael.cost.measure import give_back_memory, peak_memory_bytes
from tael.data import Loader, Rows
from tael.model import ModelConfig, build_model
from tael.recipe import PretrainSettings, load_recipe
from tael.train import LanguageModelling, LoaderSource, Parallel, Trainer, TrainerSetup


class Training:
    """The first stage of a recipe on random tokens, a few steps at a time, without checkpoints and evaluation."""

    def setup(self, recipe: str, threads: int, overrides: list[str] | None = None) -> dict[str, Any]:
        torch.set_num_threads(threads)
        loaded = load_recipe(recipe, overrides)
        settings = next(iter(loaded.stages.values()))
        assert isinstance(settings, PretrainSettings)
        config = ModelConfig.from_dict({"vocab_size": loaded.tokenizer.vocab_size, **loaded.model})
        shape = (settings.batch_size * 40, settings.sequence_length + 1)
        # As uneven as words are, so that experts get uneven shares.
        tokens = np.minimum(np.random.default_rng(0).zipf(1.3, shape), config.vocab_size - 1).astype(np.uint16)
        rows = Rows(tokens, np.ones(shape, bool), np.zeros(shape, np.int32))
        self.folder = TemporaryDirectory()
        resting = psutil.Process().memory_info().rss
        self.trainer = Trainer(
            build_model(config, 0),
            LoaderSource(Loader(rows, settings.batch_size, 0)),
            LanguageModelling(settings),
            TrainerSetup(
                Path(self.folder.name),
                settings.steps,
                settings,
                Parallel(torch.device("cpu")),
                bias_update_speed=settings.bias_update_speed,
            ),
        )
        precision = "bf16" if self.trainer.twin.separate else "fp32"
        step = settings.batch_size * settings.sequence_length
        return {"tokens": step, "precision": precision, "resting_bytes": resting}

    def train(self, steps: int) -> dict[str, Any]:
        """Seconds of `steps` more steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer.step()
        return {"seconds": time.perf_counter() - began, "peak_bytes": peak_memory_bytes()}

    def forget(self) -> dict[str, Any]:
        """The process's size once the model and all that trained it are gone."""
        del self.trainer
        give_back_memory()
        return {"resting_bytes": psutil.Process().memory_info().rss}


if __name__ == "__main__":
    training = Training()
    serve({"setup": training.setup, "train": training.train, "forget": training.forget})
