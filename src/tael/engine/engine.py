"""The engine: prompts in, tokens out, through the latent cache.

    engine = Engine(model, tokenizer)
    completions = engine.generate([prompt_ids, ...], SamplingParams(max_tokens=64))
    for event in engine.stream("text or ids", max_tokens=64): print(event.text, end="")

RL rollouts, `tael chat`, `tael complete` and evaluation all sample here. A prompt is read in MHA form, then every
step decodes one token a sequence in the absorbed form; finished sequences leave the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from tael.data import Tokenizer
from tael.engine.cache import LatentCache
from tael.engine.sampling import SamplingParams, sample, uniforms
from tael.errors import TaelError, did_you_mean
from tael.model.transformer import Transformer

FinishReason = Literal["stop", "length"]


@dataclass
class Completion:
    """What followed one prompt: `tokens` end with the stop token when `finish_reason` is "stop"."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


@dataclass(frozen=True)
class TokenEvent:
    """One streamed token and the text it completes (empty while a character is unfinished)."""

    token: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None


class Engine:
    """Samples from `model` (used as it is, on its device and in its precision)."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete every prompt (token ids). One `params` for all means seeds seed, seed + 1, .. by place.

        Raises TaelError for an empty prompt, an unknown token, or one that does not fit the model's context.
        """
        if isinstance(params, SamplingParams):
            params = [replace(params, seed=params.seed + i) for i in range(len(prompts))]
        if not prompts:
            return []
        run = _Run(self, prompts, list(params))
        while run.active:
            run.step()
        return run.completions

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options
    ) -> Iterator[TokenEvent]:
        """Complete one prompt, yielding tokens as they come; `options` are SamplingParams fields, put over `params`.

        Raises TaelError, at the first token asked for, as `generate` does and for an unknown option.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TaelError("this engine has no tokenizer: give the prompt as token ids")
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            prompt = bos + self.tokenizer.encode(prompt)
        for name in options:
            if name not in SamplingParams.__dataclass_fields__:
                raise TaelError(
                    f"unknown sampling option '{name}'{did_you_mean(name, SamplingParams.__dataclass_fields__)}"
                )
        params = replace(params or SamplingParams(), **options)
        run = _Run(self, [prompt], [params])
        completion, shown = run.completions[0], ""
        while run.active:
            run.step()
            text = self.tokenizer.decode(completion.tokens) if self.tokenizer else ""
            finished = completion.finish_reason if not run.active else None
            if text.endswith("\ufffd") and finished is None:
                text = shown  # a character is still unfinished
            yield TokenEvent(completion.tokens[-1], text[len(shown) :], completion.logprobs[-1], finished)
            shown = text

    def check_prompt(self, prompt: Sequence[int], max_tokens: int) -> None:
        """Raise TaelError naming what is wrong with a prompt."""
        config = self.model.config
        if not len(prompt):
            raise TaelError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise TaelError(f"the prompt has a token outside 0..{config.vocab_size - 1}")
        if len(prompt) + max_tokens > config.max_position_embeddings:
            raise TaelError(
                f"prompt of {len(prompt)} tokens and max_tokens {max_tokens} do not fit the model's context of "
                f"{config.max_position_embeddings}; shorten the prompt or lower max_tokens"
            )


class _Run:
    """A batch on its way: `active` are the indices of unfinished requests, in the order of the cache's rows."""

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], params: list[SamplingParams]) -> None:
        for prompt, p in zip(prompts, params, strict=True):
            engine.check_prompt(prompt, p.max_tokens)
        self.model, device = engine.model, engine.device
        self.params, self.completions = params, [Completion() for _ in prompts]
        self.active = list(range(len(prompts)))
        steps = max(p.max_tokens for p in params)
        self._uniform = uniforms(params, steps).to(device)
        self._temperature = torch.tensor([p.temperature for p in params], device=device)
        self._top_p = torch.tensor([p.top_p for p in params], device=device)
        self._lengths = torch.tensor([len(p) for p in prompts], device=device)
        longest = int(self._lengths.max())
        dtype = self.model.embed_tokens.weight.dtype
        self._cache = LatentCache(self.model.config, len(prompts), longest + steps, dtype, device)
        self._pending = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self._pending[row, : len(prompt)] = torch.tensor(list(prompt))
        self._rows = torch.arange(len(prompts), device=device)  # request index of every cache row
        self._drawn = 0

    @torch.no_grad()
    def step(self) -> None:
        """One forward pass (the first reads the prompts), one token a sequence."""
        token, logprob = self._sample(self._forward())
        self._lengths = self._lengths + 1
        self._drawn += 1
        self._pending = token.unsqueeze(-1)
        going = []
        for row, (index, t, lp) in enumerate(zip(self._rows.tolist(), token.tolist(), logprob.tolist(), strict=True)):
            completion, params = self.completions[index], self.params[index]
            if len(completion.tokens) >= params.max_tokens or completion.finish_reason == "stop":
                continue  # finished before, its row not yet dropped
            completion.tokens.append(t)
            completion.logprobs.append(lp)
            if t in params.stop_ids:
                completion.finish_reason = "stop"
            elif len(completion.tokens) < params.max_tokens:
                going.append(row)
        self.active = [int(self._rows[row]) for row in going]
        if going and len(going) <= 0.75 * len(self._rows):
            self._drop_all_but(torch.tensor(going, device=token.device))

    def _forward(self) -> Tensor:
        """Logits [B, V] of the last token of every sequence."""
        first = self._drawn == 0
        width = self._pending.shape[1]
        if first:
            positions = torch.arange(width, device=self._rows.device).expand(len(self._rows), -1)
            last = self._lengths - 1
        else:
            positions = (self._lengths - 1).unsqueeze(-1)
            last = torch.zeros_like(self._lengths)
        views = self._cache.begin(positions)
        hidden = self.model.features(self._pending, None, views, positions).hidden  # [B, T, D]
        return self.model.logits(hidden[torch.arange(len(hidden), device=hidden.device), last])

    def _sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows
        return sample(logits, self._temperature[rows], self._top_p[rows], self._uniform[rows, self._drawn])

    def _drop_all_but(self, rows: Tensor) -> None:
        self._cache.keep(rows)
        self._rows, self._lengths, self._pending = self._rows[rows], self._lengths[rows], self._pending[rows]
