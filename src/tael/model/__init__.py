"""The model: config -> layers -> block -> transformer."""

from tael.model.config import ModelConfig
from tael.model.init import build_model
from tael.model.transformer import Features, Transformer

__all__ = ["Features", "ModelConfig", "Transformer", "build_model"]
