"""DeepSeekMoE: shared experts every token passes, routed experts chosen per token, no token ever dropped.

Routing (V3 section 2.1.2): s = score(x W_g). Experts are chosen by s + bias, limited to the best groups; the gates
are the *unbiased* s of the chosen, normalised and scaled. The bias is moved between steps by `tael.train.balance`,
never by a gradient.

Dispatch sorts the (token, expert) pairs by expert, so that each expert's tokens lie together, and multiplies all
experts in one grouped product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tael.model.config import ModelConfig


class Routing(NamedTuple):
    """What one MoE layer decided: scores [B, T, E] fp32 (unbiased) and choice [B, T, K] int64."""

    scores: Tensor
    choice: Tensor


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """The gate, always in fp32: weight [E, D] and the selection bias [E] (a buffer)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.n_routed_experts or 0
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if config.uses_selection_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.k, self.experts = config.num_experts_per_tok, experts
        self.groups, self.kept_groups = config.n_group or 1, config.topk_group or 1
        self.group_top = 2 if config.uses_selection_bias else 1
        self.limits_groups = self.groups > 1 and config.topk_method != "greedy"
        self.scoring, self.normalises = config.scoring, config.normalises_gates
        self.scale = config.routed_scaling_factor

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [B, T, D] -> gates [B, T, K] fp32 and the routing."""
        logits = F.linear(x.float(), self.weight.float())  # [B, T, E]
        scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)
        choice = self.choose(scores.detach())
        gates = scores.gather(-1, choice)
        if self.normalises:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return gates * self.scale, Routing(scores, choice)

    def choose(self, scores: Tensor) -> Tensor:
        """Indices [.., K] of the best experts by biased score in the best groups (V3 eq. 16, section 2.1.2)."""
        biased = scores + self.e_score_correction_bias if hasattr(self, "e_score_correction_bias") else scores
        if self.limits_groups:
            grouped = biased.unflatten(-1, (self.groups, -1))  # [.., G, E/G]
            strength = grouped.topk(min(self.group_top, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = strength.topk(self.kept_groups, dim=-1).indices
            allowed = torch.zeros_like(strength, dtype=torch.bool).scatter_(-1, kept, True)
            biased = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
        return biased.topk(self.k, dim=-1).indices


class _Spread(torch.autograd.Function):
    """Row i of the result is the token that pair order[i] belongs to: x [N, D] -> [N K, D].

    Its gradient is `_gather`'s forward and the other way round; written by hand because the gradient of indexing
    adds rows one at a time on CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        _, inverse = ctx.saved_tensors
        return grads[0][inverse].unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    """Add up each token's K rows: sorted rows [N K, D] -> [N, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return rows[inverse].unflatten(0, (-1, k)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0][order // ctx.k], None, None, None


def count_choices(choice: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen, [E] int64; `choice` of any shape. Its shape never depends on the data."""
    chosen = choice.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=chosen.device).scatter_add_(
        0, chosen, torch.ones_like(chosen)
    )


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [M, I] sorted by expert, weight [E, O, I], counts [E] rows per expert -> [M, O].

    One grouped product where torch has a kernel for it (16-byte rows; on CUDA bf16 only), else an expert at a time.
    """
    aligned = all(x.element_size() * width % 16 == 0 for width in weight.shape[1:])
    if aligned and (x.device.type == "cpu" or x.dtype == torch.bfloat16):
        offsets = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.transpose(-1, -2), offs=offsets)
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate_up_proj [E, 2F, D] and down_proj [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, d = config.n_routed_experts or 0, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, d))
        self.down_proj = nn.Parameter(torch.empty(experts, d, width))

    def forward(self, x: Tensor, gates: Tensor, choice: Tensor) -> Tensor:
        """x [N, D], gates [N, K], choice [N, K] -> [N, D]: each token's experts' outputs, weighed and added up."""
        k = choice.shape[1]
        expert = choice.flatten()
        order = expert.argsort(stable=True)  # [N K] pairs, by expert
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        counts = count_choices(expert, self.down_proj.shape[0])
        rows: Tensor = _Spread.apply(x, order, inverse, k)  # type: ignore[assignment]
        gate, up = self.product(rows, self.gate_up_proj, counts).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * gates.flatten()[order].unsqueeze(-1).to(x.dtype)
        out = self.product(hidden, self.down_proj, counts)
        return _Gather.apply(out, order, inverse, k)  # type: ignore[return-value]

    def product(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """x [M, I] sorted by expert times `weight` [E, O, I] -> [M, O]."""
        return grouped_linear(x, weight, counts)


class MixtureOfExperts(nn.Module):
    """Routed plus shared experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_experts = FeedForward(
                config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [B, T, D] -> [B, T, D] and what the router decided."""
        gates, routing = self.gate(x)
        out = self.experts(x.flatten(0, 1), gates.flatten(0, 1), routing.choice.flatten(0, 1)).view_as(x)
        if hasattr(self, "shared_experts"):
            out = out + self.shared_experts(x)
        return out, routing
