"""GGUF's blocks of 32 weights in the form of `QuantizedLinear`: the same codes and scales, laid out by columns.

| type | bytes of a block                              | value               |
|------|-----------------------------------------------|---------------------|
| Q4_0 | scale f16, 16 bytes of codes                  | scale (code - 8)    |
| Q4_1 | scale f16, minimum f16, 16 bytes of codes     | scale code + minimum|
| Q8_0 | scale f16, 32 codes int8                      | scale code          |

Byte j of 4-bit codes holds column j in its low and column j + 16 in its high nibble; Tael's holds columns 2j, 2j + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from torch import Tensor

from tael.data.gguf_file import GGUFTensor, forget
from tael.weights.quantize import QuantizedLinear, Scheme

KEPT = (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)
BLOCK = 32
_ROWS = 4096
"""Rows unpacked at once."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The arguments of a QuantizedLinear: codes [.., out, in or in/2], scales and minimums fp16 [.., out, in/32]."""

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    @classmethod
    def joined(cls, parts: list[Blocks]) -> Blocks:
        """Stacks of experts [E, out, ..] of the same type, one's rows after the other's."""
        minimums = (
            None if parts[0].minimums is None else torch.cat([p.minimums for p in parts if p.minimums is not None], 1)
        )
        codes, scales = torch.cat([p.codes for p in parts], 1), torch.cat([p.scales for p in parts], 1)
        return cls(parts[0].scheme, codes, scales, minimums)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Blocks:
        """The same blocks with their rows moved, or on another device."""
        minimums = None if self.minimums is None else change(self.minimums)
        return Blocks(self.scheme, change(self.codes), change(self.scales), minimums)

    def linear(self, bias: Tensor | None = None) -> QuantizedLinear:
        """A module over this memory."""
        arguments: dict[str, Any] = {"codes": self.codes, "scales": self.scales, "minimums": self.minimums}
        return QuantizedLinear(self.scheme, bias=bias, group=BLOCK, **arguments)


def read_blocks(tensor: GGUFTensor) -> Blocks:
    """The blocks of a tensor whose type is in `KEPT`, shape [.., out, in]."""
    four = tensor.kind is not Kind.Q8_0
    columns = tensor.shape[-1] // (2 if four else 1)
    rows = len(tensor.data)
    codes = torch.empty(rows, columns, dtype=torch.uint8 if four else torch.int8)
    scales = torch.empty(rows, tensor.shape[-1] // BLOCK, dtype=torch.float16)
    minimums = torch.empty_like(scales) if tensor.kind is Kind.Q4_1 else None
    size = GGML_QUANT_SIZES[tensor.kind][1]
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        data = torch.from_numpy(np.array(tensor.data[part])).unflatten(1, (-1, size))  # [rows, in/32, bytes]
        scales[part] = _halves(data, 0)
        if minimums is not None:
            minimums[part] = _halves(data, 2)
        raw = data[..., 4 if minimums is not None else 2 :]
        codes[part] = _reordered(raw).flatten(1) if four else raw.contiguous().view(torch.int8).flatten(1)
    forget(tensor)
    shape = tensor.shape[:-1]
    scheme: Scheme = "int4" if four else "int8"
    blocks = Blocks(scheme, codes, scales, minimums)
    return blocks.mapped(lambda t: t.view(*shape, t.shape[-1]))


def _halves(data: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of every block, [rows, in/32]."""
    return data[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _reordered(raw: Tensor) -> Tensor:
    """[.., 16] bytes of columns (j, j + 16) -> [.., 16] bytes of columns (2j, 2j + 1)."""
    even, odd = raw[..., 0::2], raw[..., 1::2]
    out = raw.new_empty(raw.shape)
    out[..., :8] = (even & 15) | (odd << 4)
    out[..., 8:] = (even >> 4) | (odd & 240)
    return out
