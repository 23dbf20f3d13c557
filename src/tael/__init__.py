"""Tael: a complete, small DeepSeek-style language-model system. See docs/architecture.md.

import tael
model = tael.load_model("runs/demo")            # model(tokens [B, T]) -> logits [B, T, V]
tokenizer = tael.load_tokenizer("runs/demo")
for event in tael.Engine(model, tokenizer).stream("Hello", max_tokens=64):
    print(event.text, end="")

Importing this package is cheap: torch comes in with the first name that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tael.data import Tokenizer
    from tael.engine import Engine as Engine
    from tael.model import Transformer

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "load_model", "load_tokenizer"]


def load_model(
    name_or_path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, keep_quantised: bool = False
) -> Transformer:
    """The model of a folder, a .gguf file, a run or a checkpoint, on `device` with parameters in `dtype` (fp32).

    `keep_quantised` leaves a .gguf file's 4 and 8-bit weights as they are; without it they become `dtype`. Raises
    TaelError when there is no such model, it is damaged, or the device is not there.
    """
    import torch

    from tael import weights
    from tael.train import choose_device

    place, where = weights.resolve(name_or_path), choose_device(device)
    if weights.is_gguf(place):
        return weights.load_gguf(place, dtype or torch.float32, where, keep_quantised)
    return weights.load_model(place, where, dtype or torch.float32)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a model, named as for `load_model`; also a tokenizer.json or its folder.

    Raises TaelError when there is none, or it is damaged.
    """
    from tael import data, weights

    path = Path(name_or_path)
    alone = path.suffix == ".json" or (path / "tokenizer.json").is_file()
    place = path if alone else weights.resolve(name_or_path)
    return data.load_gguf_tokenizer(place) if weights.is_gguf(place) else data.load_tokenizer(place)


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from tael.engine import Engine

        return Engine
    raise AttributeError(f"module 'tael' has no attribute '{name}'")
