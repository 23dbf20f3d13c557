"""How each kind of stage is put together for the one training loop: batches, objective, evaluation."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from tael.data import Example, Loader, Message, Rows, encode_example, pack_examples
from tael.data.sources import conversations
from tael.engine import Engine, SamplingParams
from tael.engine.work import NO_WORK, generation_work, sum_work
from tael.errors import TaelError
from tael.evals.perplexity import bits_per_byte
from tael.evals.reasoning import MODES, reasoning_accuracy, samples
from tael.model.transformer import Transformer
from tael.preparation import Prepared
from tael.recipe import PretrainSettings, RlSettings, SftSettings, StageSettings, TaskSettings
from tael.rl.grpo import PolicyGradient
from tael.rl.rollout import Rollouts, stop_ids
from tael.rl.tasks import Problem, problems
from tael.train import LanguageModelling, LoaderSource
from tael.train.objective import Objective, Work
from tael.train.precision import Twin, compute_dtype
from tael.train.trainer import Source

TEST_SEED = 20_250_120
"""Seed of every held-out problem set: one set for all stages and seeds of a task, so that figures compare."""

SAMPLE_PROMPTS = 3
SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, and what it cost."""

    metrics: dict[str, Any]
    work: Work = NO_WORK


Evaluate = Callable[[Transformer, int], Evaluation]
"""(model, steps done): may write samples."""


@dataclass(frozen=True)
class StagePlan:
    """What the loop needs for one stage."""

    source: Source
    objective: Objective
    evaluate: Evaluate
    steps: int
    micro_batches: int = 1
    bias_update_speed: float = 0.0


def plan_stage(prepared: Prepared, name: str, settings: StageSettings, model: Transformer) -> StagePlan:
    """Build the stage `name`; `model` is the policy it starts from (for RL's reference)."""
    if isinstance(settings, PretrainSettings):
        return _pretrain(prepared, name, settings)
    if isinstance(settings, SftSettings):
        return _sft(prepared, name, settings)
    if isinstance(settings, RlSettings):
        return _rl(prepared, name, settings, model)
    raise TaelError(f"stages.{name}: unknown kind of stage")


def stage_seed(prepared: Prepared, settings: StageSettings) -> int:
    return prepared.recipe.seed if settings.seed is None else settings.seed


def _pretrain(prepared: Prepared, name: str, settings: PretrainSettings) -> StagePlan:
    rows, seed = prepared.rows(settings.sequence_length), stage_seed(prepared, settings)
    held_out = prepared.held_out()[: settings.eval_documents]

    def evaluate(model: Transformer, step: int) -> Evaluation:
        if step == 0:
            return Evaluation({})
        work = _write_continuations(prepared, name, model) if step == settings.steps else NO_WORK
        found = bits_per_byte(model, prepared.tokenizer, held_out, settings.sequence_length)
        return Evaluation(found.as_dict(), sum_work((work, found.work)))

    return _language_stage(prepared, settings, rows, seed, evaluate)


def _language_stage(
    prepared: Prepared,
    settings: PretrainSettings | SftSettings,
    rows: Rows,
    seed: int,
    evaluate: Evaluate,
) -> StagePlan:
    parallel = prepared.parallel
    loader = Loader(rows, settings.batch_size, seed, parallel.rank, parallel.world_size)
    micro = settings.batch_size // (settings.micro_batch_size or settings.batch_size)
    return StagePlan(
        LoaderSource(loader), LanguageModelling(settings), evaluate, settings.steps, micro, settings.bias_update_speed
    )


def _write_continuations(prepared: Prepared, name: str, model: Transformer) -> Work:
    """Keep as samples what the model writes after the beginnings of held-out documents."""
    tokenizer, lines, works = prepared.tokenizer, [], []
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompts = [bos + tokenizer.encode(d.text)[:16] for d in prepared.held_out()[:SAMPLE_PROMPTS]]
    stops = () if tokenizer.eos_id is None else stop_ids(tokenizer)
    params = SamplingParams(SAMPLE_TOKENS, temperature=0.8, top_p=0.95, stop_ids=stops)
    for prompt, completion in zip(prompts, Engine(model).generate(prompts, params), strict=True):
        texts = tokenizer.decode(prompt), tokenizer.decode(completion.tokens)
        line = {"label": "after", "mode": "text", "prompt": texts[0], "reasoning": None, "answer": texts[1]}
        lines.append({**line, "expected": None, "correct": None})
        read = completion.prompt_tokens, len(completion.tokens), completion.cached_tokens
        works.append(generation_work(model.config, *read))
    _write_samples(prepared, name, "after", lines)
    return sum_work(works)


# ------------------------------------------------------------------------- SFT


def _sft(prepared: Prepared, name: str, settings: SftSettings) -> StagePlan:
    seed = stage_seed(prepared, settings)
    rows = pack_examples(list(_examples(prepared, settings, seed)), settings.sequence_length, _pad_id(prepared))
    evaluate = _accuracy_evaluation(prepared, name, settings.tasks, settings.eval_problems, settings.steps, 64)

    def after_start(model: Transformer, step: int) -> Evaluation:
        return evaluate(model, step) if step and settings.tasks else Evaluation({})

    return _language_stage(prepared, settings, rows, seed, after_start)


