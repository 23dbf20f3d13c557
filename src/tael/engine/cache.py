"""The latent cache: for every sequence and layer, one entry a token (see tael.model.attention for what an entry is).

`LatentCache` holds [layers, B, capacity, width] in one block of memory and lends each layer a view that satisfies
`LayerCache`. Sequences in a batch have lengths of their own: an entry is written at its token's position, and a token
sees the positions up to its own. What lies beyond a sequence's length is never seen before it is overwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tael.model.config import ModelConfig


class LatentCache:
    """Entries of a batch of sequences; `bytes` is what it really holds."""

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        width = config.cache_values_per_token()
        self._entries = torch.zeros(config.num_hidden_layers, batch, capacity, width, dtype=dtype, device=device)
        self._positions = torch.empty(0)
        self._mask = torch.empty(0)
        self._limit = 0

    @property
    def bytes(self) -> int:
        return self._entries.numel() * self._entries.element_size()

    def begin(self, positions: Tensor) -> list[LayerView]:
        """Prepare a forward pass over tokens at `positions` [B, T]; returns one view a layer."""
        self._limit = int(positions.max()) + 1
        self._positions = positions.unsqueeze(-1)  # [B, T, 1]
        slots = torch.arange(self._limit, device=positions.device)
        self._mask = (slots <= self._positions).unsqueeze(1)  # [B, 1, T, S]
        return [LayerView(self, i) for i in range(len(self._entries))]

    def append(self, layer: int, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Write entry [B, T, width] of `layer` and return what its tokens may see."""
        held = self._entries[layer]  # [B, capacity, width]
        held.scatter_(1, self._positions.expand_as(entry), entry.to(held.dtype))
        return held[:, : self._limit].to(entry.dtype), self._mask

    def keep(self, rows: Tensor) -> None:
        """Keep only the sequences `rows` [n] of the batch."""
        self._entries = self._entries[:, rows]


class LayerView:
    """One layer's part of a LatentCache."""

    def __init__(self, cache: LatentCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def append(self, entry: Tensor) -> tuple[Tensor, Tensor]:
        return self._cache.append(self._layer, entry)
