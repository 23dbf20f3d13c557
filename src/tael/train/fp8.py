"""FP8 training emulated: the values of DeepSeek-V3's FP8 recipe, computed in fp32: any machine shows its quality.

As in V3 (section 3.3): products of the blocks' matrices take E4M3 operands, activations and gradients with one scale
for 1 x 128 values of a row, weights with one for 128 x 128; sums are fp32; embedding, head, router, norms and
attention itself stay as they are; the optimiser owns fp32 masters. One thing differs: the weight gradient's operands
keep their rows' tiles, where V3 scales them anew along the tokens. It is slower than fp32; it saves nothing here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tael.model.moe import Experts, grouped_linear
from tael.model.transformer import Transformer

TILE = 128
LARGEST = 448.0
"""Of E4M3 (torch.float8_e4m3fn)."""


def round_tiles(x: Tensor) -> Tensor:
    """Values of E4M3 after scaling each run of 128 in the last dimension [.., I] to the type's range."""
    width = x.shape[-1]
    padded = F.pad(x, (0, -width % TILE)).unflatten(-1, (-1, TILE))
    return _round(padded, (-1,)).flatten(-2)[..., :width]


def round_blocks(weight: Tensor) -> Tensor:
    """The same with one scale for each 128 x 128 block of a matrix [.., O, I]."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight, (0, -columns % TILE, 0, -rows % TILE))
    blocks = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, TILE))  # [.., O/128, 128, I/128, 128]
    return _round(blocks, (-3, -1)).flatten(-4, -3).flatten(-2)[..., :rows, :columns]


def _round(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    scale = x.abs().amax(dims, keepdim=True).float().clamp_min(1e-30) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn).float().mul_(scale).to(x.dtype)


class _RoundGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return round_tiles(grads[0])


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x`."""
    return x + (rounded - x).detach()


class Float8Linear(nn.Linear):
    """A linear layer whose product is an FP8 one in both directions."""

    def forward(self, input: Tensor) -> Tensor:
        weight = _through(self.weight, round_blocks(self.weight.detach()))
        rounded = _through(input, round_tiles(input.detach()))
        out = _RoundGradient.apply(F.linear(rounded, weight))
        return out if self.bias is None else out + self.bias  # type: ignore[return-value]


class Float8Experts(Experts):
    """Routed experts whose products are FP8 ones."""

    def product(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        rounded, matrices = _through(x, round_tiles(x.detach())), _through(weight, round_blocks(weight.detach()))
        return _RoundGradient.apply(grouped_linear(rounded, matrices, counts))  # type: ignore[return-value]


def emulate_fp8(model: Transformer) -> None:
    """Let the blocks of `model` multiply in emulated FP8 from now on; names and values of parameters stay."""
    for block in [*model.layers, *(module.block for module in model.mtp)]:
        for module in block.modules():  # type: ignore[union-attr]
            if type(module) is nn.Linear:
                module.__class__ = Float8Linear
            elif type(module) is Experts:
                module.__class__ = Float8Experts