def _pad_id(prepared: Prepared) -> int:
    return prepared.tokenizer.pad_id or 0


def _examples(prepared: Prepared, settings: SftSettings, seed: int) -> Iterable[Example]:
    """Worked and direct answers to the tasks' training problems, mixed with dialogues, in an order of the seed."""
    generator = random.Random(seed)
    dialogue_count = round(settings.examples * settings.dialogue_fraction) if settings.dialogues else 0
    if not settings.tasks:
        dialogue_count = settings.examples
    found = list(islice(_dialogues(prepared, settings.dialogues), dialogue_count))
    talks = [found[i % len(found)] for i in range(dialogue_count)] if found else []
    asked = problems(settings.tasks, seed, settings.examples - dialogue_count, "train") if settings.tasks else []
    worked = [generator.random() < settings.worked_fraction for _ in asked]
    messages = [_as_messages(p, w) for p, w in zip(asked, worked, strict=True)] + talks
    generator.shuffle(messages)
    return (encode_example(prepared.tokenizer, m) for m in messages)


def _as_messages(problem: Problem, worked: bool) -> list[Message]:
    answer = Message("assistant", problem.answer, problem.worked if worked else None)
    return [Message("user", problem.prompt), answer]


def _dialogues(prepared: Prepared, names: list[str]) -> Iterable[list[Message]]:
    """Conversations that do not begin as a held-out document does."""
    kept_out = {d.text.partition("\n")[0] for d in prepared.held_out()}
    for name in names:
        for messages in conversations(name):
            if messages[0].content not in kept_out:
                yield messages


# -------------------------------------------------------------------------- RL


def _rl(prepared: Prepared, name: str, settings: RlSettings, model: Transformer) -> StagePlan:
    parallel = prepared.parallel
    source = Rollouts(
        settings, prepared.tokenizer, stage_seed(prepared, settings), parallel.rank, parallel.world_size
    )
    evaluate = _accuracy_evaluation(
        prepared, name, settings.tasks, settings.eval_problems, settings.steps, settings.max_tokens
    )

    def gated(model: Transformer, step: int) -> Evaluation:
        found = evaluate(model, step)
        if step == 0 and settings.require_thinking_gain and settings.mode == "free":
            _require_thinking_gain(name, found.metrics)
        return found

    return StagePlan(
        source,
        PolicyGradient(settings, _reference(settings, model, parallel.device)),
        gated,
        settings.steps,
        bias_update_speed=settings.bias_update_speed,
    )


def _reference(settings: RlSettings, model: Transformer, device: torch.device) -> Transformer | None:
    """A frozen copy of the policy the stage starts from, when a KL term asks for one."""
    if not settings.kl_weight:
        return None
    dtype = compute_dtype(settings.precision, device)
    return Twin(copy.deepcopy(model).to(device), dtype).compute.requires_grad_(False)


def _require_thinking_gain(name: str, metrics: dict[str, Any]) -> None:
    share = {mode: a["correct"] / max(a["total"], 1) for mode, a in metrics["accuracy"].items()}
    if share["think"] <= share["direct"]:
        raise TaelError(
            f"stages.{name}: thinking ({share['think']:.0%} right) is no better than answering directly "
            f"({share['direct']:.0%}), so RL would teach the model not to think; train the SFT stage longer, or set "
            f"stages.{name}.require_thinking_gain=false"
        )


def _accuracy_evaluation(
    prepared: Prepared, name: str, tasks: list[TaskSettings], count: int, steps: int, max_tokens: int
) -> Evaluate:
    """Held-out accuracy in every mode; the answers at the first and last step become samples."""
    asked = problems(tasks, TEST_SEED, count, "test") if tasks else []

    def evaluate(model: Transformer, step: int) -> Evaluation:
        label = {0: "before", steps: "after"}.get(step)
        accuracy, lines, works = {}, [], []
        for mode in MODES:
            result = reasoning_accuracy(model, prepared.tokenizer, asked, mode, max_tokens)
            accuracy[mode] = result.as_dict()
            works.append(result.work)
            lines += samples(result, mode, label or "", 6 if mode == "free" else 2)
        if label:
            _write_samples(prepared, name, label, lines)
        return Evaluation({"accuracy": accuracy}, sum_work(works))

    return evaluate


def _write_samples(prepared: Prepared, name: str, label: str, lines: list[dict[str, Any]]) -> None:
    """Replace the samples of `label` in the stage's samples.jsonl."""
    if not prepared.parallel.is_main:
        return
    path = prepared.directory / name / "samples.jsonl"
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in old if json.loads(line)["label"] != label]
    path.write_text("\n".join([*kept, *(json.dumps(line) for line in lines)]) + "\n", encoding="utf-8")
