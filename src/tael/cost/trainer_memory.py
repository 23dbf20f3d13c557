"""Bytes a process of Tael's own trainer holds on one device, and when it is fullest.

Counted from what is there: weights, optimiser states, gradients, every tensor that autograd keeps for the backward
pass, and what backward, the optimiser and a checkpoint need on top. Nothing is fitted. Tests hold `kept_for_backward`
to torch's own count and the whole to the measured growth of a process. Left out: the program itself, answers
sampled for evaluation and RL, what emulated FP8 rounds, and freed memory that the allocator keeps.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tael.model.config import ModelConfig
from tael.model.transformer import Transformer
from tael.recipe import OptimizerSettings, PretrainSettings, RlSettings, TrainSettings
from tael.train.losses import CPU_CHUNK
from tael.train.optim import is_matrix
from tael.train.precision import compute_dtype

FULL = 4
"""Bytes of an fp32 value: masters, their gradients and states, norms' inputs, routers, losses."""
INDEX = 8
FUSED_FROM = 1024
"""Beyond so many tokens `tael.model.attention.attend` takes torch's fused kernel on a CPU."""
FILE_COPIES = 2
"""Copies of a checkpoint's file in memory while safetensors writes it: its own buffer, and Python's bytes."""
EVALUATION_ROWS = 32
"""What `tael.evals.perplexity.bits_per_byte` reads at once."""


@dataclass(frozen=True)
class TrainingStep:
    """What a step computes, as far as its memory goes."""

    config: ModelConfig
    rows: int
    """Rows of one forward pass (a micro-batch)."""
    length: int
    value_bytes: int = FULL
    """4, or 2 where a bf16 twin computes."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    micro_batches: int = 1
    mtp: bool = True
    """Whether the MTP modules, if there are any, are trained."""
    documents: bool = True
    """Attention stays inside documents: it needs a mask."""
    whole_logits: int = 0
    """Tokens whose logits are kept whole (policy losses); 0: the chunked loss of language modelling."""
    evaluation_rows: int = 0
    """Rows of held-out text judged at once, their logits whole."""

    @classmethod
    def of(cls, config: ModelConfig, settings: TrainSettings) -> TrainingStep:
        """A step of a language-modelling stage on this machine's CPU."""
        micro = settings.micro_batch_size or settings.batch_size
        return cls(
            config,
            rows=micro,
            length=settings.sequence_length,
            value_bytes=compute_dtype(settings.precision, torch.device("cpu")).itemsize,
            optimizer=settings.optimizer,
            micro_batches=settings.batch_size // micro,
            mtp=settings.mtp_weight > 0,
            documents=settings.mask_documents,
            evaluation_rows=EVALUATION_ROWS if isinstance(settings, PretrainSettings) else 0,
        )

    @classmethod
    def of_policy(cls, config: ModelConfig, settings: RlSettings, length: int, answered: int) -> TrainingStep:
        """A policy-gradient step: all rollouts at once, padded to `length`; `answered` tokens were sampled."""
        return cls(
            config,
            rows=settings.problems * settings.group,
            length=length,
            value_bytes=compute_dtype(settings.precision, torch.device("cpu")).itemsize,
            optimizer=settings.optimizer,
            mtp=False,
            documents=False,
            whole_logits=answered,
        )

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes over the program's own size. The last four are what each phase needs on top of weights and states."""

    weights: float
    """fp32 masters, and the bf16 twin where there is one."""
    states: float
    backward: float
    """Kept activations, gradients so far and backward's temporaries, at the worst moment."""
    update: float
    """Gradients and the optimiser's temporaries."""
    checkpoint: float
    evaluation: float
    """Logits of held-out text and their log-probabilities, or a layer's scores."""

    @property
    def step(self) -> float:
        """Peak of a training step."""
        return self.weights + self.states + max(self.backward, self.update)

    @property
    def saving(self) -> float:
        """Peak while a checkpoint is written."""
        return self.weights + self.states + self.checkpoint

    @property
    def judging(self) -> float:
        """Peak while held-out text is judged."""
        return self.weights + self.states + self.evaluation

    @property
    def peak(self) -> float:
        return max(self.step, self.saving, self.judging)


