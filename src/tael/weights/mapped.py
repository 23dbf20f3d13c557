"""A model folder whose routed experts stay in the mapped files: a model larger than the free memory runs.

    model = load_mapped("path/to/folder", notice=print)

Everything else is read into memory. An expert's pages are read from the disk when a token is first routed to it, and
may be dropped again by the system whenever memory is short: they are never written to. safetensors' own mapping is
used; tensors are views of it (measured: reading 200 MB of them adds nothing to the process's own memory).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tael.errors import TaelError
from tael.model.moe import Experts
from tael.model.transformer import Transformer
from tael.weights.huggingface import assign, fill, open_folder, present_slots
from tael.weights.quantized import loop_over_experts
from tael.weights.reader import EIGHT_BIT, Files, dequantise_blocks


class MappedWeight(NamedTuple):
    """A matrix as it lies in the file, [out, in] of any float type; FP8 with its scales, one a block."""

    values: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] = (1, 1)

    def dense(self, like: Tensor) -> Tensor:
        """In memory, with the type and on the device of `like`; the mapped values themselves where they are that."""
        values = self.values if self.scale is None else dequantise_blocks(self.values, self.scale, self.block)
        return values.to(like.device, like.dtype)


class MappedExperts(nn.Module):
    """`tael.model.moe.Experts` over views of mapped files: `gate`, `up` [F, D] and `down` [D, F] of every expert.

    They are no parameters: `state_dict` and `.to()` leave them where they are.
    """

    def __init__(self, gate: list[MappedWeight], up: list[MappedWeight], down: list[MappedWeight]) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor, gates: Tensor, choice: Tensor) -> Tensor:
        """x [N, D], gates [N, K], choice [N, K] -> [N, D]; touches only the experts that have tokens."""

        def apply(index: int, rows: Tensor, weight: Tensor) -> Tensor:
            gate, up = (F.linear(rows, of[index].dense(rows)) for of in (self.gate, self.up))
            return F.linear(F.silu(gate) * up * weight, self.down[index].dense(rows))

        return loop_over_experts(x, gates, choice, apply)

    def expert(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of one expert as they lie in the file; raises TaelError for FP8, which has scales."""
        found = self.gate[index], self.up[index], self.down[index]
        if any(weight.scale is not None for weight in found):
            raise TaelError("the C++ operator does not read FP8 experts from the file")
        gate, up, down = (weight.values for weight in found)
        return gate, up, down

    def extra_repr(self) -> str:
        return f"experts={len(self.gate)}, mapped"


def load_mapped(
    folder: str | Path, dtype: torch.dtype = torch.float32, notice: Callable[[str], None] | None = None
) -> Transformer:
    """Read a model folder on the CPU, routed experts left in the mapped files; the rest in `dtype`.

    `notice` is told in a line when the experts are larger than the memory that is free. Works for fp32, fp16, bf16
    and FP8 folders; a model without experts is read as by `load_model`. Raises TaelError as that does.
    """
    device = torch.device("cpu")
    model, files = open_folder(folder, dtype)
    expected = model.state_dict()
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    state: dict[str, Tensor] = {}
    mapped: dict[str, dict[str, list[MappedWeight]]] = {name: {"gate": [], "up": [], "down": []} for name in stacks}
    size = 0
    for slot in present_slots(model, files):
        stack = slot.parameter.rpartition(".")[0]
        if stack not in mapped:
            fill(state, expected, slot, files.read(slot.name), device)
            continue
        weight = _view(files, slot.name)
        size += weight.values.numel() * weight.values.element_size()
        kind = slot.name.removesuffix("_proj.weight").rpartition(".")[2]  # slots come in the order of the experts
        mapped[stack][kind].append(weight)
    for name, parts in mapped.items():
        model.set_submodule(name, MappedExperts(**parts))
    assign(model, state, device)
    free = psutil.virtual_memory().available
    if notice is not None and size > free:
        notice(
            f"{files.folder}: the experts take {size / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; they "
            "are read from the disk as they are needed, which is slow: quantise the model to int4 to make it smaller"
        )
    return model


def _view(files: Files, name: str) -> MappedWeight:
    raw = files.raw(name)
    if raw.dtype in EIGHT_BIT:
        return MappedWeight(raw, files.scale(name, raw), files.block)
    return MappedWeight(raw)
