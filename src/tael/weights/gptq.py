"""GPTQ: round int4 weights column by column, each column's error made up for by the columns still to come.

    rows = calibration_rows(tokenizer, documents, rows=32, length=512)
    quantize_model(model, "int4", calibration=rows)

For a layer y = W x the squared error of y over calibration inputs X is tr((W - Q) H (W - Q)^T) with H = X X^T.
Rounding column i by an error e, the best change of the columns after it is -e U[i, i+1:] / U[i, i], with U the upper
Cholesky factor of H^-1 (Frantar et al. 2022, equation 3 and algorithm 1). Blocks are done one after another on the
hidden states that the blocks before, already quantised, really produce; an expert is calibrated on the tokens routed
to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tael.data import Document, Tokenizer
from tael.errors import TaelError
from tael.model.moe import Experts
from tael.model.mtp import MTPModule
from tael.model.rope import make_rope
from tael.model.transformer import Block, Transformer
from tael.weights.quantized import QuantizedExperts, QuantizedLinear
from tael.weights.rounding import int4_codes, int4_ranges, int4_scales, pack_int4

LAZY_BLOCK = 32
"""Columns whose corrections are collected before the rest of the matrix is touched (algorithm 1's B; there 128). So
few that torch does not spread a column's work over threads, which on a busy machine costs many times the work."""

DAMPING = 0.01
"""Share of H's mean diagonal added to its diagonal."""

ENOUGH = 1 / 4
"""Tokens an expert must have seen, as a share of its input width; below that it is rounded to nearest."""

_BATCH_TOKENS = 2048


@dataclass
class Calibrated:
    """Counts for the report: matrices rounded by GPTQ, and matrices of experts that saw too few tokens."""

    matrices: int = 0
    sparse: int = 0


def calibration_rows(tokenizer: Tokenizer, documents: Iterable[Document], rows: int, length: int) -> Tensor:
    """[rows, length] int64: each row is BOS and the next `length - 1` tokens of the documents, laid end to end.

    Raises TaelError when the documents hold too little text.
    """
    if rows < 1 or length < 2:
        raise TaelError(f"calibration takes at least 1 row of 2 tokens, not {rows} of {length}")
    first = [tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id or 0]
    ids: list[int] = []
    needed = rows * (length - 1)
    for document in documents:
        ids += tokenizer.encode(document.text)
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise TaelError(f"calibration needs {needed:,} tokens and the text holds {len(ids):,}; give more text")
    return torch.tensor([first + ids[i * (length - 1) : (i + 1) * (length - 1)] for i in range(rows)])


# ------------------------------------------------------------------ one matrix


def gptq(
    weight: Tensor,
    hessian: Tensor,
    group: int,
    *,
    asymmetric: bool = False,
    act_order: bool = False,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """int4 of weight [out, in] under hessian [in, in] = X X^T.

    Returns codes uint8 [out, in] in 0..15, scales and (asymmetric) minimums fp16 [out, in/group]. A group's scales
    are chosen when its turn comes, from weights that already make up for earlier columns; with `act_order` columns go
    by falling H[i, i] and all scales are chosen at the start. Raises TaelError when no damping makes the Hessian
    positive definite.
    """
    w = weight.detach().float().clone()
    h = hessian.float().clone()
    dead = h.diagonal() == 0  # inputs that never were anything but 0: their weights do not matter
    h.diagonal()[dead] = 1
    importance = h.diagonal().clone()
    columns = w.shape[1]
    order = importance.argsort(descending=True) if act_order else torch.arange(columns, device=w.device)
    scales = torch.empty(w.shape[0], columns // group, dtype=torch.float16, device=w.device)
    minimums = torch.empty_like(scales) if asymmetric else None

    def choose(groups: Tensor, importance: Tensor, where: slice) -> None:
        if minimums is None:
            scales[:, where] = int4_scales(groups, importance)
        else:
            scales[:, where], minimums[:, where] = int4_ranges(groups, importance)

    if act_order:
        choose(w.unflatten(1, (-1, group)), importance.view(-1, group), slice(None))
        w, h = w[:, order], h[order][:, order]
    factor = _inverse_factor(h, damping)
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    block = max(1, LAZY_BLOCK // group) * group  # whole groups: their weights are up to date when their turn comes
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(w.shape[0], end - start, device=w.device)
        part = w[:, start:end]  # a view: corrections within the block show at once
        for i in range(start, end):
            if not act_order and i % group == 0:
                part_of = slice(i // group, i // group + 1)
                choose(w[:, i : i + group].unsqueeze(1), importance[i : i + group], part_of)
            column = part[:, i - start]
            which = int(order[i]) // group
            scale, minimum = scales[:, which], None if minimums is None else minimums[:, which]
            code = int4_codes(column.unsqueeze(-1), scale, minimum).squeeze(-1)
            codes[:, i] = code
            value = (code - 8) * scale.float() if minimum is None else code * scale.float() + minimum.float()
            error = (column - value) / factor[i, i]
            errors[:, i - start] = error
            part[:, i - start :].addr_(error, factor[i, i:end], alpha=-1)
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return codes[:, order.argsort()] if act_order else codes, scales, minimums


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of H^-1 = U^T U; the damping grows tenfold until H is positive definite."""
    mean = hessian.diagonal().mean()
    for _ in range(4):
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise TaelError("calibration: a layer's inputs are not finite or degenerate; take other or more calibration text")


@dataclass(frozen=True)
class Grid:
    """What int4 layers are rounded to."""

    group: int = 32
    asymmetric: bool = False

    def linear(self, weight: Tensor, hessian: Tensor, bias: Tensor | None = None) -> QuantizedLinear:
        """`weight` rounded under `hessian`."""
        codes, scales, minimums = gptq(weight, hessian, self.group, asymmetric=self.asymmetric, act_order=True)
        return QuantizedLinear("int4", pack_int4(codes), scales, minimums, bias, self.group)


# ------------------------------------------------------------------ a whole model


@torch.no_grad()
def gptq_layers(
    model: Transformer,
    names: set[str],
    grid: Grid,
    rows: Tensor,
    quantise: Callable[[Transformer, str], None],
    done: Calibrated,
) -> Iterator[str]:
    """Round the layers `names` of `model` by GPTQ, block after block; yields each block's name when it is done.

    `quantise(model, name)` rounds to nearest whatever else below a name is to be quantised. rows [R, T] token ids.
    """
    if rows.dim() != 2 or rows.numel() == 0 or not 0 <= int(rows.min()) <= int(rows.max()) < model.config.vocab_size:
        raise TaelError(f"calibration rows must be token ids [rows, length] below {model.config.vocab_size}")
    rows = rows.to(model.norm.weight.device)
    quantise(model, "embed_tokens")
    hidden = model.embed_tokens(rows)  # [R, T, D]
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        hidden = _Walk(model, f"layers.{index}", names, grid, quantise, done).block(block, hidden)
        yield f"layers.{index}"
    hidden = model.norm(hidden)
    for depth, module in enumerate(model.mtp, start=1):
        assert isinstance(module, MTPModule) and isinstance(module.block, Block)
        name = f"mtp.{depth - 1}"
        following = model.embed_tokens(rows[:, depth:])  # [R, T - depth, D]
        hidden = hidden[:, : following.shape[1]]
        _Walk(model, name, names, grid, quantise, done).projection(module, hidden, following)
        joined = module.join(hidden, following)
        walk = _Walk(model, f"{name}.block", names, grid, quantise, done)
        hidden = module.norm(walk.block(module.block, joined))
        yield name
    quantise(model, "lm_head")


class _Walk:
    """One block's way from float to codes: collect its layers' inputs, round them, return what it now puts out."""

    def __init__(
        self,
        model: Transformer,
        prefix: str,
        names: set[str],
        grid: Grid,
        quantise: Callable[[Transformer, str], None],
        done: Calibrated,
    ) -> None:
        self.model, self.prefix, self.grid, self.quantise, self.done = model, prefix, grid, quantise, done
        self.names = [name for name in names if name.startswith(f"{prefix}.")]
        self.hessians: dict[str, Tensor] = {}
        self.routed: dict[str, list[tuple[Tensor, ...]]] = {}

    def block(self, block: Block, hidden: Tensor) -> Tensor:
        """hidden [R, T, D] -> [R, T, D]; `block` is quantised on the way."""
        hooks = [self.model.get_submodule(name).register_forward_pre_hook(self._watch(name)) for name in self.names]
        try:
            self._run(block, hidden)
        finally:
            for hook in hooks:
                hook.remove()
        for name in sorted(self.names):
            module = self.model.get_submodule(name)
            if isinstance(module, Experts):
                self.model.set_submodule(name, self._experts(module, self.routed.pop(name)))
            else:
                self._replace(name, module, self.hessians.pop(name))
        self.quantise(self.model, self.prefix)
        return self._run(block, hidden)

    def projection(self, module: MTPModule, hidden: Tensor, following: Tensor) -> None:
        """An MTP module's eh_proj; hidden and following (the next tokens' embeddings) [R, T, D]."""
        name = f"{self.prefix}.eh_proj"
        if name in self.names:
            hook = module.eh_proj.register_forward_pre_hook(self._watch(name))
            module.join(hidden, following)
            hook.remove()
            self._replace(name, module.eh_proj, self.hessians.pop(name))
        self.quantise(self.model, name)

    def _run(self, block: Block, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        rope = make_rope(self.model.config, torch.arange(length, device=hidden.device))
        return torch.cat([block(part, rope, None)[0] for part in hidden.split(max(1, _BATCH_TOKENS // length))])

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if isinstance(module, Experts):
                self.routed.setdefault(name, []).append(inputs)
                return
            gram = _gram(inputs[0].flatten(0, -2))
            self.hessians[name] = self.hessians[name].add_(gram) if name in self.hessians else gram

        return hook

    def _replace(self, name: str, module: nn.Module, hessian: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        self.model.set_submodule(name, self.grid.linear(module.weight, hessian, module.bias))
        self.done.matrices += 1

    def _experts(self, experts: Experts, routed: list[tuple[Tensor, ...]]) -> QuantizedExperts:
        """An expert at a time, on its own tokens: Hessians of one expert are all that is held."""
        x, gates, choice = (torch.cat(parts) for parts in zip(*routed, strict=True))
        ups: list[QuantizedLinear] = []
        downs: list[QuantizedLinear] = []
        for index in range(len(experts.down_proj)):
            token, place = (choice == index).nonzero(as_tuple=True)
            ups.append(self._expert(experts.gate_up_proj[index], x[token]))
            gate, up = ups[-1](x[token]).chunk(2, dim=-1)  # what the quantised half really hands on
            inner = F.silu(gate) * up * gates[token, place].unsqueeze(-1).to(x.dtype)
            downs.append(self._expert(experts.down_proj[index], inner))
        return QuantizedExperts(_stack(ups), _stack(downs))

    def _expert(self, weight: Tensor, x: Tensor) -> QuantizedLinear:
        if len(x) < ENOUGH * weight.shape[1]:
            self.done.sparse += 1
            return QuantizedLinear.from_float(weight, "int4", self.grid.group, self.grid.asymmetric)
        self.done.matrices += 1
        return self.grid.linear(weight, _gram(x))


def _gram(x: Tensor) -> Tensor:
    """x [N, in] -> x^T x [in, in] in fp32."""
    wide = x.float()
    return wide.t() @ wide


def _stack(layers: list[QuantizedLinear]) -> QuantizedLinear:
    first = layers[0]
    codes, scales = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("codes", "scales"))
    low = [layer.minimums for layer in layers if layer.minimums is not None]
    return QuantizedLinear(first.scheme, codes, scales, torch.stack(low) if low else None, None, first.group)
