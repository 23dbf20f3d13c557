"""The inference engine: latent cache, sampling, generation."""

from tael.engine.engine import Completion, Engine, TokenEvent
from tael.engine.sampling import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams", "TokenEvent"]
