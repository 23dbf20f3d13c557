"""Runners: what carries out a forward pass. A runner owns the cache's tensors and knows nothing of requests.

`TorchRunner` is the Transformer itself, on any device and in any precision, over a `PagedCache`. It lays the batch's
sequences into right-padded groups [B, T]; a group is of one attention form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tael.engine.batch import StepBatch
from tael.engine.cache import LayerView, PagedCache, Window
from tael.engine.settings import EngineSettings
from tael.errors import TaelError
from tael.model.config import ModelConfig
from tael.model.transformer import Transformer
from tael.weights.quantize import is_quantized

PASS_OVERHEAD = 4e6
"""What a forward pass costs beside reading the weights, in values read: about a millisecond of calls."""
TOKENS_A_PASS = 16
"""Tokens whose arithmetic takes as long as reading the weights once, on a CPU; only grouping depends on it."""


class Runner(Protocol):
    """Forward passes over a paged cache of `num_blocks` x `block_size` slots."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...

    def forward(self, batch: StepBatch) -> Tensor:
        """Read the batch's tokens, write their entries; hidden [N, D], normalised, ready for the head."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] -> [n, V] fp32."""
        ...

    def draft(self, depth: int, batch: StepBatch, hidden: Tensor) -> Tensor:
        """MTP module `depth` (1, 2, ..; the last where there are fewer) over `batch`; hidden [N, D] -> [N, D].

        Token i of the batch follows the state hidden[i]; its entry goes to its own position's slot of that module.
        Slots before the module's depth have no entry and are never seen.
        """
        ...


class TorchRunner:
    """The Transformer over a paged cache. `mtp`: keep cache layers for the MTP modules too."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        cache_dtype: torch.dtype | None = None,
        mtp: bool = True,
    ) -> None:
        self.model, self.num_blocks, self.block_size = model, num_blocks, block_size
        self.config = model.config
        weight = model.norm.weight
        self._device = weight.device
        self._modules = len(model.mtp) if mtp else 0
        layers = self.config.num_hidden_layers + self._modules
        self.cache = PagedCache(
            layers,
            num_blocks,
            block_size,
            self.config.cache_values_per_token(),
            cache_dtype or weight.dtype,
            self._device,
        )
        self._pass_cost = self.config.parameters(active=True, embedding=False, mtp=False) + PASS_OVERHEAD

    @property
    def cache_bytes(self) -> int:
        return self.cache.bytes

    @torch.no_grad()
    def forward(self, batch: StepBatch) -> Tensor:
        """As the protocol says; hidden is in the model's precision, on its device."""
        layers = self.config.num_hidden_layers

        def run(tokens: Tensor, positions: Tensor, window: Window, index: Tensor | None) -> Tensor:
            views = self.cache.views(window, 0, layers)
            return self.model.features(tokens, None, views, positions).hidden

        return self._in_groups(batch, run, 0)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden).float()

    def erase(self, blocks: list[int]) -> None:
        """Zero blocks that may hold what is no number."""
        self.cache.erase(blocks)

    @torch.no_grad()
    def draft(self, depth: int, batch: StepBatch, hidden: Tensor) -> Tensor:
        module = min(depth, self._modules)
        layer = self.config.num_hidden_layers + module - 1

        def run(tokens: Tensor, positions: Tensor, window: Window, index: Tensor | None) -> Tensor:
            state = hidden.view(*tokens.shape, -1) if index is None else hidden[index]
            view: LayerView = self.cache.views(window, layer, 1)[0]
            return self.model.mtp_step(module, state, tokens, positions, cache=view).hidden

        return self._in_groups(batch, run, module)

    def _in_groups(
        self, batch: StepBatch, run: Callable[[Tensor, Tensor, Window, Tensor | None], Tensor], first_key: int
    ) -> Tensor:
        """Call `run` on every group: tokens and positions [B, T], their window, and where their tokens lie in the
        batch [B, T] (None: all, in order); put what it returns together again, [N, D]."""
        groups = self._groups(batch, first_key)
        out: Tensor | None = None
        for rows in groups:
            lengths = batch.starts[1:] - batch.starts[:-1]
            if len(groups) > 1:
                lengths = lengths[rows]
            longest = int(lengths.max())
            starts = batch.starts[:-1] if len(groups) == 1 else batch.starts[rows]
            tables = batch.tables if len(groups) == 1 else batch.tables[rows]
            place = torch.arange(longest)
            positions = batch.positions[starts].unsqueeze(-1) + place  # [B, T], padding counts on
            absorbed = not bool(batch.expanded[rows[0]])
            window = Window.make(positions, lengths, tables, self.cache, self._device, absorbed, first_key)
            whole = len(groups) == 1 and len(batch.tokens) == len(rows) * longest
            real = place < lengths.unsqueeze(-1)  # [B, T]
            index = (starts.unsqueeze(-1) + place).where(real, starts.unsqueeze(-1))
            tokens = batch.tokens[index].to(self._device)
            found = run(tokens, positions.to(self._device), window, None if whole else index.to(self._device))
            if whole:
                return found.flatten(0, 1)
            if out is None:
                out = found.new_empty(len(batch.tokens), found.shape[-1])
            out[index[real].to(self._device)] = found[real.to(self._device)]
        assert out is not None
        return out

    def _groups(self, batch: StepBatch, first_key: int) -> list[list[int]]:
        """Rows that are run together: of one form, all fresh or none, split where padding costs more than a pass.

        Sorted by new tokens and context, a group ends where all that come after would save more than one more
        reading of the weights by not being padded to its size.
        """
        firsts = batch.positions[batch.starts[:-1]].tolist()
        starts = batch.starts.tolist()
        kinds: dict[tuple[bool, bool], list[tuple[int, int, int]]] = {}
        for row, expanded in enumerate(batch.expanded.tolist()):
            length = starts[row + 1] - starts[row]
            kind = ((expanded or not self.config.is_mla), firsts[row] == first_key)
            kinds.setdefault(kind, []).append((length, firsts[row] + length, row))
        per_token = self._pass_cost / TOKENS_A_PASS
        per_slot = self.config.num_hidden_layers * self.config.cache_values_per_token()
        groups: list[list[int]] = []
        for members in kinds.values():
            members.sort(key=lambda m: (-m[0], -m[1], m[2]))
            longest, widest = 0, 0
            for i, (length, context, row) in enumerate(members):
                waste = (longest - length) * per_token + (widest - context) * per_slot
                if not i or waste * (len(members) - i) > self._pass_cost:
                    groups.append([])
                    longest, widest = length, context
                groups[-1].append(row)
                widest = max(widest, context)
        return [sorted(rows) for rows in groups]


