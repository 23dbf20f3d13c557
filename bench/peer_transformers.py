"""transformers' own generation loop over its own cache, as a child of bench/peers.py."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from peers import prompt_tokens, serve


class Engine:
    def setup(
        self, model: str, threads: int = 2, dtype: str = "bfloat16", attention: str | None = None
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        extra = {"attn_implementation": attention} if attention else {}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **extra)
        self.model.eval()
        return {"version": f"transformers {transformers.__version__}"}

    @torch.inference_mode()
    def prefill(self, tokens: int, seed: int = 0) -> dict[str, Any]:
        ids = torch.tensor([prompt_tokens(tokens, seed, self.model.config.vocab_size)])
        began = time.perf_counter()
        out = self.model(ids, logits_to_keep=1)
        out.logits[0, -1].argmax().item()
        return {"seconds": time.perf_counter() - began}

    @torch.inference_mode()
    def decode(self, prompt: int, tokens: int, seed: int = 0) -> dict[str, Any]:
        """Seconds of `tokens` greedy steps after a prompt."""
        ids = torch.tensor([prompt_tokens(prompt, seed, self.model.config.vocab_size)])
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        return {"seconds": self._steps(out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True), tokens)}

    def _steps(self, cache: Any, token: torch.Tensor, tokens: int) -> float:
        began = time.perf_counter()
        for _ in range(tokens):
            out = self.model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
        return time.perf_counter() - began

    @torch.inference_mode()
    def step(self, context: int, steps: int) -> dict[str, Any]:
        """Seconds of decode steps over a cache of `context` tokens of noise, shaped as the model itself fills it."""
        token = torch.tensor([[1]])
        made = self.model(token, use_cache=True).past_key_values
        cache = transformers.DynamicCache(config=self.model.config)
        for index, layer in enumerate(made.layers):
            keys, values = (torch.randn(1, t.shape[1], context, t.shape[3], dtype=t.dtype)
                            for t in (layer.keys, layer.values))  # fmt: skip
            cache.update(keys, values, index)
        self._steps(cache, token, 1)
        return {"seconds": self._steps(cache, token, steps)}


if __name__ == "__main__":
    engine = Engine()
    serve({name: getattr(engine, name) for name in ("setup", "prefill", "decode", "step")})
