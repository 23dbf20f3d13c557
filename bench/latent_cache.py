"""What the latent cache buys: a decode step at 512, 2K and 8K tokens of context, Tael against transformers.

    python bench/latent_cache.py            about five minutes on two idle cores
    python bench/latent_cache.py --quick

A model of DeepSeek-V2-Lite's widths and three layers (one dense, two with experts; 8 experts in place of 64, of which
6 are taken as in the original, so that it is built quickly). Tael keeps R + P = 576 values a token and layer and
attends in the absorbed form; transformers keeps every head's key and value, H (N + P + V) = 5,120. Both start from
caches filled with noise. fp32 on both sides is the same weights; int4 with an fp16 cache is how a user would run it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table, ratios, spread, write_results
from peers import SETTLE_SECONDS, Peer

from tael.engine.batch import StepBatch
from tael.engine.native import NativeRunner
from tael.model import ModelConfig, Transformer, build_model
from tael.weights.huggingface import save_model
from tael.weights.quantize import quantize_model

SHAPE = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=4096,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=3,
    num_attention_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    max_position_embeddings=16384,
)
CONTEXTS = (16, 512, 2048, 8192)
STEPS = 5
BLOCK = 16


class Tael:
    """The native runner over a cache of noise."""

    def __init__(self, model: Transformer) -> None:
        self.runner = NativeRunner(model, CONTEXTS[-1] // BLOCK + 8, BLOCK)
        self.runner.cache.normal_()
        self.table = list(range(1, CONTEXTS[-1] // BLOCK + 4))

    def step(self, context: int) -> float:
        """Mean seconds of a few decode steps after `context` tokens."""
        time.sleep(SETTLE_SECONDS)
        began = time.perf_counter()
        for i in range(STEPS):
            batch = StepBatch.build([([i], context + i, self.table, False)])
            self.runner.logits(self.runner.forward(batch)).argmax(-1).item()
        return (time.perf_counter() - began) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, and nothing is written")
    rounds = 2 if parser.parse_args().quick else 9
    described = machine()
    torch.set_num_threads(2)
    model = build_model(SHAPE, seed=0, zero_residual=False)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder, "model"), None, torch.float32)
        peer = Peer("transformers", model=str(Path(folder, "model")), dtype="float32")
        ours = {"Tael fp32": Tael(model)}
        quantised = build_model(SHAPE, seed=0, zero_residual=False)
        quantize_model(quantised, "int4")
        ours["Tael int4"] = Tael(quantised)
        names = [*ours, "transformers fp32"]
        seconds = {(name, context): [] for name in names for context in CONTEXTS}
        for index in range(-1, rounds):
            for context in CONTEXTS:
                found = {name: tael.step(context) for name, tael in ours.items()}
                found["transformers fp32"] = peer.do("step", context=context, steps=STEPS)["seconds"] / STEPS
                for name, value in found.items():
                    if index >= 0:
                        seconds[name, context].append(value)
        version = peer.described["version"]
        peer.__exit__()
    report(described, seconds, version, rounds)


def report(described: dict[str, Any], seconds: dict[tuple[str, int], list[float]], version: str, rounds: int) -> None:
    """Whole steps, and what the context alone costs: a step's seconds less those at 16 tokens."""
    theirs, rows = "transformers fp32", []
    for context in CONTEXTS:
        row: list[Any] = [f"{context:,}"]
        for name in ("Tael fp32", "Tael int4", theirs):
            row.append(f"{1e3 * spread(seconds[name, context])['median']:.1f}")
        for name in ("Tael fp32", "Tael int4"):
            ratio = ratios(seconds[theirs, context], seconds[name, context])
            row.append(f"{ratio['median']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f})")
        if context > CONTEXTS[0]:
            alone = {
                name: spread(seconds[name, context])["median"] - spread(seconds[name, CONTEXTS[0]])["median"]
                for name in ("Tael fp32", theirs)
            }
            row.append(f"{alone[theirs] / alone['Tael fp32']:.1f}x" if alone["Tael fp32"] > 0 else "")
        else:
            row.append("")
        rows.append(row)
    columns = ["context", "Tael fp32, ms", "Tael int4, ms", f"{theirs}, ms", "fp32 faster by", "int4 faster by"]
    columns.append("context's own cost, fp32")
    values, mha = SHAPE.cache_values_per_token(), SHAPE.mha_cache_bytes_per_token(4) // SHAPE.num_hidden_layers // 4
    notes = [
        f"Milliseconds a step of three layers and the head, medians of {rounds} interleaved rounds, quartiles in "
        f"brackets; {version}. The last column compares what a step costs above one at {CONTEXTS[0]} tokens.",
        f"Cache a token and layer: {values} values ({2 * values:,} bytes in fp16, {4 * values:,} in fp32) against "
        f"{mha:,} for every head's key and value ({4 * mha:,} bytes in fp32): {mha / values:.1f} times less.",
    ]
    title = "Absorbed decoding over the latent cache, V2-Lite widths, three layers, two threads"
    print_table(title, columns, rows)
    print("\n".join(notes))
    if rounds > 2:
        kept = {f"{name} {context}": values for (name, context), values in seconds.items()}
        table = {"columns": columns, "rows": rows, "notes": notes}
        content = {"title": title, "command": "python bench/latent_cache.py", "machine": described}
        write_results("latent_cache", content | {"tables": [table], "seconds": kept})


if __name__ == "__main__":
    main()
