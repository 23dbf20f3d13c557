"""What reading a prompt and writing after it costs, in tokens and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterable

from tael.engine.sequence import Sequence
from tael.model.config import ModelConfig
from tael.train.objective import Work

NO_WORK = Work(0, 0.0)


def generation_work(config: ModelConfig, prompt: int, written: int, cached: int = 0, answers: int = 1) -> Work:
    """Of a prompt of `prompt` tokens, `cached` of them found in the cache, and `answers` to it of `written` in all.

    Counted are the tokens read and written. The last token of an answer is never read, so it costs no pass. Drafts
    that were not kept, and what was computed again after it had to make room, are not in it.
    """
    read, passes = prompt - cached, max(written - answers, 0)
    reading = read * config.flops_per_token((cached + prompt) / 2, training=False)
    writing = passes * config.flops_per_token(prompt + written / (2 * answers), training=False)
    return Work(read + written, reading + writing)


def computed_flops(config: ModelConfig, sequence: Sequence) -> float:
    """FLOPs that were spent on a request so far: of every token that went through the model for it."""
    read = min(sequence.passed, sequence.prompt_length - sequence.cached)
    reading = read * config.flops_per_token((sequence.cached + sequence.prompt_length) / 2, training=False)
    context = sequence.prompt_length + sequence.generated / 2
    return reading + (sequence.passed - read) * config.flops_per_token(context, training=False)


def sum_work(parts: Iterable[Work]) -> Work:
    """All of it together."""
    found = list(parts)
    return Work(sum(work.tokens for work in found), sum(work.flops for work in found))
