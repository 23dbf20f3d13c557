"""A 16B model on two cores: DeepSeek-V2-Lite's exact shape at 4 bits, Tael against llama.cpp on the same file.

    python bench/v2_lite_on_two_cores.py            about ten minutes, 10 GB of disk and 20 GB of memory (two engines)
    python bench/v2_lite_on_two_cores.py --alone    without llama.cpp: 10 GB of memory

The weights are random codes written straight as Q4_0 (embedding and head Q8_0): nothing of 15.7B parameters is ever
held in more than 4 bits. Which experts a token takes is then near uniform, as balanced training makes it. What it
shows is speed and memory, not words. Bytes a token are those of the weights it passes through: 6 of 64 experts, the
shared ones, attention, head.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, print_table, ratios, spread, write_results
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from peers import Peer

from tael.model import ModelConfig, Transformer
from tael.weights.gguf_layout import sources, write_config

V2_LITE = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    num_attention_heads=16,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
    first_k_dense_replace=1,
    max_position_embeddings=163840,
    rope_scaling={
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
)
PROMPT, TOKENS, PREFILL = 32, 24, 128
STEP = 0.02 / 4.6  # of the codes: weights of standard deviation 0.02


def tensors(config: ModelConfig):
    """(name, kind, shape) of every tensor of the file."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Transformer(config).state_dict().items()}
    heads = config.num_attention_heads
    for source in sources(config):
        shape = shapes[source.parameter]
        if source.form == "gate_up":
            parts = [(shape[0], shape[1] // 2, shape[2])] * 2
        elif source.form == "kv_b":
            parts = [
                (heads, config.kv_lora_rank, config.qk_nope_head_dim),
                (heads, config.v_head_dim, config.kv_lora_rank),
            ]
        else:
            parts = [shape]
        for name, part in zip(source.names, parts, strict=True):
            high = name in ("token_embd.weight", "output.weight")
            flat = len(part) == 1 or "gate_inp" in name
            yield name, Kind.F32 if flat else Kind.Q8_0 if high else Kind.Q4_0, part


def random_bytes(kind: Kind, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """A tensor of random codes as it lies in the file."""
    if kind is Kind.F32:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return generator.standard_normal(shape, np.float32) * 0.02
    block, size = GGML_QUANT_SIZES[kind]
    blocks = int(np.prod(shape)) // block
    data = generator.integers(0, 256, (blocks, size), np.uint8)
    step = np.float16(STEP if kind is Kind.Q4_0 else STEP / 16)
    data[:, :2] = np.frombuffer(step.tobytes(), np.uint8)
    return data.reshape(*shape[:-1], -1)


def write_random(config: ModelConfig, path: Path) -> None:
    """A GGUF of this shape, without a tokenizer."""
    arch, table = write_config(config)
    writer = GGUFWriter(path, arch)
    writer.add_string("tokenizer.ggml.model", "none")
    for key, value in table.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    found = list(tensors(config))
    for name, kind, shape in found:
        block, size = GGML_QUANT_SIZES[kind]
        row = shape[-1] // block * size
        stored = shape if kind is Kind.F32 else (*shape[:-1], row)
        count = int(np.prod(shape[:-1])) * row
        writer.add_tensor_info(name, stored, np.dtype(np.float32 if kind is Kind.F32 else np.uint8), count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for _, kind, shape in found:
        writer.write_tensor_data(random_bytes(kind, shape, generator))
    writer.close()


def bytes_a_token(config: ModelConfig) -> int:
    """Of weights that one token meets; of the embedding one row."""
    total = 0.0
    for name, kind, shape in tensors(config):
        block, size = GGML_QUANT_SIZES[kind]
        share = config.num_experts_per_tok / (config.n_routed_experts or 1) if "_exps" in name else 1.0
        share = 0.0 if name == "token_embd.weight" else share
        total += share * np.prod(shape) / block * size
    return int(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--experts", type=int, default=64, help="fewer: shows that it runs, writes nothing")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    config = ModelConfig(**{**V2_LITE.__dict__, "n_routed_experts": given.experts})
    described = machine()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "v2-lite-random.gguf")
        write_random(config, path)
        names = ["tael"] if given.alone else ["tael", "llama_cpp"]
        peers = {name: Peer(name, model=str(path), context=1024) for name in names}
        decode: dict[str, list[float]] = {name: [] for name in names}
        prefill: dict[str, list[float]] = {name: [] for name in names}
        bandwidth, peak = [], 0
        for index in range(-1, given.rounds):
            for name, peer in peers.items():
                done = peer.do("decode", prompt=PROMPT, tokens=TOKENS, seed=index + 1)
                read = peer.do("prefill", tokens=PREFILL, seed=index + 1)
                if name == "tael":
                    bandwidth.append(peer.do("read")["gb_s"])
                    peak = max(peak, done["peak_bytes"])
                if index >= 0:
                    decode[name].append(done["seconds"] / TOKENS)
                    prefill[name].append(read["seconds"] / PREFILL)
        for peer in peers.values():
            peer.__exit__()
        report(config, described, decode, prefill, bandwidth, peak, path.stat().st_size, given)


def report(config, described, decode, prefill, bandwidth, peak, size, given) -> None:
    """Print the table; keep it when the shape is whole."""
    token_bytes, plain = bytes_a_token(config), spread(bandwidth)["median"]
    columns = ["engine", "decode, tokens/s", "GB/s of weights", "of a plain read", f"prefill of {PREFILL}, tokens/s"]
    columns.append("Tael is faster by (decode; prefill)")
    rows: list[list[Any]] = []
    for name in decode:
        seconds = spread(decode[name])["median"]
        achieved = token_bytes / seconds / 1e9
        told = ""
        if name != "tael":
            pair = ratios(decode[name], decode["tael"]), ratios(prefill[name], prefill["tael"])
            told = "; ".join(f"{r['median']:.2f}x ({r['low']:.2f} to {r['high']:.2f})" for r in pair)
        rows.append(
            [
                {"tael": "Tael", "llama_cpp": "llama.cpp"}[name],
                f"{1 / seconds:.2f}",
                f"{achieved:.1f}",
                f"{achieved / plain:.0%}",
                f"{1 / spread(prefill[name])['median']:.0f}",
                told,
            ]
        )
    notes = [
        f"{config.parameters() / 1e9:.1f}B parameters, {config.parameters(active=True) / 1e9:.2f}B active; a file of "
        f"{size / 1e9:.1f} GB, {token_bytes / 1e9:.2f} GB of it met by a token. Tael's process at its peak: "
        f"{peak / 1e9:.1f} GB.",
        f"Medians of {given.rounds} interleaved rounds, {TOKENS} tokens after {PROMPT}; plain read on two threads "
        f"{plain:.1f} GB/s, measured between the rounds.",
    ]
    title = "DeepSeek-V2-Lite's shape (15.7B) at 4 bits on two cores"
    print_table(title, columns, rows)
    print("\n".join(notes))
    if config == V2_LITE and not given.alone:
        content = {"title": title, "command": "python bench/v2_lite_on_two_cores.py", "machine": described}
        content |= {"tables": [{"columns": columns, "rows": rows, "notes": notes}], "plain_read_gb_s": bandwidth}
        write_results("v2_lite_on_two_cores", content | {"seconds": {"decode": decode, "prefill": prefill}})


if __name__ == "__main__":
    main()
