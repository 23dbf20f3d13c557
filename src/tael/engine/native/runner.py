"""The C++ operator as a Runner: whole passes in one call, over a paged cache of fp32, fp16 or bf16 entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tael.engine.batch import StepBatch
from tael.engine.native.build import load_operator
from tael.engine.native.weights import native_weights
from tael.errors import TaelError
from tael.model.rope import make_rope
from tael.model.transformer import Transformer
from tael.weights.quantize import is_quantized


class NativeRunner:
    """See tael.engine.runner.Runner. Every row of a pass is computed by itself, in an order that is always the same:
    its numbers are equal bit for bit whatever else is in the batch.

    cache_dtype None means fp16 for a quantised model and fp32 for any other. `release` gives up a quantised model's
    own codes once they are packed, see `native_weights`. Raises TaelError when the operator cannot be built here or
    the model's shape is not for it.
    """

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        cache_dtype: torch.dtype | None = None,
        mtp: bool = True,
        threads: int | None = None,
        notify: Callable[[str], None] | None = None,
        release: bool = False,
    ) -> None:
        if block_size & (block_size - 1):
            raise TaelError(f"the C++ operator needs a block_size that is a power of two, not {block_size}")
        self.config, self.num_blocks, self.block_size = model.config, num_blocks, block_size
        mtp = mtp or release  # another engine over this model may draft, and then there are no codes left to pack
        held = native_weights(model, load_operator(notify), threads or torch.get_num_threads(), mtp, release)
        self._operator, self.model_bytes, self.step_bytes = held.operator, held.model_bytes, held.step_bytes
        self._modules = len(model.mtp) if mtp else 0
        dtype = cache_dtype or (torch.float16 if is_quantized(model) else torch.float32)
        layers = self.config.num_hidden_layers + self._modules
        width = self.config.cache_values_per_token()
        self.cache = torch.zeros(layers, num_blocks, block_size, width, dtype=dtype)
        context = min(num_blocks * block_size, self.config.max_position_embeddings)
        rope = make_rope(self.config, torch.arange(context))
        self._rope = rope.cos[0].contiguous(), rope.sin[0].contiguous()

    @property
    def cache_bytes(self) -> int:
        return self.cache.nbytes

    def forward(self, batch: StepBatch) -> Tensor:
        self._attach()
        return self._operator.forward(batch.tokens, batch.positions, batch.starts, batch.tables, batch.expanded)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._operator.logits(hidden.contiguous())

    def draft(self, depth: int, batch: StepBatch, hidden: Tensor) -> Tensor:
        self._attach()
        module = min(depth, self._modules) - 1
        parts = (batch.tokens, batch.positions, batch.starts, batch.tables, batch.expanded)
        return self._operator.draft(module, *parts, hidden.contiguous())

    def _attach(self) -> None:
        """One operator serves all runners of a model; each brings its own cache."""
        self._operator.set_cache(self.cache)
        self._operator.set_rope(*self._rope)
