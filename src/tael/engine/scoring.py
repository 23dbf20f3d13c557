"""Log-probabilities of given tokens, as the engine reads a prompt."""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
from torch import Tensor

from tael.engine.batch import StepBatch
from tael.engine.pool import Pool
from tael.errors import TaelError


def score(pool: Pool, prompts: List[List[int]], temperature: float, token_budget: int) -> list[Tensor]:
    """Log-probabilities [T - 1] fp32 of every prompt's tokens from the second on, `token_budget` tokens at a time.

    Blocks are borrowed for a pass and shared with nobody. Raises TaelError when running requests hold them all.
    """
    results: list[Tensor] = [torch.empty(0) for _ in prompts]
    left = [i for i, prompt in enumerate(prompts) if len(prompt) > 1]
    while left:
        taken, tokens, blocks = 0, 0, 0
        for i in left:
            tokens, blocks = tokens + len(prompts[i]) - 1, blocks + pool.blocks.blocks_for(len(prompts[i]) - 1)
            if blocks > pool.blocks.available or (taken and tokens > token_budget):
                break
            taken += 1
        if not taken:
            raise TaelError("the cache is full of running requests; score when some have finished")
        part, left = left[:taken], left[taken:]
        for i, found in zip(part, _pass(pool, [list(prompts[i]) for i in part], temperature), strict=True):
            results[i] = found
    return results


def _pass(pool: Pool, prompts: list[list[int]], temperature: float) -> list[Tensor]:
    tables = [pool.blocks.allocate(pool.blocks.blocks_for(len(prompt) - 1)) for prompt in prompts]
    try:
        batch = StepBatch.build([(p[:-1], 0, t, True) for p, t in zip(prompts, tables, strict=True)])
        logits = pool.runner.logits(pool.runner.forward(batch))  # [N, V]
    finally:
        for table in tables:
            pool.blocks.release(table)
    if temperature != 1.0:
        logits = logits / temperature
    targets = torch.tensor([token for prompt in prompts for token in prompt[1:]], device=logits.device)
    found = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return list(found.split([len(prompt) - 1 for prompt in prompts]))