def wants_mtp(model: Transformer, settings: EngineSettings) -> bool:
    """Whether the model's MTP modules draft."""
    return settings.speculate != "off" and settings.drafter in (None, "mtp") and len(model.mtp) > 0


def picks_native(model: Transformer, settings: EngineSettings) -> bool:
    """Whether the native runner is to be tried: where it is demanded, and by "auto" for quantised models on a CPU."""
    on_cpu = model.norm.weight.device.type == "cpu"
    return settings.backend == "native" or (settings.backend == "auto" and on_cpu and is_quantized(model))


def make_runner(model: Transformer, settings: EngineSettings, num_blocks: int) -> Runner:
    """The runner that `settings.backend` names.

    Raises TaelError, saying why, when the native runner is demanded and cannot be had; "auto" then takes torch.
    """
    mtp = wants_mtp(model, settings)
    if picks_native(model, settings):
        try:
            return _native(model, settings, num_blocks, mtp)
        except TaelError:
            if settings.backend == "native":
                raise
    return TorchRunner(model, num_blocks, settings.block_size, mtp=mtp)


def _native(model: Transformer, settings: EngineSettings, num_blocks: int, mtp: bool) -> Runner:
    from tael.engine.native import NativeRunner, obstacle  # builds the operator at first use

    lacking = obstacle() if model.norm.weight.device.type == "cpu" else "the model on a CPU"
    if lacking is not None:
        raise TaelError(f'backend "native": the C++ operator needs {lacking}; or use backend = "torch"')
    return NativeRunner(model, num_blocks, settings.block_size, mtp=mtp, release=settings.release)
