"""Training steps in a process of its own, as a child of bench/peers.py: their seconds, and the process's peak."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from peers import serve

from tael.cost.measure import peak_memory_bytes
from tael.data import Loader, Rows
from tael.model import ModelConfig, build_model
from tael.recipe import PretrainSettings, load_recipe
from tael.train import LanguageModelling
from tael.train.optim import Optimizer
from tael.train.precision import Twin, compute_dtype


class Training:
    """The first stage of a recipe on random tokens, a few steps at a time, without logging and checkpoints."""

    def setup(self, recipe: str, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        loaded = load_recipe(recipe)
        settings = next(iter(loaded.stages.values()))
        assert isinstance(settings, PretrainSettings)
        config = ModelConfig.from_dict({"vocab_size": loaded.tokenizer.vocab_size, **loaded.model})
        shape = (settings.batch_size * 40, settings.sequence_length + 1)
        # As uneven as words are, so that experts get uneven shares.
        tokens = np.minimum(np.random.default_rng(0).zipf(1.3, shape), config.vocab_size - 1).astype(np.uint16)
        self.loader = Loader(Rows(tokens, np.ones(shape, bool), np.zeros(shape, np.int32)), settings.batch_size, 0)
        self.model = build_model(config, 0)
        self.twin = Twin(self.model, compute_dtype(settings.precision, torch.device("cpu")))
        self.optimizer, self.objective = Optimizer(self.model, settings.optimizer), LanguageModelling(settings)
        self.done = 0
        precision = "bf16" if self.twin.separate else "fp32"
        return {"tokens": settings.batch_size * settings.sequence_length, "precision": precision}

    def train(self, steps: int) -> dict[str, Any]:
        """Seconds of `steps` more steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.objective(self.twin.compute, self.loader.batch(self.done)).total.backward()
            self.twin.collect_gradients()
            self.optimizer.step(1e-3)
            self.twin.sync()
            self.done += 1
        return {"seconds": time.perf_counter() - began, "peak_bytes": peak_memory_bytes()}


if __name__ == "__main__":
    training = Training()
    serve({"setup": training.setup, "train": training.train})
