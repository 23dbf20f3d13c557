"""The modules that hold quantised weights.

One format, which the native runner and the GGUF reader share. A row of weights is cut into groups of `group`
columns; each group has one fp16 scale and, where the scheme is asymmetric, one fp16 minimum.

| scheme | codes                                             | value                                 | activations |
|--------|---------------------------------------------------|---------------------------------------|-------------|
| int4   | uint8 [out, in/2], even columns in the low nibble | scale (code - 8), or scale code + min | int8        |
| int8   | int8 [out, in]                                    | scale code                            | float       |
| w8a8   | int8 [out, in]                                    | scale code                            | int8        |

"int8" activations are rounded on the fly: 32 columns of a row share the scale amax / 127, kept in fp32
(`round_activations`). What `QuantizedLinear.forward` computes defines the numbers; a kernel may only sum in another
order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tael.errors import TaelError
from tael.weights.rounding import check_group, pack_int4, round_int4, round_int8, unpack_int4

Scheme = Literal["int4", "int8", "w8a8"]
SCHEMES: tuple[Scheme, ...] = ("int4", "int8", "w8a8")

ACTIVATION_GROUP = 32
"""Columns of an activation row that share a scale, whatever the weights' group."""

_CACHED_WEIGHT = 1 << 20
"""Elements up to which a dequantised `.weight` is kept (4 MB): kv_b_proj in its absorbed form is read every step."""

_SLAB = 1 << 22
"""Elements of a weight that are dequantised at once in a product (16 MB of fp32)."""


def round_activations(x: Tensor) -> Tensor:
    """x [.., in] with every 32 columns rounded to 255 levels of amax / 127, as floats again; fp32 [.., in]."""
    groups = x.float().unflatten(-1, (-1, ACTIVATION_GROUP))  # [.., in/32, 32]
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / torch.where(scale > 0, scale, 1.0)).round()  # half to even
    return (codes * scale).flatten(-2)


class QuantizedLinear(nn.Module):
    """A linear layer, or with one more leading dimension E a stack of them, held as codes and scales.

    Buffers: `codes` (uint8 or int8, see above), `scales` fp16 [.., out, in/group], `minimums` the same or None,
    `bias` [out] or None. Raises TaelError when their shapes or types contradict each other.
    """

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        codes: Tensor,
        scales: Tensor,
        minimums: Tensor | None = None,
        bias: Tensor | None = None,
        group: int = 32,
    ) -> None:
        super().__init__()
        if scheme not in SCHEMES:
            raise TaelError(f"no quantisation scheme '{scheme}'; choose one of {', '.join(SCHEMES)}")
        self.scheme: Scheme = scheme
        self.group = group
        self.out_features = codes.shape[-2]
        self.in_features = codes.shape[-1] * (2 if scheme == "int4" else 1)
        _check(scheme, codes, scales, minimums, group)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("minimums", minimums)
        self.register_buffer("bias", bias)
        self._weight: Tensor | None = None

    @classmethod
    def from_float(
        cls, weight: Tensor, scheme: Scheme, group: int = 32, asymmetric: bool = False, bias: Tensor | None = None
    ) -> QuantizedLinear:
        """Round `weight` [.., out, in] to the nearest codes, with scales that minimise the squared error (int4).

        Raises TaelError when `in` is no multiple of the group (and of 32), or the weight holds a value that is not
        finite.
        """
        if scheme not in SCHEMES:
            raise TaelError(f"no quantisation scheme '{scheme}'; choose one of {', '.join(SCHEMES)}")
        check_group(weight.shape[-1], group)
        if scheme == "int4":
            codes, scales, minimums = round_int4(weight, group, asymmetric)
            return cls(scheme, pack_int4(codes), scales, minimums, bias, group)
        if asymmetric:
            raise TaelError(f"scheme '{scheme}' has no minimums; asymmetric rounding is for int4")
        codes, scales = round_int8(weight, group)
        return cls(scheme, codes, scales, None, bias, group)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the codes stand for, [.., out, in]; computed in fp32."""
        return _values(self.scheme, self.codes, self.scales, self.minimums, self.group).to(dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight in fp32; kept when it is small, made anew on every access when it is not."""
        if self._weight is not None:
            return self._weight
        weight = self.dequantize()
        if weight.numel() <= _CACHED_WEIGHT:
            self._weight = weight
        return weight

    def expert(self, index: int) -> QuantizedLinear:
        """Layer `index` of a stack; a view of its memory."""
        minimums = None if self.minimums is None else self.minimums[index]
        return QuantizedLinear(self.scheme, self.codes[index], self.scales[index], minimums, None, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out] in x's type; the product itself is in fp32."""
        wide = x.float() if self.scheme == "int8" else round_activations(x)
        rows = max(1, _SLAB // self.in_features)
        parts = []
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            minimums = None if self.minimums is None else self.minimums[part]
            weight = _values(self.scheme, self.codes[part], self.scales[part], minimums, self.group)
            parts.append(F.linear(wide, weight))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._weight = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.scheme}, in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


