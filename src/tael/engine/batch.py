"""One forward pass over the new tokens of several sequences, laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """N new tokens of M sequences; all tensors on the CPU.

    tokens [N] int64; positions [N] int64: a token's place in its sequence, which is also its cache slot;
    starts [M + 1] int64: sequence m's tokens are starts[m]:starts[m + 1], at consecutive positions;
    tables [M, W] int64: block numbers, 0 beyond a sequence's end; expanded [M] bool: MLA in MHA form (prompt tokens)
    or in the absorbed form (generated tokens).
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    tables: Tensor
    expanded: Tensor

    @classmethod
    def build(cls, parts: Sequence[tuple[Sequence[int], int, Sequence[int], bool]]) -> StepBatch:
        """From one (tokens, position of the first, block table, expanded) a sequence."""
        lengths = torch.tensor([len(tokens) for tokens, _, _, _ in parts])
        starts = torch.zeros(len(parts) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=starts[1:])
        offsets = torch.tensor([first for _, first, _, _ in parts]) - starts[:-1]
        total = int(starts[-1])
        positions = torch.arange(total) + offsets.repeat_interleave(lengths, output_size=total)
        width = max(len(table) for _, _, table, _ in parts)
        return cls(
            torch.tensor([token for tokens, _, _, _ in parts for token in tokens]),
            positions,
            starts,
            torch.tensor([[*table, *[0] * (width - len(table))] for _, _, table, _ in parts]),
            torch.tensor([expanded for _, _, _, expanded in parts]),
        )

    @property
    def last(self) -> Tensor:
        """Row of each sequence's last token, [M]."""
        return self.starts[1:] - 1