def trainer_memory(step: TrainingStep) -> TrainerMemory:
    """What training by `step` takes, by phase."""
    everything = _parameters(step.config)
    learned = {name: p for name, p in everything.items() if step.mtp or not name.startswith("mtp.")}
    masters = FULL * sum(p.numel() for p in everything.values())
    twin = sum(_twin_bytes(name) * p.numel() for name, p in everything.items()) if step.value_bytes < FULL else 0
    # Made for every parameter when a stage begins, also for those that are not trained.
    states = sum(_state_bytes(step, name, p) * p.numel() for name, p in everything.items())
    return TrainerMemory(
        weights=masters + twin,
        states=states,
        backward=max(_forward_end(step, learned), _backward(step, learned), _collecting(step, learned)),
        update=FULL * sum(p.numel() for p in learned.values()) + _update_temporaries(step, learned),
        checkpoint=FILE_COPIES * (masters + states),
        evaluation=_evaluation(step),
    )


def kept_for_backward(step: TrainingStep) -> float:
    """Bytes autograd keeps of the whole forward pass, heads included, beside the parameters."""
    return sum(part.kept for part in _parts(step, {}))


# ------------------------------------------------------------------------------ weights, states, the optimiser


def _parameters(config: ModelConfig) -> dict[str, Tensor]:
    """Every parameter by name, without its bytes; tied tables once."""
    with torch.device("meta"):
        return dict(Transformer(config).named_parameters())


def _twin_bytes(name: str) -> int:
    return FULL if name.endswith("mlp.gate.weight") else 2


def _by_muon(step: TrainingStep, name: str, parameter: Tensor) -> bool:
    return step.optimizer.matrices == "muon" and is_matrix(name, parameter)


def _state_bytes(step: TrainingStep, name: str, parameter: Tensor) -> int:
    """Muon keeps a momentum, AdamW two moments."""
    return FULL if _by_muon(step, name, parameter) else 2 * FULL


def _update_temporaries(step: TrainingStep, learned: dict[str, Tensor]) -> float:
    """The larger of Muon's and AdamW's; their updates come one after the other, with all gradients there."""
    groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    others = [0]
    for name, parameter in learned.items():
        if _by_muon(step, name, parameter):
            groups[2 if name.endswith("gate_up_proj") else 1, *parameter.shape[-2:]].append(parameter)
        else:
            others.append(parameter.numel())
    muon = [_newton_schulz(stacked, parameters) for (stacked, *_), parameters in groups.items()]
    # AdamW goes parameter by parameter: the root of the second moment, and that over its correction.
    return max(*muon, 0.0, 2.0 * FULL * max(others))


def _newton_schulz(stacked: int, parameters: list[Tensor]) -> float:
    """Matrices of one shape together: directions, their concatenation, X, the next X, X X^T and its polynomial."""
    rows, columns = parameters[0].shape[-2] // stacked, parameters[0].shape[-1]
    values = sum(p.numel() for p in parameters)
    squares = values // (rows * columns) * min(rows, columns) ** 2
    width = compute_dtype("auto", torch.device("cpu")).itemsize
    return 2 * FULL * values + max(width * (2.0 * values + 2 * squares), (width + FULL) * values)


# ------------------------------------------------------------------------------ forward and backward


@dataclass(frozen=True)
class _Part:
    """A piece of the forward pass: what it keeps, its parameters' gradients, and backward's temporaries in it."""

    kept: float
    gradients: float
    passing: float


def _forward_end(step: TrainingStep, learned: dict[str, Tensor]) -> float:
    """The last head's chunk of logits, while everything is kept."""
    c = step.config
    hidden = step.tokens * step.value_bytes * c.hidden_size
    if step.whole_logits:
        head = 2.0 * FULL * step.whole_logits * c.vocab_size
    else:
        logits = FULL * min(CPU_CHUNK, step.tokens) * c.vocab_size
        rounded = logits / 2 if step.value_bytes < FULL else 0.0
        # The chunk before is held until this one has its log-probabilities.
        before = logits + rounded if step.tokens > CPU_CHUNK else 0.0
        # log_softmax beside its input; or the logits' gradient beside the weight's, of one chunk.
        head = max(before + 2.0 * logits, logits + rounded + step.value_bytes * c.vocab_size * c.hidden_size)
    return kept_for_backward(step) + hidden + head + _held_gradients(step, learned)


def _backward(step: TrainingStep, learned: dict[str, Tensor]) -> float:
    """Walk back through the parts: each frees what it kept and leaves gradients; the fullest moment."""
    parts = _parts(step, learned)
    remaining, grown, worst = sum(part.kept for part in parts), 0.0, 0.0
    held = _held_gradients(step, learned)
    # Gradients pile up, unless those of an earlier micro-batch are there to be added to.
    piles = step.value_bytes < FULL or not held
    for part in reversed(parts):
        worst = max(worst, held + remaining + grown + part.gradients + part.passing)
        remaining -= part.kept
        grown += part.gradients if piles else 0.0
    return worst


