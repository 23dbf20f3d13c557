"""SmolLM2-135M at 4 bits on two threads: Tael against llama.cpp, and against transformers; round by round.

    pip install llama-cpp-python          builds llama.cpp for this processor (about five minutes)
    python bench/decode_vs_llama_cpp.py   about four minutes on two idle cores
    python bench/decode_vs_llama_cpp.py --quick

Tael and llama.cpp read the same GGUF file: the weights of the packaged SmolLM2, made Q4_0 by llama.cpp's own
quantiser (embedding and head Q8_0). transformers has the same weights, once in bf16 and once in fp32. Each engine is
a process of its own and sleeps while it is not its turn. Tael's figures go through Engine, that is with scheduling,
sampling and text; llama.cpp's through its C interface with argmax.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, print_table, ratios, spread, write_results
from peers import SETTLE_SECONDS, Peer, prompt_tokens

import tael
from tael.engine import Engine, SamplingParams
from tael.engine.native import load_operator
from tael.weights import resolve
from tael.weights.gguf import load_gguf
from tael.weights.huggingface import save_model

PROMPT, TOKENS, PREFILL = 128, 64, 512


def requantise(source: Path, target: Path) -> Path:
    """`source` as Q4_0, by llama.cpp's quantiser."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def silent(level: int, text: bytes, data: object) -> None:
        pass

    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True, 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError("llama.cpp could not quantise the model")
    return target


class Tael:
    """The engine in this process, with the peers' two tasks."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.engine = Engine(model, tokenizer, backend="native", cache_tokens=9216, prefix_cache="off")

    def prefill(self, tokens: int, seed: int = 0) -> float:
        prompt = prompt_tokens(tokens, seed)
        time.sleep(SETTLE_SECONDS)
        began = time.perf_counter()
        self.engine.generate([prompt], SamplingParams(1, 0.0))
        return time.perf_counter() - began

    def decode(self, prompt: int, tokens: int, seed: int = 0) -> float:
        time.sleep(SETTLE_SECONDS)
        began = 0.0
        for i, _ in enumerate(self.engine.stream(prompt_tokens(prompt, seed), SamplingParams(tokens + 1, 0.0))):
            began = time.perf_counter() if i == 0 else began
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, and nothing is written")
    rounds = 2 if parser.parse_args().quick else 11
    described = machine()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        source = resolve("smollm2-135m")
        q4 = requantise(source, Path(folder, "q4_0.gguf"))
        model, tokenizer = load_gguf(q4, keep_quantised=True), tael.load_tokenizer(source)
        hugging_face = Path(folder, "hf")
        save_model(load_gguf(source), hugging_face, tokenizer, torch.float32)
        read = load_operator().read_bandwidth  # GB/s
        ours = Tael(model, tokenizer)
        peers = {
            "llama.cpp Q4_0": Peer("llama_cpp", model=str(q4)),
            "transformers bf16": Peer("transformers", model=str(hugging_face), dtype="bfloat16"),
            "transformers fp32": Peer("transformers", model=str(hugging_face), dtype="float32"),
        }
        decode: dict[str, list[float]] = {name: [] for name in ("tael int4", *peers)}
        prefill: dict[str, list[float]] = {name: [] for name in ("tael int4", *peers)}
        bandwidth = []
        for round_ in range(-1, rounds):
            found_decode = {"tael int4": ours.decode(PROMPT, TOKENS)}
            found_prefill = {"tael int4": ours.prefill(PREFILL)}
            bandwidth.append(read(2))
            for name, peer in peers.items():
                few = 16 if name.startswith("transformers") else TOKENS
                found_decode[name] = peer.do("decode", prompt=PROMPT, tokens=few)["seconds"] * TOKENS / few
                found_prefill[name] = peer.do("prefill", tokens=PREFILL)["seconds"]
            if round_ >= 0:
                for name in decode:
                    decode[name].append(found_decode[name])
                    prefill[name].append(found_prefill[name])
        for peer in peers.values():
            peer.__exit__()
        read_bytes = ours.engine.pool.runner.model_bytes
        write(described, decode, prefill, bandwidth, read_bytes, peers, rounds, quick=rounds == 2)


def write(described, decode, prefill, bandwidth, read_bytes, peers, rounds, quick: bool) -> None:
    """Print the table; unless quick, keep it."""
    rows = []
    for name in decode:
        ratio_d, ratio_p = ratios(decode[name], decode["tael int4"]), ratios(prefill[name], prefill["tael int4"])
        told = ["", ""] if name == "tael int4" else [quotient(ratio_d), quotient(ratio_p)]
        rows.append(
            [
                name,
                f"{TOKENS / spread(decode[name])['median']:.0f}",
                told[0],
                f"{PREFILL / spread(prefill[name])['median']:.0f}",
                told[1],
            ]
        )
    achieved = read_bytes * TOKENS / spread(decode["tael int4"])["median"] / 1e9
    plain = spread(bandwidth)["median"]
    columns = [
        "engine",
        "decode, tokens/s",
        "Tael is faster by",
        f"prefill of {PREFILL}, tokens/s",
        "Tael is faster by ",
    ]
    versions = ", ".join(dict.fromkeys(peer.described["version"] for peer in peers.values()))
    notes = [
        f"Medians of {rounds} interleaved rounds, quartiles in brackets; {TOKENS} tokens after {PROMPT}. {versions}.",
        f"Tael reads {read_bytes / 1e6:.0f} MB of weights a token: {achieved:.1f} GB/s, {achieved / plain:.0%} of "
        f"the {plain:.1f} GB/s of a plain read on two threads, measured between the rounds.",
    ]
    title = "SmolLM2-135M at 4 bits on two threads: decode and prefill"
    print_table(title, columns, rows)
    print("\n".join(notes))
    if not quick:
        table = {"columns": columns, "rows": rows, "notes": notes}
        command = "python bench/decode_vs_llama_cpp.py"
        write_results(
            "decode_vs_llama_cpp",
            {"title": title, "command": command, "machine": described, "tables": [table],
             "seconds": {"decode": decode, "prefill": prefill}, "plain_read_gb_s": bandwidth},
        )  # fmt: skip


def quotient(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


if __name__ == "__main__":
    main()
