"""The recipes of others, on transformers' own models: what bench/cost_to_quality.py compares Tael's with.

OpenAI's: GPT-2's model (learned positions, LayerNorm, GELU, tied embeddings), GPT-3's training (Brown et al. 2020,
section 2.3, appendix B): AdamW with betas 0.9 and 0.95, weight decay 0.1, clipping at 1.0, warmup, cosine to a tenth.
Meta's: Llama's model and training (Touvron et al. 2023, sections 2.2 and 2.3): RMSNorm, SwiGLU, RoPE; the same
optimiser.
Both without dropout, since no text is seen twice, and without document masks, as their papers have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from tael.data import Document, Loader
from tael.evals.perplexity import bits_per_byte
from tael.files import digest
from tael.model.transformer import Features
from tael.preparation import Prepared
from tael.recipe import ScheduleSettings
from tael.train.schedule import learning_rate_factor

COSINE = ScheduleSettings(warmup=0.02, decay=0.98, final=0.1, shape="cosine")


@dataclass(frozen=True)
class Baseline:
    """One of the two recipes at one size."""

    name: str
    kind: Literal["gpt2", "llama"]
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    attention: str = "eager"
    """transformers' attention; eager is the faster one at this length in fp32 on a Zen 3
    (bench/train_throughput.py) and in bf16 on a Zen 4 (docs/log.md)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: by torch.autocast, as transformers' own Trainer does it; weights and optimiser stay fp32."""

    @property
    def setup(self) -> str:
        table = {key: value for key, value in asdict(self).items() if key != "name"}
        return digest(table)[:16]

    def build(self, vocabulary: int) -> Any:
        """The model with transformers' own initialisation, drawn from torch's global generator."""
        if self.kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=vocabulary, n_positions=self.sequence_length, n_embd=self.hidden_size, n_layer=self.layers,
                n_head=self.heads, n_inner=self.intermediate_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                use_cache=False, bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            config._attn_implementation = self.attention
            return transformers.GPT2LMHeadModel(config)
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            max_position_embeddings=self.sequence_length, use_cache=False,
        )  # fmt: skip
        config._attn_implementation = self.attention
        return transformers.LlamaForCausalLM(config)

    def flops_per_token(self, model: Any) -> float:
        """Forward and backward, counted as ModelConfig.flops_per_token: matrices, and attention at half length."""
        matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not _is_table(n))
        head = model.get_output_embeddings().weight.numel()
        attention = self.layers * 4 * self.hidden_size * self.sequence_length / 2
        return 3 * (2 * (matrices + head) + attention)


def _is_table(name: str) -> bool:
    """Input embeddings, positions, and the head: counted apart, as it may share the embedding's weight."""
    return any(part in name for part in ("embed_tokens", "wte", "wpe", "lm_head"))


class _Readable:
    """What `bits_per_byte` reads of a model, for one of transformers'."""

    def __init__(self, model: Any) -> None:
        self.body, self.head = model.base_model, model.get_output_embeddings()
        self.norm = model.base_model.ln_f if hasattr(model.base_model, "ln_f") else model.base_model.norm

    @property
    def config(self) -> _Readable:
        """Stands in for a ModelConfig, of which the evaluation asks what it cost."""
        return self

    def flops_per_token(self, context: float, training: bool = False) -> float:
        return 0.0

    def features(self, tokens: Tensor) -> Features:
        return Features(self.body(input_ids=tokens).last_hidden_state, [])

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class TransformersContestant:
    """A Baseline being trained; see tael.compare.race.Contestant."""

    def __init__(self, baseline: Baseline, seed: int, prepared: Prepared, held_out: Sequence[Document]) -> None:
        torch.manual_seed(seed)
        self.baseline, self.model = baseline, baseline.build(prepared.tokenizer.vocab_size)
        self.model.train()
        self.loader = Loader(prepared.rows(baseline.sequence_length), baseline.batch_size, seed)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        plain = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=baseline.learning_rate, betas=(0.9, 0.95), fused=True)
        self.prepared, self.held_out, self.done = prepared, held_out, 0
        self.name, self.seed, self.setup, self.steps = baseline.name, seed, baseline.setup, baseline.steps
        self.parameters_total = self.parameters_active = sum(p.numel() for p in self.model.parameters())
        self.cache_bytes_per_token = baseline.layers * 2 * baseline.hidden_size * 2
        self.flops_per_token = baseline.flops_per_token(self.model)
        self.tokens_per_step = baseline.batch_size * baseline.sequence_length

    def step(self) -> None:
        batch = self.loader.batch(self.done)
        factor = learning_rate_factor(self.done, self.steps, COSINE)
        for group in self.optimizer.param_groups:
            group["lr"] = self.baseline.learning_rate * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=self.baseline.precision == "bf16"):
            logits = self.model(input_ids=batch.tokens).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    def bits_per_byte(self) -> float:
        self.model.eval()
        readable: Any = _Readable(self.model)
        result = bits_per_byte(readable, self.prepared.tokenizer, self.held_out, self.baseline.sequence_length)
        self.model.train()
        return result.bits_per_byte
