"""Tael in a process of its own, as a child of bench/peers.py: where its memory is to be told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peers import prompt_tokens, serve

from tael.cost.measure import peak_memory_bytes
from tael.engine import Engine as TaelEngine
from tael.engine import SamplingParams
from tael.engine.native import load_operator
from tael.weights.gguf import load_gguf


class Engine:
    def setup(self, model: str, threads: int = 2, context: int = 2048) -> dict[str, Any]:
        torch.set_num_threads(threads)
        self.threads = threads
        loaded = load_gguf(Path(model), keep_quantised=True)
        self.engine = TaelEngine(
            loaded, backend="native", release=True, cache_tokens=context, prefix_cache="off", max_batch=32
        )
        self.vocabulary = loaded.config.vocab_size
        return {"version": "tael", "peak_bytes": peak_memory_bytes()}

    def prefill(self, tokens: int, seed: int = 0) -> dict[str, Any]:
        """Seconds from the prompt to the first token."""
        prompt = prompt_tokens(tokens, seed, self.vocabulary)
        began = time.perf_counter()
        self.engine.generate([prompt], SamplingParams(1, 0.0))
        return {"seconds": time.perf_counter() - began}

    def decode(self, prompt: int, tokens: int, seed: int = 0) -> dict[str, Any]:
        """Seconds of `tokens` greedy steps after a prompt."""
        ids, began = prompt_tokens(prompt, seed, self.vocabulary), 0.0
        for i, _ in enumerate(self.engine.stream(ids, SamplingParams(tokens + 1, 0.0))):
            began = time.perf_counter() if i == 0 else began
        return {"seconds": time.perf_counter() - began, "peak_bytes": peak_memory_bytes()}

    def read(self) -> dict[str, Any]:
        """GB/s of a plain read on all threads."""
        return {"gb_s": load_operator().read_bandwidth(self.threads)}


if __name__ == "__main__":
    engine = Engine()
    serve({name: getattr(engine, name) for name in ("setup", "prefill", "decode", "read")})
