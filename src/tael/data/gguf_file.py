"""GGUF files, version 2 and 3: metadata and memory-mapped tensors, read without trusting a byte of them.

Layout (docs/gguf.md of ggml): "GGUF", version u32, tensor count u64, entry count u64; entries (key, type u32,
value); tensor infos (name, dimension count u32, dimensions u64 innermost first, type u32, offset u64); padding to
`general.alignment`; tensor data.

The `gguf` package names the types and undoes the quantisation; its own reader is a test oracle only: it takes a
file's word for every length, so that a length of 2^60 keeps it busy for good, and 3 seconds for a vocabulary that
takes a tenth of one here.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from tael.errors import TaelError

MAGIC = b"GGUF"
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "B",
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor: `shape` outermost first, as torch writes it; `data` uint8 [rows, bytes a row], memory-mapped."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class GGUFFile:
    """What a file holds. Metadata values are int, float, bool, str, or lists of one of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def integer(self, key: str, default: int | None = None) -> int:
        """The whole number under `key`; raises TaelError when it is missing without a default, or something else."""
        return self._value(key, default, int, "a whole number")

    def number(self, key: str, default: float | None = None) -> float:
        """The number under `key`; a 32-bit float comes back as the shortest decimal that means it (1e-05)."""
        return float(self._value(key, default, (int, float), "a number"))

    def text(self, key: str, default: str | None = None) -> str:
        """The string under `key`."""
        return self._value(key, default, str, "a string")

    def flag(self, key: str, default: bool | None = None) -> bool:
        """The truth value under `key`."""
        return self._value(key, default, bool, "true or false")

    def texts(self, key: str) -> list[str]:
        """The list of strings under `key`."""
        return self._list(key, str, "strings")

    def integers(self, key: str) -> list[int]:
        """The list of whole numbers under `key`."""
        return self._list(key, int, "whole numbers")

    def _value(self, key: str, default: Any, kind: Any, words: str) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise TaelError(f"{self.path}: the metadata lack '{key}'; this GGUF file is of another kind, or damaged")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:37] + "..."
            raise TaelError(f"{self.path}: '{key}' must be {words}, not {shown}")
        return value

    def _list(self, key: str, kind: type, words: str) -> list[Any]:
        value = self._value(key, None, list, f"a list of {words}")
        if not all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
            raise TaelError(f"{self.path}: '{key}' must be a list of {words}")
        return value


class _DamagedError(Exception):
    """The file contradicts itself or the format; says what in a few words."""


def forget(tensor: GGUFTensor) -> None:
    """Hand the pages of a tensor that has been read back to the system: a file is not held beside its model."""
    mapped = getattr(tensor.data, "_mmap", None)
    if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = (
        tensor.data.__array_interface__["data"][0] - np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    )
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + tensor.data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, first, length)


def read_gguf(path: str | Path) -> GGUFFile:
    """Read a GGUF file's metadata and map its tensors; nothing of the weights is read yet.

    Raises TaelError, one line naming the file, when there is no such file, it is no GGUF file, is damaged or cut off,
    of another version or byte order, or one part of several.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        mapped = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except (OSError, ValueError) as error:
        raise TaelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if bytes(mapped[:4]) != MAGIC:
        raise TaelError(f"{path}: no GGUF file; it does not start with 'GGUF'")
    try:
        metadata, tensors = _Reader(mapped).read()
    except _DamagedError as error:
        raise TaelError(f"{path}: damaged or incomplete GGUF file; fetch it again ({error})") from None
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise TaelError(f"{path}: one of {parts} parts; merge them first (llama.cpp's gguf-split --merge)")
    return GGUFFile(path, metadata, tensors)


class _Reader:
    """A cursor over the mapped file; every step is checked against its end."""

    def __init__(self, mapped: np.ndarray) -> None:
        self.mapped, self.view, self.at = mapped, mapped.data, len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        version = self.scalar("I")
        if version not in (2, 3):
            order = "big-endian, or " if version & 0xFFFF == 0 else ""
            raise _DamagedError(f"{order}version {version}; versions 2 and 3 are read")
        tensor_count, entry_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self.string()
            if key in metadata:
                raise _DamagedError(f"'{key[:60]}' is there twice")
            metadata[key] = self.value(self.value_type())
        infos = [self.tensor_info() for _ in range(tensor_count)]
        return metadata, self.tensors(infos, metadata.get("general.alignment", _ALIGNMENT))

    def take(self, count: int) -> int:
        """Step over `count` bytes; where they begin."""
        begin = self.at
        if count > len(self.view) - begin:
            raise _DamagedError(f"ends at byte {len(self.view)}, where {count} more were due from byte {begin}")
        self.at += count
        return begin

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.view, self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        begin = self.take(length)
        try:
            return str(self.view[begin : begin + length], "utf-8")
        except UnicodeDecodeError:
            raise _DamagedError(f"no UTF-8 text at byte {begin}") from None

    def value_type(self) -> GGUFValueType:
        number = self.scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise _DamagedError(f"no value type has the number {number}") from None

    def value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is GGUFValueType.ARRAY:
            return self.array(self.value_type(), self.scalar("Q"))
        return _plain([self.scalar(_SCALARS[kind])], kind)[0]

    def array(self, kind: GGUFValueType, count: int) -> list[Any]:
        if kind is GGUFValueType.ARRAY:
            raise _DamagedError("a list of lists")
        smallest = 8 if kind is GGUFValueType.STRING else struct.calcsize(f"<{_SCALARS[kind]}")
        if count > (len(self.view) - self.at) // smallest:
            raise _DamagedError(f"a list of {count} values does not fit the file")
        if kind is GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        begin = self.take(count * smallest)
        return _plain(list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.view, begin)), kind)

    def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dimensions = self.string(), self.scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _DamagedError(f"tensor '{name[:60]}' has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        number, offset = self.scalar("I"), self.scalar("Q")
        try:
            return name, shape, GGMLQuantizationType(number), offset
        except ValueError:
            raise _DamagedError(f"tensor '{name[:60]}' has the unknown type {number}") from None

    def tensors(self, infos: list[tuple], alignment: Any) -> dict[str, GGUFTensor]:
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment {str(alignment)[:40]} is no power of two")
        begin = -(-self.at // alignment) * alignment
        found: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in infos:
            block, size = GGML_QUANT_SIZES[kind]
            if name in found or 0 in shape or shape[-1] % block:
                why = "is there twice" if name in found else f"cannot have the shape {list(shape)}"
                raise _DamagedError(f"tensor '{name[:60]}' {why}")
            rows, row = math.prod(shape[:-1]), shape[-1] // block * size
            if begin + offset + rows * row > len(self.view):
                raise _DamagedError(f"ends at byte {len(self.view)}, within or before tensor '{name[:60]}'")
            data = self.mapped[begin + offset : begin + offset + rows * row].reshape(rows, row)
            found[name] = GGUFTensor(name, kind, shape, data)
        return found


def _plain(values: list[Any], kind: GGUFValueType) -> list[Any]:
    if kind is GGUFValueType.BOOL:
        return [bool(value) for value in values]
    if kind is GGUFValueType.FLOAT32:
        return [float(str(np.float32(value))) for value in values]
    return values
