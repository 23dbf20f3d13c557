"""Models as folders: Hugging Face layout in and out, and where to find them."""

from tael.weights.huggingface import load_model, save_model, to_hugging_face
from tael.weights.store import available, resolve

__all__ = ["available", "load_model", "resolve", "save_model", "to_hugging_face"]