def _evaluation(step: TrainingStep) -> float:
    """Nothing is kept: the widest moments are the head and a layer's scores beside their softmax."""
    c, width = step.config, step.value_bytes
    head = 2.0 * FULL * c.vocab_size + width * c.hidden_size
    heads, keys, values = c.num_attention_heads, c.qk_head_dim, _value_dim(c)
    # The input and its norm, queries before and after rotation, keys, values as projected and as multiplied.
    attention = width * (2.0 * c.hidden_size + heads * (3 * keys + 2 * values))
    attention += 0.0 if _fuses(step) else 2.0 * _scores_width(step) * heads * step.length
    return step.evaluation_rows * step.length * max(head, attention)


def _held_gradients(step: TrainingStep, learned: dict[str, Tensor]) -> float:
    """The masters' gradients from earlier micro-batches."""
    return FULL * sum(p.numel() for p in learned.values()) if step.micro_batches > 1 else 0.0


def _collecting(step: TrainingStep, learned: dict[str, Tensor]) -> float:
    """The twin's gradients on their way to the masters, one parameter at a time."""
    if step.value_bytes == FULL:
        return 0.0
    values, largest = sum(p.numel() for p in learned.values()), max(p.numel() for p in learned.values())
    held = _held_gradients(step, learned)
    return held + step.value_bytes * values + FULL * largest if held else FULL * values + 2.0 * largest


def _parts(step: TrainingStep, learned: dict[str, Tensor]) -> list[_Part]:
    """All parts in the order of the forward pass: trunk, head, MTP modules, their heads."""
    depths = step.config.num_nextn_predict_layers if step.mtp else 0
    modules = [part for depth in range(depths) for part in _mtp(step, learned, depth)]
    # Backward meets the last head first: there the gradient of the shared weight is made, later ones are added.
    heads = [_head(step, first=index == depths) for index in range(depths + 1)]
    return [*_trunk(step, learned), heads[0], *modules, *heads[1:]]


def _trunk(step: TrainingStep, learned: dict[str, Tensor]) -> list[_Part]:
    """Embedding, blocks, the last norm."""
    c, width = step.config, step.value_bytes
    rotary = c.qk_rope_head_dim if c.is_mla else c.gqa_head_dim
    table = _gradients(step, learned, "embed_tokens.")
    # Backward comes here last: the head or an MTP module may have made this gradient before, to be added to.
    shared = c.tie_word_embeddings or (step.mtp and c.num_nextn_predict_layers > 0)
    embedding = _Part(
        kept=INDEX * step.tokens + FULL * rotary * step.length,  # token ids; cosines and sines
        gradients=0.0 if shared else table,
        passing=table if shared else 0.0,
    )
    blocks = [part for i in range(c.num_hidden_layers) for part in _block(step, learned, f"layers.{i}.", i)]
    norm = _Part(
        step.tokens * _norm(c.hidden_size, width),
        _gradients(step, learned, "norm."),
        3.0 * step.tokens * width * c.hidden_size,
    )
    return [embedding, *blocks, norm]


def _gradients(step: TrainingStep, learned: dict[str, Tensor], *prefixes: str) -> float:
    return step.value_bytes * sum(p.numel() for name, p in learned.items() if name.startswith(prefixes))


def _block(step: TrainingStep, learned: dict[str, Tensor], prefix: str, index: int) -> list[_Part]:
    """Attention with its norm, and the feed-forward with its own. Both norms' outputs are kept as inputs."""
    c, width, tokens = step.config, step.value_bytes, step.tokens
    normed = _norm(c.hidden_size, width) + width * c.hidden_size
    residual = 2.0 * width * c.hidden_size
    moe = c.is_moe_layer(index)
    kept, passing = _moe(c, width) if moe else _dense(c.intermediate_size, width)
    return [
        _Part(
            tokens * (normed + _attention_kept(step)),
            _gradients(step, learned, f"{prefix}self_attn.", f"{prefix}input_layernorm."),
            tokens * (residual + _attention_passing(step)),
        ),
        _Part(
            tokens * (normed + kept),
            _gradients(step, learned, f"{prefix}mlp.", f"{prefix}post_attention_layernorm."),
            tokens * (residual + passing),
        ),
    ]


def _norm(size: int, width: int) -> float:
    """Bytes a token: the input and one scale in fp32, and what the gain multiplies in the compute type."""
    return float((FULL + width) * size + FULL)


def _value_dim(config: ModelConfig) -> int:
    return config.v_head_dim if config.is_mla else config.gqa_head_dim


def _fuses(step: TrainingStep) -> bool:
    """torch's fused kernel wants values as wide as keys; without it the scores are kept at any length."""
    return step.length > FUSED_FROM and step.config.qk_head_dim == _value_dim(step.config)


