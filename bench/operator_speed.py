"""What the C++ operator reaches by itself: products in every format, attention over its context, a shared prefix.

    python bench/operator_speed.py          about two minutes on two idle cores
    python bench/operator_speed.py --quick

Products: a matrix too large for the caches by 1 to 64 rows; GB/s of weights and billions of multiply-adds a second,
beside a plain read measured between the rounds. Passes: SmolLM2-135M as Q4_0, one sequence at several lengths; and
sixteen sequences of 1,100 tokens that hold their first 1,024 in the same blocks, or in blocks of their own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleave, machine, print_table, ratios, spread, write_results
from decode_vs_llama_cpp import requantise

from tael.engine.batch import StepBatch
from tael.engine.native import NativeRunner, load_operator
from tael.weights import load_gguf, resolve

OUT, IN, BLOCK = 49152, 1024, 16
ROWS = (1, 4, 16, 64)
CONTEXTS = (16, 150, 1100, 2200)
CLIENTS, CONTEXT, PREFIX = 16, 1100, 1024


def product(scheme: str, rows: int) -> tuple[Callable[[], object], int]:
    """A function that multiplies, and the bytes of the matrix."""
    library = load_operator()
    shape = library.Shape()
    shape.hidden, shape.heads, shape.kv_heads, shape.head_dim = IN, 1, 1, 8
    generator = torch.Generator().manual_seed(0)
    if scheme in ("f32", "f16"):
        weight = torch.randn(OUT, IN, generator=generator).to(torch.float16 if scheme == "f16" else torch.float32)
        matrix, size = library.float_matrix(weight), weight.nbytes
    else:
        four = scheme == "int4"
        codes = torch.randint(0, 256, (OUT, IN // 2 if four else IN), generator=generator, dtype=torch.uint8)
        codes = codes if four else codes.view(torch.int8)
        packed = library.pack(scheme, codes, torch.full((OUT, IN // 32), 0.01).half())
        matrix, size = library.packed_matrix(scheme, packed, OUT, IN), packed.nbytes
    operator = library.Model(shape, 2)
    operator.set_ends(matrix, matrix, torch.ones(IN))
    x = torch.randn(rows, IN, generator=generator)
    return lambda: operator.logits(x), size


def products(rounds: int) -> dict[str, Any]:
    rows = []
    for scheme in ("int4", "w8a8", "int8", "f16", "f32"):
        made = {count: product(scheme, count) for count in ROWS}
        plain: list[float] = []
        work: dict[str, Callable[[], object]] = {str(count): run for count, (run, _) in made.items()}
        work["read"] = lambda plain=plain: plain.append(load_operator().read_bandwidth(2, 256))
        seconds = interleave(work, rounds)
        size, read = made[1][1], spread(plain)["median"]
        achieved = size / spread(seconds["1"])["median"] / 1e9
        rates = [f"{count * OUT * IN / spread(seconds[str(count)])['median'] / 1e9:.0f}" for count in ROWS]
        rows.append([scheme, f"{8 * size / OUT / IN:.2f}", f"{achieved:.1f}", f"{achieved / read:.0%}", *rates])
    columns = ["weights", "bits", "GB/s at 1 row", "of a plain read"]
    columns += [f"G multiply-adds/s, {n} row{'s' * (n > 1)}" for n in ROWS]
    note = f"[{OUT:,}, {IN:,}] by rows, two threads; medians of {rounds} interleaved rounds."
    return {"columns": columns, "rows": rows, "notes": [note]}


def passes(path: Path, rounds: int) -> dict[str, Any]:
    runner = NativeRunner(load_gguf(path, keep_quantised=True), 1600, BLOCK)
    runner.cache.normal_()

    def step(tables: list[list[int]], context: int) -> Callable[[], object]:
        batch = StepBatch.build([([5], context, table, False) for table in tables])
        return lambda: runner.forward(batch)

    each, common = CONTEXT // BLOCK + 1, PREFIX // BLOCK
    apart = [list(range(1 + i * each, 1 + (i + 1) * each)) for i in range(CLIENTS)]
    shared = [apart[0][:common] + table[common:] for table in apart]
    work = {f"one sequence, {n:,} tokens": step([list(range(1, 160))], n) for n in CONTEXTS}
    work[f"{CLIENTS} sequences of {CONTEXT:,}, blocks of their own"] = step(apart, CONTEXT)
    work[f"{CLIENTS} sequences of {CONTEXT:,}, the first {PREFIX:,} in the same blocks"] = step(shared, CONTEXT)
    seconds = interleave(work, rounds)
    rows = [
        [name, f"{1e3 * spread(s)['median']:.1f}", f"{1e3 * spread(s)['low']:.1f} to {1e3 * spread(s)['high']:.1f}"]
        for name, s in seconds.items()
    ]
    own, one = list(seconds.values())[-2:]
    ratio = ratios(own, one)
    note = (
        f"A pass without the head, two threads, {rounds} interleaved rounds. The same blocks are faster by "
        f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})."
    )
    return {"columns": ["SmolLM2-135M, Q4_0", "ms a pass", "quartiles"], "rows": rows, "notes": [note]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds, and nothing is written")
    rounds = 3 if parser.parse_args().quick else 15
    described = machine()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        path = requantise(resolve("smollm2-135m"), Path(folder, "q4_0.gguf"))
        tables = [products(rounds), passes(path, rounds)]
    title = "The C++ operator by itself"
    for table in tables:
        print_table(title, table["columns"], table["rows"])
        print("\n".join(table["notes"]))
    if rounds > 3:
        command = "python bench/operator_speed.py"
        write_results("operator_speed", {"title": title, "command": command, "machine": described, "tables": tables})


if __name__ == "__main__":
    main()
