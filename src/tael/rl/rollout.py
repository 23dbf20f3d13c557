"""Rollouts: problems sampled with the present policy, rewarded, and laid out for the policy loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tael.data import Message, ParsedAnswer, Tokenizer, encode_chat, parse_completion
from tael.engine import Completion, Engine, EngineSettings, SamplingParams
from tael.errors import TaelError
from tael.model.transformer import Transformer
from tael.recipe import RlSettings
from tael.rl.policy_loss import group_advantages, informative
from tael.rl.rewards import reward
from tael.rl.tasks import Problem, problems

SAMPLER = EngineSettings(backend="torch", max_batch=512, token_budget=8192)
"""The trainer's own model, many requests at a time: throughput counts, not how soon the first token comes."""


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts with their completions, right-padded; row b holds one completion.

    tokens, targets [B, T] int64 (targets: the token after each); mask [B, T] where the target is a sampled token;
    sampler_logprobs [B, T] of those; advantages [B]. `sampled_tokens` and `prompt_tokens` count the whole rollout,
    dropped groups included. In a part of a step's batch, `whole_rows` and `whole_tokens` (mask's sum) count the
    whole.
    """

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    sampled_tokens: int
    prompt_tokens: int
    whole_rows: int | None = None
    whole_tokens: int | None = None

    @property
    def tokens_to_learn(self) -> int:
        return int(self.mask.sum())

    def split(self, parts: int) -> list[RolloutBatch]:
        """The same rows in `parts` pieces; the counts of the whole rollout go with the first.

        Where there are fewer rows than parts, rows that teach nothing fill up: every process must pass the model.
        """
        rows = self.tokens.shape[0]
        whole_rows = rows if self.whole_rows is None else self.whole_rows
        whole_tokens = self.tokens_to_learn if self.whole_tokens is None else self.whole_tokens
        empty = max(parts - rows, 0) if rows else 0
        fields = [torch.cat((t, torch.zeros_like(t[:1].expand(empty, *t.shape[1:])))) for t in self._tensors()]
        tokens, targets, mask, logprobs, advantages = (t.tensor_split(parts) for t in fields)
        return [
            RolloutBatch(
                tokens[i],
                targets[i],
                mask[i],
                logprobs[i],
                advantages[i],
                0 if i else self.sampled_tokens,
                0 if i else self.prompt_tokens,
                whole_rows,
                whole_tokens,
            )
            for i in range(parts)
        ]

    def to(self, device: torch.device) -> RolloutBatch:
        """The batch on `device`."""
        names = ("tokens", "targets", "mask", "sampler_logprobs", "advantages")
        return replace(self, **{n: t.to(device) for n, t in zip(names, self._tensors(), strict=True)})

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.tokens, self.targets, self.mask, self.sampler_logprobs, self.advantages


@dataclass(frozen=True)
class Answer:
    """One sampled answer, taken apart and judged."""

    problem: Problem
    completion: Completion
    parsed: ParsedAnswer
    reward: float


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer; raises TaelError when the tokenizer has none."""
    if not tokenizer.stop_ids:
        raise TaelError("the tokenizer has no end-of-sentence token, so an answer could never end")
    return tokenizer.stop_ids


def answer_problems(
    engine: Engine,
    tokenizer: Tokenizer,
    asked: Sequence[Problem],
    mode,
    params: Sequence[SamplingParams] | SamplingParams,
) -> list[Answer]:
    """Ask every problem once in `mode` and judge what comes."""
    prompts = [encode_chat(tokenizer, [Message("user", p.prompt)], mode) for p in asked]
    answers = []
    for problem, completion in zip(asked, engine.generate(prompts, params), strict=True):
        parsed = parse_completion(tokenizer, completion.tokens, mode)
        answers.append(Answer(problem, completion, parsed, reward(problem, parsed.answer, parsed.finished)))
    return answers


class Rollouts:
    """A Source for the Trainer: step n's problems and random numbers are fixed by (seed, n).

    With `world_size` processes all sample the same completions, in step with one another (a sharded model's forward
    pass needs all of them), and each trains on its share of the rows.
    """

    def __init__(
        self, settings: RlSettings, tokenizer: Tokenizer, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.settings, self.tokenizer, self.seed = settings, tokenizer, seed
        self.rank, self.world_size = rank, world_size
        self.metrics: dict[str, float] = {}
        self._stop = stop_ids(tokenizer)

    def batch(self, step: int, model: Transformer) -> RolloutBatch:
        """Sample `problems` x `group` completions and keep the groups whose rewards differ."""
        settings = self.settings
        base = (self.seed * 1_000_003 + step) * 1_000_003  # a range of seeds of its own for every step
        asked = problems(settings.tasks, base, settings.problems, "train")
        repeated = [problem for problem in asked for _ in range(settings.group)]
        params = SamplingParams(settings.max_tokens, settings.temperature, seed=base % 2**40, stop_ids=self._stop)
        engine = Engine(model, self.tokenizer, SAMPLER)
        answers = answer_problems(engine, self.tokenizer, repeated, settings.mode, params)
        rewards = torch.tensor([a.reward for a in answers]).view(len(asked), settings.group)  # [N, G]
        kept = informative(rewards)
        self.metrics = self._describe(answers, int(kept.sum()))
        advantages = group_advantages(rewards, scale=settings.loss != "dr_grpo").flatten()
        rows = kept.repeat_interleave(settings.group).nonzero().flatten().tolist()
        return self._lay_out(answers, advantages, rows).split(self.world_size)[self.rank]

    def _describe(self, answers: list[Answer], kept: int) -> dict[str, float]:
        count = len(answers)
        return {
            "reward": sum(a.reward for a in answers) / count,
            "completion_tokens": sum(len(a.completion.tokens) for a in answers) / count,
            "think_rate": sum(a.parsed.reasoning is not None for a in answers) / count,
            "truncated": sum(a.completion.finish_reason == "length" for a in answers) / count,
            "kept_groups": kept,
        }

    def _lay_out(self, answers: list[Answer], advantages: Tensor, rows: list[int]) -> RolloutBatch:
        prompts = {
            a.problem.prompt: encode_chat(self.tokenizer, [Message("user", a.problem.prompt)], self.settings.mode)
            for a in answers
        }
        sampled = sum(len(a.completion.tokens) for a in answers)
        read = sum(len(prompts[a.problem.prompt]) for a in answers)
        width = max(
            (len(prompts[answers[r].problem.prompt]) + len(answers[r].completion.tokens) for r in rows), default=1
        )
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        logprobs = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            prompt, completion = prompts[answers[row].problem.prompt], answers[row].completion
            end = len(prompt) + len(completion.tokens)
            tokens[i, :end] = torch.tensor(prompt + completion.tokens)
            mask[i, len(prompt) : end] = True
            logprobs[i, len(prompt) : end] = torch.tensor(completion.logprobs)
        return RolloutBatch(
            tokens[:, :-1], tokens[:, 1:], mask[:, 1:], logprobs[:, 1:], advantages[rows], sampled, read
        )
