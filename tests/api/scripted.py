"""A model whose answers are written down: the whole engine but for its arithmetic.

The runner keeps tokens where a real one keeps keys and values, in the blocks of the cache, and reads a sequence back
from them; so answers come out right only if blocks, prefixes, batches and preemption are handled right.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tael.data import Tokenizer, train_tokenizer
from tael.engine import Engine, EngineSettings
from tael.engine.batch import StepBatch
from tael.loading import Loaded
from tael.model import ModelConfig, Transformer
from tael.serve.settings import ModelSpec

Script = Callable[[str], str]
"""From the prompt's text, special tokens spelled out, to the answer's, which may spell special tokens too."""

TEXTS = [
    "The capital of France is Paris. What is 12 + 30? It is 42, I think; let me think about it again.\n",
    '{"name": "calculator", "arguments": {"expression": "6 * 7"}, "value": [1, 2.5, true, null]}\n',
    "def add(first, second):\n    return first + second\n",
    "Ein Wort, ein Ding. 漢字とかな 🙂\n",
]


def make_tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 4, 460)


def config(vocab_size: int, context: int) -> ModelConfig:
    """The smallest model the engine takes."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        kv_lora_rank=8,
        intermediate_size=8,
        n_routed_experts=0,
        max_position_embeddings=context,
    )


class ScriptedRunner:
    """See tael.engine.runner.Runner. `gate`: passes wait for it; cleared, the engine stands still, and says so in
    `standing` once the next pass has come."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, script: Script) -> None:
        inner = engine.pool.runner
        self.config, self.num_blocks, self.block_size = inner.config, inner.num_blocks, inner.block_size
        self.cache_bytes, self.model_bytes = 8 * self.num_blocks * self.block_size, 0
        self.gate = threading.Event()
        self.gate.set()
        self.passes, self.failing, self.standing = 0, False, False
        self._tokenizer, self._script = tokenizer, script
        self._tokens = torch.zeros(self.num_blocks, self.block_size, dtype=torch.int64)
        self._prompt = torch.zeros(self.num_blocks, self.block_size, dtype=torch.bool)
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def forward(self, batch: StepBatch) -> Tensor:
        self.standing = not self.gate.is_set()
        self.gate.wait()
        self.standing = False
        self.passes += 1
        if self.failing:
            raise RuntimeError("scripted failure")
        hidden = torch.zeros(len(batch.tokens), 8)
        starts = batch.starts.tolist()
        for m, (start, stop) in enumerate(itertools.pairwise(starts)):
            table = batch.tables[m]
            places = batch.positions[start:stop]
            blocks, slots = table[places // self.block_size], places % self.block_size
            self._tokens[blocks, slots] = batch.tokens[start:stop]
            self._prompt[blocks, slots] = batch.expanded[m]
            hidden[stop - 1, 0] = self._next(table, int(places[-1]))
        return hidden

    def _next(self, table: Tensor, last: int) -> int:
        places = torch.arange(last + 1)
        blocks, slots = table[places // self.block_size], places % self.block_size
        tokens = self._tokens[blocks, slots].tolist()
        length = int(self._prompt[blocks, slots].nonzero().max()) + 1  # the last token of a prompt is always read
        prompt = tuple(tokens[:length])
        if prompt not in self._answers:
            text = self._script(self._tokenizer.decode(prompt, skip_special=False))
            self._answers[prompt] = self._tokenizer.encode_with_special(text)
        answer, place = self._answers[prompt], len(tokens) - length
        if place == 0:
            self._answers[prompt] = self._answers.pop(prompt)
        end = self._tokenizer.eos_id
        assert end is not None
        return answer[place] if place < len(answer) else end

    @property
    def prompts(self) -> list[list[int]]:
        """What was answered, in the order it last came."""
        return [list(prompt) for prompt in self._answers]

    def logits(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        logits[torch.arange(len(hidden)), hidden[:, 0].long()] = 30.0
        return logits

    def draft(self, depth: int, batch: StepBatch, hidden: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class ScriptedModel(Loaded):
    """A loaded model that answers by `script`."""

    script: Script = lambda prompt: "Hello."
    runners: list[ScriptedRunner] = field(default_factory=list)

    def engine(self, context: int | None = None, sequences: int = 1, **overrides: Any) -> Engine:
        engine = super().engine(context, sequences, **overrides)
        runner = ScriptedRunner(engine, self.tokenizer, self.script)
        self.runners.append(runner)
        engine._pool = replace(engine.pool, runner=runner)
        return engine


def scripted_model(script: Script, tokenizer: Tokenizer | None = None, context: int = 2048) -> ScriptedModel:
    tokenizer = tokenizer or make_tokenizer()
    model = Transformer(config(tokenizer.vocab_size, context))
    settings = EngineSettings(backend="torch", block_size=8)
    return ScriptedModel("scripted", model, tokenizer, Path("scripted"), settings, script)


def loader(models: dict[str, ScriptedModel]) -> Callable[[ModelSpec, Callable[[str], None]], Loaded]:
    """What ModelHost loads with: `spec.model` names one of `models`."""
    return lambda spec, notify: models[spec.model]
