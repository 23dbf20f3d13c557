"""A whole model quantised in place, a module at a time; and which layer gets which scheme.

    report = quantize_model(model, "int4")                              round to nearest
    report = quantize_model(model, "int4", calibration=rows)            GPTQ (tael.weights.gptq), for int4 layers

Not every layer takes the chosen scheme. Norms and router gates stay as they are. Under int4 the embedding and
kv_b_proj are int8 and the head w8a8: they are read a row at a time, or are multiplied out twice (absorbed), or decide
between tens of thousands of words, and are small. `mixed` changes that by layer type:

    quantize_model(model, "int4", mixed={"attention": "int8", "v_proj": "w8a8", "experts": "float"})
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from tael.errors import TaelError, did_you_mean
from tael.model.moe import Experts
from tael.model.transformer import Transformer
from tael.weights.gptq import Calibrated, Grid, gptq_layers
from tael.weights.quantized import (
    ACTIVATION_GROUP,
    SCHEMES,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    Scheme,
    round_activations,
)

__all__ = [
    "ACTIVATION_GROUP",
    "LAYER_TYPES",
    "SCHEMES",
    "QuantizationReport",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "Scheme",
    "Target",
    "is_quantized",
    "quantize_model",
    "round_activations",
    "targets",
]

Choice = Literal["int4", "int8", "w8a8", "float"]
Progress = Callable[[str], None]

LAYER_TYPES = (
    "embedding",
    "head",
    "attention",
    "kv_b_proj",
    "feed_forward",
    "experts",
    "shared_experts",
    "eh_proj",
)
"""What `mixed` may name. MTP blocks' layers count as their types; "eh_proj" is the projection before each of them."""

FINER = {"v_proj": ("attention",), "down_proj": ("feed_forward", "shared_experts")}
"""Single matrices of these types that `mixed` may name too; unnamed, they take what their type takes."""

CALIBRATED: dict[str, Choice] = {"v_proj": "w8a8", "down_proj": "w8a8"}
"""What int4 with calibration leaves in 8 bits unless `mixed` names the matrix or its type.

SmolLM2-135M, group 32 (bench/int4_quality.py): +0.89% bits per byte on the text the choice was made on, +1.62% on a
fresh one, at 6.24 bits a weight with the 8-bit embedding. With v_proj alone +1.87% and +2.46% at 5.45 (docs/log.md).
"""

_ASKED = "asked for"
_ALWAYS: dict[str, Choice] = {"embedding": "int8", "kv_b_proj": "int8"}
_INT4: dict[str, Choice] = {**_ALWAYS, "head": "w8a8"}


class Target(NamedTuple):
    """One module of a model and what becomes of it; `scheme` None: it stays float, for the reason given."""

    name: str
    type: str
    scheme: Scheme | None
    reason: str = ""


