"""Models as folders and GGUF files, in and out; where to find them, and named checkpoints to pull."""

from tael.weights.catalogue import CHECKPOINTS, Checkpoint, HubOrigin, PackageOrigin
from tael.weights.gguf import load_gguf
from tael.weights.gguf_write import GGUF_TYPES, GGUFType, save_gguf
from tael.weights.huggingface import load_model, save_model, to_hugging_face
from tael.weights.mapped import load_mapped
from tael.weights.quantize import QuantizationReport, quantize_model
from tael.weights.store import available, is_gguf, is_pulled, location, pull, resolve
from tael.weights.streamed import load_quantized

__all__ = [
    "CHECKPOINTS",
    "GGUF_TYPES",
    "Checkpoint",
    "GGUFType",
    "HubOrigin",
    "PackageOrigin",
    "QuantizationReport",
    "available",
    "is_gguf",
    "is_pulled",
    "load_gguf",
    "load_mapped",
    "load_model",
    "load_quantized",
    "location",
    "pull",
    "quantize_model",
    "resolve",
    "save_gguf",
    "save_model",
    "to_hugging_face",
]
