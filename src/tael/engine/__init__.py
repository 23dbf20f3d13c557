"""The inference engine: paged latent cache, continuous batching, sampling, speculation."""

from tael.engine.engine import Engine
from tael.engine.params import SamplingParams
from tael.engine.sequence import Completion, EngineStats, Sequence, TokenEvent
from tael.engine.settings import EngineSettings

__all__ = ["Completion", "Engine", "EngineSettings", "EngineStats", "SamplingParams", "Sequence", "TokenEvent"]
