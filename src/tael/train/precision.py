"""bf16 compute with fp32 masters.

The optimiser owns fp32 parameters. With bf16, a twin of the model holds their bf16 copies and runs forward and
backward; its gradients are added up in fp32 on the masters. The router stays fp32 in both (V3 section 3.3).
Against autocast this saves a cast of every weight at every use.
"""

from __future__ import annotations

import copy
import os
import platform
from typing import Literal

import torch
from torch import Tensor

from tael.model.moe import Router
from tael.model.transformer import Transformer

Precision = Literal["bf16", "fp32"]


Wanted = Literal["auto", "bf16", "fp32", "fp8-emulated"]
"""As recipes name it."""


def choose_precision(wanted: Wanted, device: torch.device) -> Precision:
    """What "auto" means on `device`: bf16 where it is multiplied in hardware, else fp32. Emulated FP8 is fp32.

    A CPU that has to emulate it is far slower in bf16: the demo on a Zen 3, 107 against 2,900 tokens/s (docs/log.md).
    The choice follows the hardware's features, not a measurement, so that the same machine gives the same bits.
    """
    if wanted == "fp8-emulated":
        return "fp32"
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if able or platform.machine() in ("arm64", "aarch64") else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16"


def compute_dtype(wanted: Wanted, device: torch.device) -> torch.dtype:
    """The type a stage's forward and backward pass run in."""
    return torch.bfloat16 if choose_precision(wanted, device) == "bf16" else torch.float32


KEPT_PRIMITIVES = 256


def limit_kernel_cache() -> None:
    """Have oneDNN keep KEPT_PRIMITIVES compiled products, not 1,024, unless the environment says how many.

    In bf16 on a CPU every shape multiplied is one, and experts see another number of rows at every step: the demo
    held 1 GB of them (bench/training_memory.py; with fewer it is as fast). Call it before the first multiplication,
    when oneDNN reads it.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRIMITIVES))


class Twin:
    """`master` (fp32, what is optimised and saved) and `compute` (what runs; the master itself for fp32)."""

    def __init__(self, master: Transformer, dtype: torch.dtype) -> None:
        self.master = master
        self.compute = master if dtype == torch.float32 else _cast(master, dtype)
        self._pairs = list(zip(master.parameters(), self.compute.parameters(), strict=True))
        self.sync()

    @property
    def separate(self) -> bool:
        return self.compute is not self.master

    @torch.no_grad()
    def sync(self) -> None:
        """Copy the masters into the compute model; call after each optimiser step and after loading."""
        if self.separate:
            masters, copies = zip(*self._pairs, strict=True)
            torch._foreach_copy_(list(copies), list(masters))  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the compute model's gradients to the masters' and clear them."""
        if not self.separate:
            return
        for master, working in self._pairs:
            if working.grad is None:
                continue
            grad: Tensor = working.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            working.grad = None


def _cast(master: Transformer, dtype: torch.dtype) -> Transformer:
    twin = copy.deepcopy(master).to(dtype)
    for original, module in zip(master.modules(), twin.modules(), strict=True):
        if isinstance(module, Router) and isinstance(original, Router):
            module.weight = torch.nn.Parameter(original.weight.detach().clone())
            for name, _ in original.named_buffers():
                setattr(module, name, getattr(original, name))  # one bias, shared by both
    return twin