def _scores_width(step: TrainingStep) -> int:
    """Beyond FUSED_FROM, where torch's kernel does not fuse, it takes queries, keys, values and scores to fp32."""
    return FULL if step.length > FUSED_FROM and not _fuses(step) else step.value_bytes


def _attention_kept(step: TrainingStep) -> float:
    """Bytes a token: queries, keys and values (spread to all heads), the output, scores, and MLA's latents."""
    c, width, heads = step.config, step.value_bytes, step.config.num_attention_heads
    inner = _scores_width(step)
    kept = heads * (inner * (2.0 * c.qk_head_dim + _value_dim(c)) + width * _value_dim(c))
    if _fuses(step):
        kept += FULL * heads + (width * step.length if step.documents else 0)  # log-sum-exp; the mask as numbers
    else:
        kept += inner * heads * step.length
    if c.has_qk_norm:
        normed = heads + c.kv_heads
        kept += (FULL + width) * normed * c.gqa_head_dim + FULL * normed
    if c.is_mla:
        entry = c.kv_lora_rank + c.qk_rope_head_dim
        kept += _norm(c.kv_lora_rank, width) + width * entry
        # In fp32 the norm's input is a view of the projection's output, the rotary key included.
        kept += FULL * c.qk_rope_head_dim if width == FULL else 0
        if c.q_lora_rank is not None:
            kept += _norm(c.q_lora_rank, width) + width * c.q_lora_rank
    return kept


def _attention_passing(step: TrainingStep) -> float:
    """The gradients of softmax's output and input together; of queries, keys, values and output where it is fused."""
    c, heads = step.config, step.config.num_attention_heads
    if _fuses(step):
        return 2.0 * step.value_bytes * heads * (c.qk_head_dim + _value_dim(c))
    return 2.0 * _scores_width(step) * heads * step.length


def _dense(size: int, width: int) -> tuple[float, float]:
    """(kept, passing) a token of SwiGLU: gate, silu, up, product; backward: three gradients for one kept less."""
    return 4.0 * width * size, 2.0 * width * size


def _moe(config: ModelConfig, width: int) -> tuple[float, float]:
    """(kept, passing) a token of routed and shared experts."""
    d, size, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    router = FULL * (config.n_routed_experts or 0) + INDEX * chosen  # scores, choice
    router += FULL * (chosen + 1) if config.normalises_gates else 0
    router += FULL * d if width < FULL else 0  # the router's input, widened
    # Order of the pairs and its inverse; copies to experts; gate and up, silu, product, weighed product; gates.
    pairs = chosen * (2 * INDEX + width * (d + 5 * size + 1))
    shared = _dense(size * (config.n_shared_experts or 0), width)
    passing = width * chosen * max(d + size, 2 * size)
    return router + pairs + shared[0], max(passing, shared[1])


def _mtp(step: TrainingStep, learned: dict[str, Tensor], depth: int) -> list[_Part]:
    """Two norms joined by a projection, a block, a norm."""
    c, width, prefix = step.config, step.value_bytes, f"mtp.{depth}."
    table = _gradients(step, learned, "embed_tokens.")
    first = depth == c.num_nextn_predict_layers - 1 and not c.tie_word_embeddings
    join = _Part(
        step.tokens * (INDEX + 2 * _norm(c.hidden_size, width) + 2 * width * c.hidden_size),
        _gradients(step, learned, f"{prefix}enorm.", f"{prefix}hnorm.", f"{prefix}eh_proj.")
        + (table if first else 0),
        step.tokens * 4.0 * width * c.hidden_size + (0 if first else table),
    )
    norm = _Part(step.tokens * _norm(c.hidden_size, width), 0.0, 3.0 * step.tokens * width * c.hidden_size)
    return [join, *_block(step, learned, f"{prefix}block.", c.num_hidden_layers + depth), norm]


def _head(step: TrainingStep, *, first: bool) -> _Part:
    """The head's loss keeps gradients, not logits: of the hidden states, and of its weight in fp32."""
    c, width = step.config, step.value_bytes
    table = c.vocab_size * c.hidden_size
    if step.whole_logits:
        kept = step.whole_logits * (FULL * c.vocab_size + width * c.hidden_size)
        return _Part(kept, width * table, 2.0 * FULL * step.whole_logits * c.vocab_size)
    hidden = step.tokens * width * c.hidden_size
    scaled = FULL * table if width < FULL else 0  # in fp32 the scaled gradient is the gradient itself
    return _Part(
        hidden + FULL * table, width * table if first else 0.0, hidden + scaled + (0 if first else width * table)
    )
