"""Does SmolLM2-135M say the same in Tael as in llama.cpp? Twenty prompts, F16 weights, greedy.

    python bench/greedy_vs_llama_cpp.py     about two minutes; needs llama-cpp-python

The packaged weights are dequantised and written as an F16 GGUF, which both read. Where the two continuations part,
the gap between llama.cpp's best two logits at that step is told: under 0.01 either choice is rounding (llama.cpp
keeps keys and values, and multiplies, in fp16; Tael in fp32).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import machine, print_table, write_results
from peers import Peer

import tael
from tael.data import Message, encode_chat
from tael.engine import Engine, SamplingParams
from tael.weights import load_gguf, resolve, save_gguf

TOKENS = 48
CLOSE = 0.01
PLAIN = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three laws of thermodynamics say that",
    "Dear Sir or Madam,",
    "1, 2, 4, 8, 16,",
    "The quick brown fox",
    "In 1969, the first humans",
    "A recipe for pancakes: take",
)
ASKED = (
    "What is the capital of Italy?",
    "Explain gravity to a child.",
    "Write a haiku about autumn.",
    "Name three primary colours.",
    "How many legs does a spider have?",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Who wrote Romeo and Juliet?",
    "Give me a tip for sleeping better.",
    "Why is the sky blue?",
)


def main() -> None:
    described = machine()
    source = resolve("smollm2-135m")
    tokenizer = tael.load_tokenizer(source)
    prompts = [[*tokenizer.start_ids, *tokenizer.encode(text)] for text in PLAIN]
    prompts += [encode_chat(tokenizer, [Message("user", text)], "free") for text in ASKED]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f16.gguf")
        save_gguf(load_gguf(source), path, tokenizer, "f16")
        engine = Engine(load_gguf(path), tokenizer, backend="native")
        ours = engine.generate(prompts, SamplingParams(TOKENS, 0.0))
        with Peer("llama_cpp", model=str(path)) as peer:
            theirs = [peer.do("greedy", ids=ids, tokens=TOKENS) for ids in prompts]
            version = peer.described["version"]
    rows: list[list[Any]] = []
    for text, mine, other in zip((*PLAIN, *ASKED), ours, theirs, strict=True):
        agreed = next(
            (i for i, (a, b) in enumerate(zip(mine.tokens, other["tokens"], strict=True)) if a != b), TOKENS
        )
        gap = "" if agreed == TOKENS else f"{other['gaps'][agreed]:.4f}"
        rows.append([text[:44], f"{agreed} of {TOKENS}", gap])
    whole = sum(row[2] == "" for row in rows)
    unexplained = sum(row[2] != "" and float(row[2]) >= CLOSE for row in rows)
    columns = ["prompt", "equal tokens", "gap where they part"]
    notes = [
        f"{whole} of {len(rows)} continuations are equal throughout, {len(rows) - whole - unexplained} part where "
        f"llama.cpp's best two logits are within {CLOSE}, {unexplained} part elsewhere. {version}."
    ]
    title = "SmolLM2-135M in F16: greedy continuations equal to llama.cpp's"
    print_table(title, columns, rows)
    print("\n".join(notes))
    table = {"columns": columns, "rows": rows, "notes": notes}
    content = {"title": title, "command": "python bench/greedy_vs_llama_cpp.py", "machine": described}
    write_results("greedy_vs_llama_cpp", content | {"tables": [table]})


if __name__ == "__main__":
    main()
