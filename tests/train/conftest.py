"""A tiny model with everything in it (MLA, experts, MTP), some rows to learn, and a way to train on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tael.data import Loader, Rows
from tael.model import ModelConfig, build_model
from tael.recipe import TrainSettings
from tael.train import LanguageModelling, LoaderSource, Parallel, Trainer, TrainerSetup

TINY = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    moe_intermediate_size=16,
    num_nextn_predict_layers=1,
    max_position_embeddings=128,
)


def make_rows(count: int = 24, length: int = 16, seed: int = 0, masked: float = 0.2) -> Rows:
    """Rows of two documents each, borders anywhere; some tokens are not to be learned."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 48, (count, length + 1)).astype(np.uint16)
    border = generator.integers(2, length, (count, 1))
    documents = (2 * np.arange(count)[:, None] + (np.arange(length + 1)[None] >= border)).astype(np.int32)
    return Rows(tokens, generator.random((count, length + 1)) >= masked, documents)


@pytest.fixture
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture
def rows() -> Rows:
    return make_rows()


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """(name, steps, settings.., micro_batches=, config=, rows=, evaluate=) -> a Trainer in tmp_path/name."""

    def make(
        name: str,
        steps: int = 6,
        micro_batches: int = 1,
        config: ModelConfig = TINY,
        rows: Rows | None = None,
        setup: dict[str, Any] | None = None,
        **options: Any,
    ) -> Trainer:
        options = {"batch_size": 4, "checkpoint_every": 2, "eval_every": 2, "precision": "fp32"} | options
        settings = TrainSettings(steps=steps, **options)
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        parts = TrainerSetup(
            directory,
            steps,
            settings,
            Parallel(torch.device("cpu")),
            micro_batches,
            settings.bias_update_speed,
        )
        loader = Loader(make_rows() if rows is None else rows, settings.batch_size, seed=1)
        source, objective = LoaderSource(loader), LanguageModelling(settings)
        return Trainer(build_model(config, seed=1), source, objective, replace(parts, **(setup or {})))

    return make


CLOCK = ("seconds", "tokens_per_second", "utilisation")


@pytest.fixture
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """metrics.jsonl without what the clock says."""

    def read(directory: Path) -> list[dict[str, Any]]:
        lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]

    return read
