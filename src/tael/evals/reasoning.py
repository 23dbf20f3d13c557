"""Held-out accuracy on reasoning problems, in each way of answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tael.data import Mode, Tokenizer
from tael.engine import Engine, SamplingParams
from tael.engine.work import NO_WORK, generation_work, sum_work
from tael.evals.statistics import Accuracy
from tael.model.transformer import Transformer
from tael.rl.rollout import SAMPLER, Answer, answer_problems, stop_ids
from tael.rl.tasks import Problem
from tael.train.objective import Work

MODES: tuple[Mode, ...] = ("free", "think", "direct")


@dataclass(frozen=True)
class ReasoningResult:
    """Accuracy in one mode, the mean length of an answer in tokens, the share that thought, answers, and work."""

    accuracy: Accuracy
    completion_tokens: float
    think_rate: float
    answers: list[Answer]
    work: Work = NO_WORK

    def as_dict(self) -> dict[str, float]:
        return {**self.accuracy.as_dict(), "completion_tokens": self.completion_tokens, "think_rate": self.think_rate}


def reasoning_accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    asked: Sequence[Problem],
    mode: Mode,
    max_tokens: int = 64,
    batch: int = 256,
) -> ReasoningResult:
    """Greedy answers to `asked`, judged by the exact verifiers."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_ids=stop_ids(tokenizer))
    engine, answers = Engine(model, tokenizer, SAMPLER), []
    for start in range(0, len(asked), batch):
        answers += answer_problems(engine, tokenizer, asked[start : start + batch], mode, params)
    count = max(len(answers), 1)
    return ReasoningResult(
        Accuracy(sum(int(a.reward) for a in answers), len(answers)),
        round(sum(len(a.completion.tokens) for a in answers) / count, 2),
        round(sum(a.parsed.reasoning is not None for a in answers) / count, 4),
        answers,
        _work(model, answers),
    )


def _work(model: Transformer, answers: Sequence[Answer]) -> Work:
    found = [a.completion for a in answers]
    return sum_work(generation_work(model.config, c.prompt_tokens, len(c.tokens), c.cached_tokens) for c in found)


def samples(result: ReasoningResult, mode: Mode, label: str, count: int = 6) -> list[dict]:
    """The first answers as lines for samples.jsonl."""
    return [
        {
            "label": label,
            "mode": mode,
            "prompt": answer.problem.prompt,
            "reasoning": answer.parsed.reasoning,
            "answer": answer.parsed.answer,
            "expected": answer.problem.answer,
            "correct": bool(answer.reward),
        }
        for answer in result.answers[:count]
    ]
