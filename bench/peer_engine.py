"""The engine alone under the same load as the server, in a process of its own (see bench/peers.py)."""

from __future__ import annotations

import random
import time
from typing import Any

from peers import serve

from tael.data import Message, encode_chat
from tael.engine import Engine, SamplingParams
from tael.loading import Loaded, load

_held: list[tuple[Loaded, Engine]] = []


def setup(model: str) -> dict[str, Any]:
    """The engine stays from round to round, as the server's does, its prefix cache with it."""
    loaded = load(model)
    _held.append((loaded, loaded.engine(8192, 4)))
    return {"model": loaded.greeting}


def questions(prompts: list[str], tokens: int, clients: int, seconds: float) -> dict[str, Any]:
    """`clients` sequences at any time; when one ends, the next begins."""
    loaded, engine = _held[0]
    tokenizer = loaded.tokenizer
    ids = [encode_chat(tokenizer, [Message("user", prompt)], "direct") for prompt in prompts]
    params = SamplingParams(tokens, 0.0, stop_ids=tokenizer.stop_ids, loop_guard=True)
    chance, generated, running = random.Random(0), 0, 0
    cpu, began = time.process_time(), time.perf_counter()
    while (comes := time.perf_counter() - began < seconds) or running:
        while comes and running < clients:
            engine.submit(chance.choice(ids), params)
            running += 1
        for event in engine.step():
            generated += event.token >= 0
            running -= event.finish_reason is not None
    return {"tokens": generated, "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


if __name__ == "__main__":
    serve({"setup": setup, "questions": questions})
