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


def load_model(name_or_path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The model of a model folder, a run directory or a run's name, on `device` with parameters in `dtype` (fp32).

    Raises TaelError when there is no such model, it is damaged, or the device is not there.
    """
    import torch

    from tael import weights
    from tael.train import choose_device

    return weights.load_model(weights.resolve(name_or_path), choose_device(device), dtype or torch.float32)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, a run directory or a run's name; also a tokenizer.json or its folder.

    Raises TaelError when there is none, or it is damaged.
    """
    from tael import data, weights

    path = Path(name_or_path)
    alone = path.is_file() or (path / "tokenizer.json").is_file()
    return data.load_tokenizer(path if alone else weights.resolve(name_or_path))


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from tael.engine import Engine

        return Engine
    raise AttributeError(f"module 'tael' has no attribute '{name}'")
