"""The paged latent cache: for every layer, block and slot one entry (see tael.model.attention for what an entry is).

`PagedCache` holds [layers, num_blocks, block_size, width] in one piece of memory; which block belongs to whom is
`BlockManager`'s business. A `Window` is what one group of sequences [B, T] writes and sees in a forward pass, worked
out once and used by every layer; `LayerView` is one layer under it, and satisfies the model's `LayerCache`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class PagedCache:
    """Entries of all layers; `bytes` is what it really holds. Zeroed at first: what a mask hides must be finite."""

    def __init__(
        self, layers: int, num_blocks: int, block_size: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._entries = _zeros((layers, num_blocks, block_size, width), dtype, device)
        self._room = torch.empty(0, dtype=dtype, device=device)

    @property
    def bytes(self) -> int:
        return self._entries.numel() * self._entries.element_size()

    @property
    def block_size(self) -> int:
        return self._entries.shape[2]

    @property
    def width(self) -> int:
        return self._entries.shape[3]

    def views(self, window: Window, first: int, count: int) -> list[LayerView]:
        """Layers first..first+count-1 as `window` has them."""
        return [LayerView(self, self._entries[i], window) for i in range(first, first + count)]

    def gather(self, layer: Tensor, window: Window) -> Tensor:
        """Entries [B, S, width] of `layer` [num_blocks, block_size, width] in the order of the sequences' tokens.

        Read in place where the tables are evenly spaced ranges, else copied block by block into one piece of memory
        that all layers share: what is returned holds until the next call.
        """
        rows, blocks = window.tables.shape
        if window.stride is not None:
            slot = self.width * self.block_size
            start = layer.storage_offset() + window.first_block * slot
            return layer.as_strided((rows, window.seen, self.width), (window.stride * slot, self.width, 1), start)
        size = rows * blocks * self.block_size * self.width
        if self._room.numel() < size:
            self._room = torch.empty(size, dtype=layer.dtype, device=layer.device)
        out = self._room[:size].view(rows * blocks, -1)
        torch.index_select(layer.flatten(1), 0, window.tables.flatten(), out=out)
        return out.view(rows, blocks * self.block_size, self.width)[:, : window.seen]

    def erase(self, blocks: list[int]) -> None:
        """Zero blocks whose entries may not be finite: what a mask hides is still multiplied, by 0."""
        self._entries[:, torch.tensor(blocks, device=self._entries.device)] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU by calloc, whose pages take memory when first touched (torch fills them: 1 s a GB)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True)
class Window:
    """What the tokens of a group [B, T] write and see.

    write [N]: flat slots (block x block_size + place) of the new entries; real [N]: which of the B T tokens they are,
    None where none is padding (whose entries are not kept: they may be of a sequence gone wrong, and tables end in
    block 0); tables [B, W]: the blocks that hold the S slots to be read; mask [B, 1, T, S]. `fresh`: nothing stands
    before the new tokens, which then see one another causally and need not read the cache. `stride`: the tables are
    ranges, that many blocks apart, from `first_block` on.
    """

    write: Tensor
    real: Tensor | None
    tables: Tensor
    mask: Tensor | None
    seen: int
    absorbed: bool
    fresh: bool
    stride: int | None
    first_block: int

    @classmethod
    def make(
        cls,
        positions: Tensor,  # [B, T] int64, CPU
        lengths: Tensor,  # [B] int64, CPU: tokens of each row that are no padding
        tables: Tensor,  # [B, W] int64, CPU
        cache: PagedCache,
        device: torch.device,
        absorbed: bool,
        first_key: int = 0,
    ) -> Window:
        """`first_key`: slots before it are never seen (the MTP layers have no entry there)."""
        size = cache.block_size
        place = torch.arange(positions.shape[1])
        real = place < lengths.unsqueeze(-1)  # [B, T]
        slot = positions.masked_fill(~real, 0)
        block = tables.gather(1, slot // size)
        write = (block * size + slot % size)[real]
        places = None if len(write) == real.numel() else real.flatten().nonzero().flatten().to(device)
        fresh = bool((positions[:, 0] == first_key).all())
        seen = int((positions[:, 0] + lengths).max())
        tables = tables[:, : -(-seen // size)]
        mask = None
        if not fresh:
            slots = torch.arange(seen, device=device)
            mask = slots <= positions.to(device).unsqueeze(-1)  # [B, T, S]
            if first_key:
                mask &= slots >= first_key
            mask = mask.unsqueeze(1)
        stride = None if fresh else _spacing(tables)
        first = int(tables[0, 0])
        return cls(write.to(device), places, tables.to(device), mask, seen, absorbed, fresh, stride, first)


def _spacing(tables: Tensor) -> int | None:
    """Blocks from one row's range to the next row's, or None where the rows are no evenly spaced ranges."""
    if tables.shape[1] > 1 and not bool((tables.diff(dim=1) == 1).all()):
        return None
    if tables.shape[0] == 1:
        return tables.shape[1]
    steps = tables[:, 0].diff()
    step = int(steps[0])
    return step if step > 0 and bool((steps == step).all()) else None


class LayerView:
    """One layer of a PagedCache under a window."""

    def __init__(self, cache: PagedCache, layer: Tensor, window: Window) -> None:
        self._cache, self._layer, self._window = cache, layer, window

    @property
    def absorbed(self) -> bool:
        return self._window.absorbed

    def append(self, entry: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write entry [B, T, width]; return what its tokens may see. Numbers pass through the cache's precision."""
        kept = entry.to(self._layer.dtype)
        new = kept.flatten(0, 1) if self._window.real is None else kept.flatten(0, 1)[self._window.real]
        self._layer.view(-1, self._cache.width).index_copy_(0, self._window.write, new)
        if not self._window.fresh:
            kept = self._cache.gather(self._layer, self._window)
        return kept.to(entry.dtype), self._window.mask
