"""Training: one loop (`Trainer`) for every stage; see docs/architecture.md."""

from tael.train.objective import LanguageModelling, Loss
from tael.train.parallel import Parallel, choose_device
from tael.train.trainer import LoaderSource, StageResult, Stopped, Trainer, TrainerSetup

__all__ = [
    "LanguageModelling",
    "LoaderSource",
    "Loss",
    "Parallel",
    "StageResult",
    "Stopped",
    "Trainer",
    "TrainerSetup",
    "choose_device",
]
