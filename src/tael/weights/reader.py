"""The safetensors files of a model folder, memory-mapped: tensors by name, FP8 blocks dequantised one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tael.errors import TaelError

FP8_BLOCK = 128
"""Side of the square of weights that shares one scale in DeepSeek's FP8 checkpoints."""

EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dequantise_blocks(raw: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """fp32 weights of FP8 raw [O, I], each times the scale_inv of its block (V3 report section 3.3.2).

    scale [O / rows, I / columns]. Done in place, a row of blocks at a time: nothing of the result's size beside it.
    """
    rows, columns = block
    wide = raw.float()
    for index, row in enumerate(scale):
        wide[index * rows : (index + 1) * rows] *= row.repeat_interleave(columns)[: raw.shape[1]]
    return wide


class Files:
    """The safetensors files of a folder as one name -> tensor table; every failure is a TaelError."""

    def __init__(self, folder: Path, block: tuple[int, int]) -> None:
        self.folder, self.block = folder, block
        self.file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in weight_files(folder):
            try:
                handle = safe_open(path, framework="pt", device="cpu")
                names = list(handle.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise TaelError(f"{path}: damaged or incomplete safetensors file; fetch it again ({error})") from None
            self._open[path] = handle
            self.file_of.update(dict.fromkeys(names, path))

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def read(self, name: str) -> Tensor:
        """The tensor in a float type, FP8 blocks multiplied by their scales."""
        raw = self.raw(name)
        if raw.dtype in EIGHT_BIT:
            return dequantise_blocks(raw, self.scale(name, raw), self.block)
        return raw

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self.file_of[name]].get_slice(name).get_shape())

    def raw(self, name: str) -> Tensor:
        """The tensor as it lies in the mapped file (a view, no copy), of a float type or FP8."""
        path = self.file_of[name]
        try:
            raw = self._open[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, KeyError, AttributeError) as error:
            raise TaelError(f"{path}: tensor '{name}' cannot be read; fetch the file again ({error})") from None
        if raw.dtype not in (*_FLOATS, *EIGHT_BIT):
            kind = str(raw.dtype).removeprefix("torch.")
            raise TaelError(f"{path}: tensor '{name}' is {kind}; Tael reads fp32, fp16, bf16, and fp8 with scales")
        return raw

    def scale(self, name: str, raw: Tensor) -> Tensor:
        """fp32 scales [O / rows, I / columns] of the FP8 tensor `name`, raw [O, I]."""
        path, scale_name = self.file_of[name], f"{name}_scale_inv"
        if scale_name not in self:
            raise TaelError(f"{path}: FP8 tensor '{name}' has no '{scale_name}'; fetch the release again")
        scale = self.raw(scale_name).float()
        rows, columns = self.block
        expected = tuple(-(-size // side) for size, side in zip(raw.shape, self.block, strict=False))
        if raw.dim() != 2 or tuple(scale.shape) != expected:
            raise TaelError(
                f"{self.file_of[scale_name]}: tensor '{scale_name}' has shape {list(scale.shape)}, expected "
                f"{list(expected)} for blocks of {rows} x {columns}; see weight_block_size in config.json"
            )
        return scale


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; raises TaelError when there are none, or only pickles."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TaelError(f"{index}: not an index of safetensors files; fetch it again") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise TaelError(f"{index}: names {name!r}, which is no safetensors file of this folder")
            if not (folder / name).is_file():
                raise TaelError(f"{folder / name}: the index names this file and it is not there; fetch it")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise TaelError(
            f"{folder / pickles[0]}: Tael does not open pickles, they can run code; "
            "take the safetensors version of this model"
        )
    raise TaelError(f"{single}: no such file; a model folder holds config.json and model.safetensors")
