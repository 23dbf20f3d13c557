"""Sixteen clients at once whose prompts share 1,024 tokens: Tael's engine against llama.cpp; round by round.

    python bench/throughput.py              about six minutes on two idle cores
    python bench/throughput.py --quick

SmolLM2-135M as Q4_0, the same file on both sides (as in bench/decode_vs_llama_cpp.py). Each client asks 32 tokens of
its own after the shared ones and is answered with 64, greedily, all at once. llama.cpp's server program is in no
package index; bench/peer_llama_cpp.py drives its library as that server does, all clients in one batch a step, in two
ways:

    slots         every slot reads its whole prompt, as the server's slots do when they are new
    shared        the 1,024 tokens are read once and their cache is handed to all, the most the library can do

Seconds run from the first token read to the last token out; the cache starts empty in every round.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import machine, print_table, ratios, spread, write_results
from decode_vs_llama_cpp import requantise
from peers import SETTLE_SECONDS, Peer, prompt_tokens

from tael.engine import Engine, SamplingParams
from tael.weights import resolve
from tael.weights.gguf import load_gguf

PREFIX, OWN, TOKENS, CLIENTS = 1024, 32, 64, 16


def prompts(clients: int) -> list[list[int]]:
    common = prompt_tokens(PREFIX, 0)
    return [common + prompt_tokens(OWN, 1 + i) for i in range(clients)]


class Tael:
    """A fresh engine a round: its prefix cache starts empty."""

    def __init__(self, path: Path) -> None:
        self.model = load_gguf(path, keep_quantised=True)
        self.hit_rate = 0.0

    def clients(self, clients: int) -> float:
        engine = Engine(self.model, backend="native", cache_tokens=8192, max_batch=32)
        asked, params = prompts(clients), SamplingParams(TOKENS, 0.0)
        time.sleep(SETTLE_SECONDS)
        began = time.perf_counter()
        answers = engine.generate(asked, params)
        seconds = time.perf_counter() - began
        assert all(len(a.tokens) == TOKENS for a in answers)
        self.hit_rate = engine.stats.cached_tokens / sum(map(len, asked))
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, and nothing is written")
    rounds = 1 if parser.parse_args().quick else 5
    described = machine()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        path = requantise(resolve("smollm2-135m"), Path(folder, "q4_0.gguf"))
        ours = Tael(path)
        size = CLIENTS * (PREFIX + OWN + TOKENS + 32)
        # Slots each have a stretch of the cache of their own, as the server's; to be shared it has to be one.
        peers = {
            f"llama.cpp, {way}": Peer("llama_cpp", model=str(path), context=size, sequences=CLIENTS, unified=share)
            for way, share in (("slots", False), ("shared", True))
        }
        seconds: dict[str, list[float]] = {name: [] for name in ("Tael", *peers)}
        ours.clients(2)  # what is compiled or packed at first use
        for _ in range(rounds):
            seconds["Tael"].append(ours.clients(CLIENTS))
            for name, peer in peers.items():
                share = name.endswith("shared")
                done = peer.do("clients", prefix=PREFIX, own=OWN, tokens=TOKENS, clients=CLIENTS, share=share)
                seconds[name].append(done["seconds"])
        version = peers["llama.cpp, slots"].described["version"]
        for peer in peers.values():
            peer.__exit__()
    rows = []
    for name, values in seconds.items():
        ratio = ratios(values, seconds["Tael"])
        told = "" if name == "Tael" else f"{ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        median = spread(values)["median"]
        hits = {"Tael": f"{ours.hit_rate:.0%}", "llama.cpp, shared": "by hand"}.get(name, "0%")
        rows.append([name, f"{median:.1f}", f"{CLIENTS * TOKENS / median:.0f}", hits, told])
    columns = ["engine", "seconds", "answer tokens/s", "prompt tokens from cache", "Tael faster by"]
    notes = [
        f"{CLIENTS} clients, {PREFIX} shared and {OWN} own prompt tokens, {TOKENS} answer tokens each; medians of "
        f"{rounds} interleaved rounds, quartiles in brackets; {version}, two threads."
    ]
    title = "Sixteen clients with a shared prefix, SmolLM2-135M at 4 bits"
    print_table(title, columns, rows)
    print("\n".join(notes))
    if rounds > 1:
        content = {"title": title, "command": "python bench/throughput.py", "machine": described}
        table = {"columns": columns, "rows": rows, "notes": notes}
        write_results("throughput", content | {"tables": [table], "seconds": seconds})


if __name__ == "__main__":
    main()
