"""Losses as pure functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_CHUNK, GPU_CHUNK = 512, 4096
"""Tokens whose logits are held at once. On a CPU 512 x 4,096 fp32 logits stay in the cache, which
2,048 do not (bench/head_loss.py)."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden @ weight.T`, never holding all logits.

    The gradient is computed with the loss, chunk by chunk, while the logits are at hand: backward only scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            x, target = hidden[part], targets[part]
            log_probs = F.log_softmax((x @ weight.t()).float(), dim=-1)  # [C, V]
            learned = target >= 0
            index = target.clamp_min(0).unsqueeze(-1)
            picked = log_probs.gather(-1, index).squeeze(-1)
            total -= (picked * learned).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(-1, index, torch.full_like(index, -1, dtype=grad.dtype))
            grad = grad.mul_(learned.unsqueeze(-1)).to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            grad_weight += grad.t() @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # The factor stays fp32 (a scalar does not widen the product): rounded to bf16 it would shift every gradient.
        return grad_hidden * grads[0], (grad_weight * grads[0]).to(ctx.weight_dtype), None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target], in nats, fp32 scalar.

    hidden [.., D], weight [V, D], targets [..] int64 with negative values where nothing is to be learned.
    """
    result = _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten())
    return result  # type: ignore[return-value]


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(hidden weight^T / temperature)[target], fp32, differentiable. hidden [.., D], targets [..]."""
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
