"""The runner's logits over the paged cache against transformers over the whole text, for every kind of model.

One table of blocks in no order, blocks of 4 slots, so that pieces begin, end and cross borders everywhere.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tael.engine import Engine, SamplingParams
from tael.engine.batch import StepBatch
from tael.engine.runner import TorchRunner
from tael.model import ModelConfig

pytest.importorskip("transformers")


def _sibling(name: str) -> Any:
    """A test module beside this one: how models are mapped is written down there."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


mapping = _sibling("test_transformers")

LENGTH = 37
DENSE = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
CONFIGS = {
    "deepseek_v3": replace(mapping.V3_SMALL, max_position_embeddings=4096),
    "deepseek_v2": ModelConfig(
        model_type="deepseek_v2",
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        kv_lora_rank=16,
        n_shared_experts=2,
        topk_method="greedy",
    ),
    "llama": ModelConfig(model_type="llama", num_key_value_heads=2, **DENSE),
    "qwen2": ModelConfig(model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True, **DENSE),
}
TABLE = [9, 3, 4, 5, 12, 1, 11, 2, 8, 10]


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest) -> tuple[Any, list[list[int]], Tensor]:
    """Our model, two texts, and transformers' logits [2, T, V] of them."""
    model = mapping.random_model(CONFIGS[request.param], seed=2)
    tokens = torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = mapping.reference(model)(tokens, use_cache=False).logits
    return model, tokens.tolist(), theirs


def read(runner: TorchRunner, tokens: list[int], pieces: list[tuple[int, bool]], table: list[int]) -> Tensor:
    """Logits [T, V] of `tokens`, read in pieces of (tokens, expanded)."""
    found, start = [], 0
    for size, expanded in pieces:
        batch = StepBatch.build([(tokens[start : start + size], start, table, expanded)])
        found.append(runner.logits(runner.forward(batch)))
        start += size
    assert start == len(tokens)
    return torch.cat(found)


@pytest.mark.parametrize(
    "pieces",
    [
        [(LENGTH, True)],
        [(5, True), (4, True), (11, True), (1, True), (16, True)],
        [(6, True)] + [(1, False)] * (LENGTH - 6),
        [(13, True), (4, False), (1, False), (19, False)],
    ],
    ids=["whole", "chunks", "decode", "replay"],
)
@pytest.mark.parametrize("table", [TABLE, list(range(1, 11))], ids=["scattered", "range"])
def test_one_text(case: Any, pieces: list[tuple[int, bool]], table: list[int]) -> None:
    model, tokens, theirs = case
    found = read(TorchRunner(model, 13, 4), tokens[0], pieces, table)
    assert (found - theirs[0]).abs().max() < 1e-4


def test_mixed_company(case: Any) -> None:
    """A prompt in pieces while another text decodes, in one batch; both stay right."""
    model, tokens, theirs = case
    runner = TorchRunner(model, 25, 4)
    tables = [TABLE, [b + 12 for b in reversed(TABLE)]]
    read(runner, tokens[0][:9], [(9, True)], tables[0])
    first, second = [], []
    for i in range(9):
        parts = [
            (tokens[1][3 * i : 3 * i + 3], 3 * i, tables[1], True),
            (tokens[0][9 + i : 10 + i], 9 + i, tables[0], False),
        ]
        logits = runner.logits(runner.forward(StepBatch.build(parts)))
        second.append(logits[:3])
        first.append(logits[3:])
    assert (torch.cat(first) - theirs[0, 9:18]).abs().max() < 1e-4
    assert (torch.cat(second) - theirs[1, :27]).abs().max() < 1e-4


def test_shared_blocks(case: Any) -> None:
    """A second sequence goes on from blocks that the first has written."""
    model, tokens, theirs = case
    runner = TorchRunner(model, 25, 4)
    read(runner, tokens[0][:14], [(14, True)], TABLE)
    table = [*TABLE[:3], *range(14, 21)]  # 12 tokens shared
    for start, stop, expanded in ((12, 20, True), (20, 21, False), (21, LENGTH, True)):
        batch = StepBatch.build([(tokens[0][start:stop], start, table, expanded)])
        found = runner.logits(runner.forward(batch))
        assert (found - theirs[0, start:stop]).abs().max() < 1e-4


def test_the_engine_says_what_transformers_would(case: Any) -> None:
    """Greedy answers, and their log-probabilities, alone and after a shared prefix, prompts read in pieces."""
    model, tokens, _ = case
    other = mapping.reference(model)
    engine = Engine(model, block_size=4, cache_tokens=200, max_batch=4, token_budget=7)
    prompts = [tokens[0][:18], tokens[0][:18], [*tokens[0][:13], 5, 6], tokens[1][:3]]
    for prompt, completion in zip(prompts, engine.generate(prompts, SamplingParams(12, 0.0)), strict=True):
        whole = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            law = other(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert completion.tokens == law.argmax(-1).tolist()
        wanted = law.gather(-1, torch.tensor(completion.tokens).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=0, atol=1e-4)
    assert engine.stats.cached_tokens > 0
