"""Batches of packed rows, as a pure function of (rows, seed, step): to resume is to know the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tael.data.packing import Rows
from tael.errors import TaelError

IGNORED = -100
"""Target of a position from which nothing is to be learned (torch's cross-entropy leaves it out)."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B sequences of T tokens with what follows each token; all int64. Targets are -100 where nothing is learned."""

    tokens: torch.Tensor  # [B, T]
    targets: torch.Tensor  # [B, T]
    document_ids: torch.Tensor  # [B, T]

    @property
    def tokens_to_learn(self) -> int:
        """Number of targets that count."""
        return int((self.targets != IGNORED).sum())

    def split(self, n: int) -> list[Batch]:
        """`n` micro batches in order, as equal in rows as can be; raises TaelError when there are too few rows."""
        rows = self.tokens.shape[0]
        if not 1 <= n <= rows:
            raise TaelError(f"cannot split a batch of {rows} rows into {n}")
        parts = zip(*(t.tensor_split(n) for t in (self.tokens, self.targets, self.document_ids)), strict=True)
        return [Batch(*part) for part in parts]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.document_ids.to(device))


class Loader:
    """Draws batches of `batch_size` rows; every epoch goes through all rows once, in an order of its own.

    With `world_size` processes, each gets its contiguous `batch_size / world_size` rows of the same global batch.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Raises TaelError when there are no rows, or the batch cannot be shared evenly."""
        if not len(rows):
            raise TaelError("no rows to train on: the packed data is empty")
        if batch_size < 1 or batch_size % world_size:
            raise TaelError(f"batch_size {batch_size} is no multiple of the {world_size} processes")
        if not 0 <= rank < world_size:
            raise TaelError(f"rank {rank} is not among {world_size} processes")
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self._share = batch_size // world_size
        self._offset = rank * self._share
        self._orders: dict[int, NDArray[np.int64]] = {}

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Permutation of the rows in `epoch`; the last two are kept, as a batch may touch both."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return self._orders[epoch]

    def row_indices(self, step: int) -> list[int]:
        """Which rows this process reads in `step`, counted from 0; an epoch may end inside a batch."""
        start = step * self.batch_size + self._offset
        places = (divmod(at, len(self.rows)) for at in range(start, start + self._share))
        return [int(self._order(epoch)[at]) for epoch, at in places]

    def batch(self, step: int) -> Batch:
        """The batch of `step` (this process's share): [batch_size / world_size, T]."""
        indices = self.row_indices(step)
        tokens = torch.from_numpy(self.rows.tokens[indices].astype(np.int64))  # [B, T+1]
        document_ids = torch.from_numpy(self.rows.document_ids[indices].astype(np.int64))
        learned = torch.from_numpy(self.rows.loss_mask[indices][:, 1:].copy())
        learned &= document_ids[:, 1:] == document_ids[:, :-1]
        targets = tokens[:, 1:].masked_fill(~learned, IGNORED)
        return Batch(tokens[:, :-1], targets, document_ids[:, :-1])
