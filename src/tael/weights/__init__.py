"""Models as folders and GGUF files, in and out; where to find them, and named checkpoints to pull."""

from tael.weights.catalogue import CHECKPOINTS, Checkpoint, HubOrigin, PackageOrigin
from tael.weights.gguf import load_gguf
from tael.weights.gguf_write import GGUF_TYPES, GGUFType, save_gguf
from tael.weights.huggingface import load_model, save_model, to_hugging_face
from tael.weights.store import available, is_gguf, is_pulled, location, pull, resolve

__all__ = [
    "CHECKPOINTS",
    "GGUF_TYPES",
    "Checkpoint",
    "GGUFType",
    "HubOrigin",
    "PackageOrigin",
    "available",
    "is_gguf",
    "is_pulled",
    "load_gguf",
    "load_model",
    "location",
    "pull",
    "resolve",
    "save_gguf",
    "save_model",
    "to_hugging_face",
]
