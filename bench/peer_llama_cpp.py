"""llama.cpp through its C interface, as a child of bench/peers.py; it uses the library as its own server does."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from peers import prompt_tokens, serve


class Engine:
    """A model and one context, single sequences or several at a time."""

    def setup(
        self, model: str, threads: int = 2, context: int = 4096, sequences: int = 1, unified: bool = True
    ) -> dict[str, Any]:
        lib.llama_log_set(_SILENT, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 2048, 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max, params.kv_unified = sequences, unified
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory = lib.llama_get_memory(self.context)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(2048, 0, 1)
        return {"version": _version(), "bytes": Path(model).stat().st_size}

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, wants logits)."""
        for start in range(0, len(rows), 2048):
            part = rows[start : start + 2048]
            self.batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, position
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
                self.batch.logits[i] = wanted
            if lib.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")

    def _argmax(self, row: int) -> int:
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, row), shape=(self.vocabulary,))
        return int(logits.argmax())

    def prefill(self, tokens: int, seed: int = 0) -> dict[str, Any]:
        """Seconds from the prompt to the first token."""
        prompt = prompt_tokens(tokens, seed)
        lib.llama_memory_clear(self.memory, True)
        began = time.perf_counter()
        self._decode([(t, i, 0, i == tokens - 1) for i, t in enumerate(prompt)])
        self._argmax(tokens - 1)
        return {"seconds": time.perf_counter() - began}

    def decode(self, prompt: int, tokens: int, seed: int = 0) -> dict[str, Any]:
        """Seconds of `tokens` greedy steps after a prompt (or its ids)."""
        ids = prompt_tokens(prompt, seed)
        lib.llama_memory_clear(self.memory, True)
        self._decode([(t, i, 0, i == prompt - 1) for i, t in enumerate(ids)])
        token = self._argmax(prompt - 1)
        began = time.perf_counter()
        for position in range(prompt, prompt + tokens):
            self._decode([(token, position, 0, True)])
            token = self._argmax(0)
        return {"seconds": time.perf_counter() - began}

    def greedy(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """The greedy continuation of `ids` and the gap between the best two logits at every step."""
        lib.llama_memory_clear(self.memory, True)
        self._decode([(t, i, 0, i == len(ids) - 1) for i, t in enumerate(ids)])
        row, found, gaps = len(ids) - 1, [], []
        for position in range(len(ids), len(ids) + tokens):
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, row), shape=(self.vocabulary,))
            best = np.argpartition(logits, -2)[-2:]
            best = best[np.argsort(logits[best])]
            gaps.append(float(logits[best[1]] - logits[best[0]]))
            found.append(int(best[1]))
            self._decode([(found[-1], position, 0, True)])
            row = 0
        return {"tokens": found, "gaps": gaps}

    def clients(self, prefix: int, own: int, tokens: int, clients: int, share: bool) -> dict[str, Any]:
        """`clients` prompts of a common prefix and words of their own, all answered with `tokens` tokens at a time.

        share: the prefix is read once and its cache handed to every sequence (llama_memory_seq_cp), the most the
        library can do; else every slot reads its own prompt, as the server's slots do at first.
        """
        lib.llama_memory_clear(self.memory, True)
        common = prompt_tokens(prefix, 0)
        began = time.perf_counter()
        if share:
            self._decode([(t, i, 0, False) for i, t in enumerate(common)])
            for sequence in range(1, clients):
                lib.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        rows = []
        for sequence in range(clients):
            mine = ([] if share else common) + prompt_tokens(own, 1 + sequence)
            first = prefix if share else 0
            rows += [(t, first + i, sequence, i == len(mine) - 1) for i, t in enumerate(mine)]
        last = {}
        for start in range(0, len(rows), 2048):
            part = rows[start : start + 2048]
            self._decode(part)
            last |= {row[2]: self._argmax(i) for i, row in enumerate(part) if row[3]}
        for step in range(tokens - 1):
            self._decode([(last[s], prefix + own + step, s, True) for s in range(clients)])
            last = {s: self._argmax(s) for s in range(clients)}
        return {"seconds": time.perf_counter() - began}


@lib.llama_log_callback
def _SILENT(level: int, text: bytes, data: Any) -> None:
    pass


def _version() -> str:
    from importlib.metadata import version

    return f"llama-cpp-python {version('llama-cpp-python')}"


if __name__ == "__main__":
    engine = Engine()
    serve({name: getattr(engine, name) for name in ("setup", "prefill", "decode", "greedy", "clients")})
