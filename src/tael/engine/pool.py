"""The cache of an engine and who runs on it, and how large it is made."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import psutil
import torch

from tael.engine.blocks import BlockManager
from tael.engine.runner import Runner, make_runner, picks_native, wants_mtp
from tael.engine.scheduler import Scheduler
from tael.engine.settings import EngineSettings
from tael.errors import TaelError
from tael.model.transformer import Transformer
from tael.weights.quantize import is_quantized

SHARE = 0.5
"""Of the free memory, what a cache whose size nobody has set may take."""


@dataclass(frozen=True)
class Pool:
    """A runner with its cache, the bookkeeping of its blocks, and the scheduler of those who use them."""

    runner: Runner
    blocks: BlockManager
    scheduler: Scheduler

    def discard(self, table: List[int]) -> None:
        """Make sure that nobody meets what a failed sequence left in its blocks."""
        self.blocks.retract(table)
        erase = getattr(self.runner, "erase", None)  # a runner that reads no further than it has written needs none
        own = [block for block in table if self.blocks.uses(block) == 1]
        if erase is not None and own:
            erase(own)


def make_pool(model: Transformer, settings: EngineSettings, blocks: int, before: Pool | None = None) -> Pool:
    """A pool of `blocks` blocks; it goes on counting where the one `before` it stopped."""
    manager = BlockManager(blocks, settings.block_size)
    scheduler = Scheduler(manager, settings.max_batch, settings.token_budget, settings.prefix_cache)
    if before is not None:
        scheduler.preemptions = before.scheduler.preemptions
    return Pool(make_runner(model, settings, blocks), manager, scheduler)


def set_size(model: Transformer, settings: EngineSettings) -> int:
    """Blocks of the cache that the settings name; raises TaelError for one larger than the free memory."""
    size, block_bytes, free = (
        settings.block_size,
        settings.block_size * bytes_a_slot(model, settings),
        free_memory(model),
    )
    if settings.cache_tokens is not None:
        blocks = settings.cache_tokens // size + 1  # the reserved one comes on top of what was asked for
    else:
        blocks = (settings.cache_bytes or 0) // block_bytes
    if blocks < 2:
        raise TaelError(f"engine: cache_bytes {settings.cache_bytes} is less than two blocks of {block_bytes} bytes")
    if blocks * block_bytes > free:
        raise TaelError(
            f"engine: a cache of {blocks * size:,} tokens takes {_gigabytes(blocks * block_bytes)}, but "
            f"{_gigabytes(free)} are free; lower cache_tokens or max_batch"
        )
    return blocks


def fitting_size(model: Transformer, settings: EngineSettings, needed: int, wished: List[int]) -> int:
    """Blocks of a cache whose size nobody has set: for sequences of `wished` slots, of which max_batch run at a time,
    within SHARE of the free memory; for one of `needed` slots in any case, or TaelError where that does not fit."""
    size, block_bytes, free = (
        settings.block_size,
        settings.block_size * bytes_a_slot(model, settings),
        free_memory(model),
    )
    each = sorted((-(-n // size) for n in wished), reverse=True)[: settings.max_batch]
    least = -(-needed // size) + 1
    if least * block_bytes > free:
        raise TaelError(
            f"engine: a request of {needed:,} tokens takes {_gigabytes(least * block_bytes)} of cache, but "
            f"{_gigabytes(free)} are free; shorten the prompt or lower max_tokens"
        )
    # A block a sequence more than they need: admission keeps one for each that runs.
    return max(least, min(sum(each) + len(each) + 1, int(free * SHARE) // block_bytes))


def bytes_a_slot(model: Transformer, settings: EngineSettings) -> int:
    """Bytes of cache a token takes over all layers, MTP's included where they draft."""
    config = model.config
    layers = config.num_hidden_layers + (len(model.mtp) if wants_mtp(model, settings) else 0)
    native = picks_native(model, settings)  # its entries are fp16 for a quantised model, else fp32
    size = (
        (2 if is_quantized(model) else 4) if native else torch.empty(0, dtype=model.norm.weight.dtype).element_size()
    )
    return layers * config.cache_values_per_token() * size


def free_memory(model: Transformer) -> int:
    """Bytes that are free on the model's device."""
    device = model.norm.weight.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