@dataclass(frozen=True)
class TypeBytes:
    """All layers of one type: how many weights, and their bytes before and after."""

    type: str
    scheme: str
    weights: int
    before: int
    after: int


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` did. `kept` names layers left in float because their width is no multiple of the group.

    `calibrated` counts the matrices rounded by GPTQ; `sparse` those of experts that saw too few tokens for it.
    """

    scheme: Scheme
    group: int
    types: tuple[TypeBytes, ...]
    kept: tuple[str, ...] = ()
    calibrated: int = 0
    sparse: int = 0

    @property
    def bytes_before(self) -> int:
        return sum(row.before for row in self.types)

    @property
    def bytes_after(self) -> int:
        return sum(row.after for row in self.types)

    @property
    def bits_per_weight(self) -> float:
        """Of everything, norms and routers included."""
        return 8 * self.bytes_after / max(1, sum(row.weights for row in self.types))


def quantize_model(
    model: Transformer,
    scheme: Scheme,
    group: int = 32,
    mixed: Mapping[str, str] | None = None,
    calibration: Tensor | None = None,
    asymmetric: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Replace the weights of `model` by quantised modules, in place; a float weight is freed once it is replaced.

    `calibration` [rows, length] int64: token ids (`tael.weights.gptq.calibration_rows`) on which int4 layers are
    rounded by GPTQ, v_proj and down_proj kept in 8 bits (`CALIBRATED`); None: to nearest, all int4.
    `asymmetric` gives int4 layers minimums, half a bit a weight more at
    group 32, for less error. `progress` is told a line a layer. Raises TaelError for an unknown scheme or layer type,
    a model quantised already, a weight that is not finite, and calibration without an int4 layer.
    """
    if calibration is not None and scheme == "int4":
        named = mixed or {}
        mixed = {leaf: c for leaf, c in CALIBRATED.items() if named.keys().isdisjoint(FINER[leaf])} | dict(named)
    plan = targets(model, scheme, group, mixed)
    tally = Tally(model, plan)
    model.requires_grad_(False)
    done, grid = Calibrated(), Grid(group, asymmetric)
    if calibration is not None:
        four = {t.name for t in plan if t.scheme == "int4"}
        if not four:
            raise TaelError("calibration is for int4; no layer of this model is to be int4, leave it out")
        for name in gptq_layers(model, four, grid, calibration, _quantizer(plan, grid), done):
            _tell(progress, f"quantised {name} by GPTQ")
    for target in plan:
        if target.scheme is not None and not _is_quantized_module(model.get_submodule(target.name)):
            _replace(model, target, grid)
            _tell(progress, f"quantised {target.name} to {target.scheme}")
    return tally.report(scheme, group, done)


def is_quantized(model: nn.Module) -> bool:
    """Whether any module of `model` holds codes."""
    return any(_is_quantized_module(module) for module in model.modules())


def _is_quantized_module(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear | QuantizedEmbedding | QuantizedExperts)


def targets(
    model: Transformer, scheme: Scheme, group: int = 32, mixed: Mapping[str, str] | None = None
) -> list[Target]:
    """Every linear layer, embedding and stack of experts of `model`, in order, and what it becomes."""
    if scheme not in SCHEMES:
        raise TaelError(f"no quantisation scheme '{scheme}'; choose one of {', '.join(SCHEMES)}")
    if is_quantized(model):
        raise TaelError("this model is quantised already; load the float model to quantise it otherwise")
    chosen = _choices(scheme, mixed or {})
    tied = model.config.tie_word_embeddings
    if tied and (chosen["embedding"] == "float") != (chosen["head"] == "float"):
        raise TaelError("embedding and head are one matrix in this model: give both a scheme in `mixed`, or neither")
    if tied and chosen["head"] == "int4":
        raise TaelError(
            "the head shares its matrix with the embedding in this model: it can be int8 or w8a8, not int4"
        )
    found = []
    for name, module in model.named_modules():
        widths = _input_widths(module)
        if not widths:
            continue
        type_ = _type_of(name)
        leaf = name.rpartition(".")[2]
        choice = chosen.get(leaf, chosen[type_]) if type_ in FINER.get(leaf, ()) else chosen[type_]
        if choice == "float":
            found.append(Target(name, type_, None, _ASKED))
        elif group < ACTIVATION_GROUP or group % ACTIVATION_GROUP:
            raise TaelError(f"quantisation group {group}: must be a multiple of {ACTIVATION_GROUP}; take 32 or 64")
        elif any(width % group for width in widths):
            found.append(Target(name, type_, None, f"{max(widths)} columns are no multiple of {group}"))
        else:
            found.append(Target(name, type_, choice))
    return found


def _choices(scheme: Scheme, mixed: Mapping[str, str]) -> dict[str, Choice]:
    chosen: dict[str, Choice] = dict.fromkeys(LAYER_TYPES, scheme)
    chosen |= _INT4 if scheme == "int4" else _ALWAYS
    known = (*LAYER_TYPES, *FINER)
    for type_, choice in mixed.items():
        if type_ not in known:
            raise TaelError(f"mixed quantisation: no layer type '{type_}'{did_you_mean(type_, known)}")
        if choice not in (*SCHEMES, "float"):
            raise TaelError(f"mixed quantisation: '{choice}' for {type_} is none of {', '.join(SCHEMES)}, float")
        chosen[type_] = choice  # type: ignore[assignment]
    if chosen["embedding"] not in ("int8", "w8a8", "float"):
        raise TaelError("the embedding can be int8 or float, not int4")
    return chosen


def _input_widths(module: nn.Module) -> tuple[int, ...]:
    """Columns of the module's matrices; empty for a module that is never quantised."""
    if isinstance(module, nn.Linear):
        return (module.in_features,)
    if isinstance(module, nn.Embedding):
        return (module.embedding_dim,)
    if isinstance(module, Experts):
        return module.gate_up_proj.shape[-1], module.down_proj.shape[-1]
    return ()


def _type_of(name: str) -> str:
    if name in ("embed_tokens", "lm_head"):
        return "embedding" if name == "embed_tokens" else "head"
    leaf = name.rpartition(".")[2]
    if leaf in ("kv_b_proj", "eh_proj", "experts"):
        return leaf
    if ".self_attn." in name:
        return "attention"
    return "shared_experts" if ".shared_experts." in name else "feed_forward"


def _quantizer(plan: list[Target], grid: Grid) -> Callable[[Transformer, str], None]:
    """A function that rounds everything planned below a name, unless that has been done."""

    def quantise(model: Transformer, prefix: str) -> None:
        for target in plan:
            below = target.name == prefix or target.name.startswith(f"{prefix}.")
            if below and target.scheme and not _is_quantized_module(model.get_submodule(target.name)):
                _replace(model, target, grid)

    return quantise


def _replace(model: Transformer, target: Target, grid: Grid) -> None:
    """Round to nearest the module that `target` names and put the result in its place."""
    assert target.scheme is not None
    old, scheme, group = model.get_submodule(target.name), target.scheme, grid.group
    asymmetric = grid.asymmetric and scheme == "int4"
    if isinstance(old, nn.Embedding):
        new: nn.Module = QuantizedEmbedding.from_float(old.weight, group)
    elif isinstance(old, nn.Linear):
        if (
            target.type == "head"
            and isinstance(model.embed_tokens, QuantizedEmbedding)
            and model.config.tie_word_embeddings
        ):
            new = model.embed_tokens.head(scheme)
        else:
            new = QuantizedLinear.from_float(old.weight, scheme, group, asymmetric, old.bias)
    else:
        assert isinstance(old, Experts)
        new = QuantizedExperts(
            QuantizedLinear.from_float(old.gate_up_proj, scheme, group, asymmetric),
            QuantizedLinear.from_float(old.down_proj, scheme, group, asymmetric),
        )
    model.set_submodule(target.name, new)


class Tally:
    """Weights and bytes by layer type before anything is replaced; the rest of the report afterwards."""

    def __init__(self, model: Transformer, plan: list[Target]) -> None:
        self.model, self.plan = model, plan
        self.type_of = {target.name: target.type for target in plan}
        self.before = self._bytes()
        self.weights: Counter[str] = Counter()
        for name, parameter in model.named_parameters():  # a shared one once
            self.weights[self._type(name)] += parameter.numel()

    def _type(self, name: str) -> str:
        while name:
            if name in self.type_of:
                return self.type_of[name]
            name = name.rpartition(".")[0]
        return "norms, routers"

    def _bytes(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):  # a shared one once
            found[self._type(name)] += tensor.numel() * tensor.element_size()
        return found

    def report(self, scheme: Scheme, group: int, done: Calibrated | None = None) -> QuantizationReport:
        done = done or Calibrated()
        after = self._bytes()
        schemes: dict[str, list[str]] = {}
        for target in self.plan:
            schemes.setdefault(target.type, []).append(target.scheme or "float")
        rows = tuple(
            TypeBytes(t, "+".join(sorted(set(schemes.get(t, ["float"])))), self.weights[t], before, after[t])
            for t, before in self.before.items()
        )
        kept = tuple(f"{t.name}: {t.reason}" for t in self.plan if t.scheme is None and t.reason != _ASKED)
        return QuantizationReport(scheme, group, rows, kept, done.matrices, done.sparse)


def _tell(progress: Progress | None, line: str) -> None:
    if progress is not None:
        progress(line)