class QuantizedEmbedding(nn.Module):
    """An embedding of int8 rows: `codes` int8 [V, D], `scales` fp16 [V, D/group]; rows come out in `dtype`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, group: int = 32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        _check("int8", codes, scales, None, group)
        self.group, self.dtype = group, dtype
        self.num_embeddings, self.embedding_dim = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def from_float(cls, weight: Tensor, group: int = 32) -> QuantizedEmbedding:
        """Round `weight` [V, D]; raises TaelError when D is no multiple of the group."""
        check_group(weight.shape[-1], group)
        return cls(*round_int8(weight, group), group, weight.dtype)

    def head(self, scheme: Scheme = "int8") -> QuantizedLinear:
        """The output head of a model with tied embeddings: the same memory, read as a linear layer."""
        return QuantizedLinear(scheme, self.codes, self.scales, group=self.group)

    @property
    def weight(self) -> Tensor:
        """The whole table, dequantised anew on every access; `model.norm.weight` tells device and type for free."""
        return _values("int8", self.codes, self.scales, None, self.group).to(self.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [..] int64 -> [.., D]."""
        return _values("int8", self.codes[tokens], self.scales[tokens], None, self.group).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, group={self.group}"


class QuantizedExperts(nn.Module):
    """`tael.model.moe.Experts` with stacks of codes: gate_up [E, 2F, D] (gate first) and down [E, D, F]."""

    def __init__(self, gate_up: QuantizedLinear, down: QuantizedLinear) -> None:
        super().__init__()
        if gate_up.codes.dim() != 3 or gate_up.codes.shape[0] != down.codes.shape[0]:
            raise TaelError("experts: gate_up and down must be stacks [E, ..] of as many experts")
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor, gates: Tensor, choice: Tensor) -> Tensor:
        """x [N, D], gates [N, K], choice [N, K] -> [N, D]; goes over the experts that have tokens."""

        def apply(index: int, rows: Tensor, weight: Tensor) -> Tensor:
            gate, up = self.gate_up.expert(index)(rows).chunk(2, dim=-1)
            return self.down.expert(index)(F.silu(gate) * up * weight)

        return loop_over_experts(x, gates, choice, apply)


def loop_over_experts(
    x: Tensor, gates: Tensor, choice: Tensor, apply: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """Sum over each token's experts of apply(expert, rows [n, D], their gates [n, 1]) -> [n, D].

    x [N, D], gates [N, K], choice [N, K] -> [N, D]. Adds up in fp32, in the order of the experts.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for index in choice.unique().tolist():
        token, place = (choice == index).nonzero(as_tuple=True)
        weight = gates[token, place].unsqueeze(-1).to(x.dtype)
        out.index_add_(0, token, apply(index, x[token], weight).float())
    return out.to(x.dtype)


def _values(scheme: Scheme, codes: Tensor, scales: Tensor, minimums: Tensor | None, group: int) -> Tensor:
    """fp32 values of codes [.., out, in or in/2]; the law of the table above."""
    integers = unpack_int4(codes) if scheme == "int4" else codes
    wide = integers.float().unflatten(-1, (-1, group))  # [.., in/group, group]
    if minimums is not None:
        return (wide.mul_(scales.float().unsqueeze(-1)).add_(minimums.float().unsqueeze(-1))).flatten(-2)
    if scheme == "int4":
        wide.sub_(8)
    return wide.mul_(scales.float().unsqueeze(-1)).flatten(-2)


def _check(scheme: Scheme, codes: Tensor, scales: Tensor, minimums: Tensor | None, group: int) -> None:
    kind = torch.uint8 if scheme == "int4" else torch.int8
    columns = codes.shape[-1] * (2 if scheme == "int4" else 1)
    check_group(columns, group)
    expected = (*codes.shape[:-1], columns // group)
    if codes.dtype != kind:
        raise TaelError(f"{scheme} codes must be {str(kind).removeprefix('torch.')}, not {codes.dtype}")
    for name, tensor in (("scales", scales), ("minimums", minimums)):
        if tensor is not None and (tuple(tensor.shape) != expected or tensor.dtype != torch.float16):
            raise TaelError(f"{name} of {scheme} codes {list(codes.shape)} must be fp16 {list(expected)}")
    if minimums is not None and scheme != "int4":
        raise TaelError(f"scheme '{scheme}' has no minimums; only int4 has")
