"""All initialisation in one place.

| parameter                                   | value                                                   |
|---------------------------------------------|---------------------------------------------------------|
| norm gains                                  | 1                                                       |
| biases, selection bias                      | 0                                                       |
| residual outputs (o_proj, down_proj)        | 0 when `zero_residual` (the block starts as identity)   |
| the same inside MTP blocks, and eh_proj     | normal: a zero MTP projection would never learn         |
| embedding, head, router, every other matrix | normal, std = initializer_range                         |

Drawn on CPU in fp32 in the order of `named_parameters`, so that one seed gives one model on every device.
"""

from __future__ import annotations

import torch

from tael.model.config import ModelConfig
from tael.model.transformer import Transformer


def initialise(model: Transformer, generator: torch.Generator, *, zero_residual: bool = True) -> None:
    """Set every parameter and buffer of `model` in place, by the table above."""
    std = model.config.initializer_range
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.endswith("bias") or (
                zero_residual and not name.startswith("mtp.") and ("o_proj" in name or "down_proj" in name)
            ):
                parameter.zero_()
            else:
                value = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(value.normal_(0.0, std, generator=generator))
        for buffer in model.buffers():
            buffer.zero_()


def build_model(config: ModelConfig, seed: int = 0, *, zero_residual: bool = True) -> Transformer:
    """A fresh fp32 model on CPU; the same seed gives the same bits."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    initialise(model, torch.Generator().manual_seed(seed), zero_residual=zero_residual)
    return model
