"""The server under load: 32 streaming clients for two minutes, some of them ill-behaved; and what HTTP costs.

    python bench/serve_load.py              about seven minutes on two idle cores
    python bench/serve_load.py --quick      one minute, and nothing is written

SmolLM2-135M (fp16, the C++ operator). Every prompt holds a code word of its own. Its answer is asked for once before
the load, alone; under load every whole answer must equal it, and every broken one begin it: a lost, crossed or
corrupted stream would not. A tenth of the requests is malformed, too long, or hung up on in mid-answer. The server's
memory is read every second. The clients share the two cores with the server.

Overhead: the server under 32 well-behaved clients against the engine alone with 32 sequences, the same questions, in
rounds that take turns, each side in a process of its own. Both tokens a second and processor seconds a token.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

import psutil
from common import machine, print_table, ratios, spread, write_results
from peer_clients import Tally, load, references
from peers import Peer

TOKENS, CLIENTS, PROMPTS = 48, 32, 64
PORT = 8019


def prompts() -> list[str]:
    words = [f"{a}{b}" for a in ("amber", "birch", "cedar", "delta") for b in ("fox", "owl", "elk", "carp")]
    return [
        f"My code word is {words[i % 16]}{i}. Repeat my code word, then tell me about it." for i in range(PROMPTS)
    ]


class Server:
    """`tael serve` in a process of its own."""

    def __init__(self, state: str) -> None:
        command = [sys.executable, "-m", "tael", "serve", "smol=smollm2-135m", "--port", str(PORT), "--no-pages"]
        self.process = subprocess.Popen(
            [*command, "--state", state, "--no-log"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.ps = psutil.Process(self.process.pid)
        deadline = time.monotonic() + 180
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server does not come up")
            time.sleep(0.5)

    def _ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://localhost:{PORT}/ready").status == 200
        except (urllib.error.URLError, OSError):
            return False

    def cpu(self) -> float:
        times = self.ps.cpu_times()
        return times.user + times.system

    def loop_cpu(self) -> float:
        """Of the event loop's thread: HTTP, templates, parsing."""
        return next(t.user_time + t.system_time for t in self.ps.threads() if t.id == self.process.pid)

    def gauge(self, name: str) -> float:
        text = urllib.request.urlopen(f"http://localhost:{PORT}/metrics").read().decode()
        return float(next(line for line in text.splitlines() if line.startswith(name)).rsplit(" ", 1)[1])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


async def watched(server: Server, seconds: float, expected: dict[str, str]) -> tuple[Tally, list[int]]:
    """The load with mischief, and the server's memory every second."""
    memory: list[int] = []

    async def watch() -> None:
        while True:
            memory.append(server.ps.memory_info().rss)
            await asyncio.sleep(1)

    watching = asyncio.ensure_future(watch())
    tally = await load(PORT, prompts(), TOKENS, CLIENTS, seconds, 0.1, expected)
    watching.cancel()
    return tally, memory


def under_load(server: Server, seconds: float, expected: dict[str, str]) -> dict[str, Any]:
    tally, memory = asyncio.run(watched(server, seconds, expected))
    if tally.wrong:
        raise SystemExit(f"{len(tally.wrong)} wrong answers, the first: {tally.wrong[0]}")
    deadline = time.monotonic() + 10
    while server.gauge("tael_requests_open") and time.monotonic() < deadline:
        time.sleep(0.1)
    model = '{model="smol"}'
    total, free = server.gauge(f"tael_cache_blocks{model}"), server.gauge(f"tael_cache_blocks_free{model}")
    if total != free:
        raise SystemExit(f"{total - free:.0f} blocks of the cache were not given back")
    third = len(memory) // 3
    early, late = statistics.median(memory[third : 2 * third]) / 1e6, statistics.median(memory[2 * third :]) / 1e6
    refused = ", ".join(f"{count} x {status}" for status, count in sorted(tally.refused.items()))
    first, whole = sorted(tally.first), sorted(tally.whole)
    at = lambda values, share: values[min(len(values) - 1, int(share * len(values)))]  # noqa: E731
    rows = [
        ["clients, seconds", f"{CLIENTS}, {tally.seconds:.0f}"],
        ["whole answers, all equal to the answer alone", tally.answered],
        ["hung up on in mid-answer", tally.hung_up],
        ["refused, by status", refused],
        ["lost, crossed or corrupted", 0],
        ["time to the first token, p50 / p99", f"{at(first, 0.5):.2f} / {at(first, 0.99):.2f} s"],
        ["time to the last token, p50 / p99", f"{at(whole, 0.5):.2f} / {at(whole, 0.99):.2f} s"],
        ["tokens/s of whole answers", f"{tally.tokens / tally.seconds:.0f}"],
        [
            "server's memory, second and last third",
            f"{early:.0f} and {late:.0f} MB ({100 * (late / early - 1):+.1f}%)",
        ],
        ["blocks of the cache not given back", 0],
    ]
    return {"columns": ["under load", ""], "rows": rows, "notes": [_note(expected)]}


def _note(expected: dict[str, str]) -> str:
    holds = sum(prompt.split()[4].rstrip(".") in answer for prompt, answer in expected.items())
    different = len(set(expected.values()))
    return f"{PROMPTS} prompts, {different} different answers, {holds} of which hold their prompt's code word."


def quartiles(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def overhead(server: Server, engine: Peer, rounds: int, seconds: float, expected: dict[str, str]) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"engine alone": [], "server": []}
    work: dict[str, list[float]] = {"engine alone": [], "server": []}
    shares: list[float] = []
    for number in range(-1, rounds):
        alone = engine.do("questions", prompts=prompts(), tokens=TOKENS, clients=CLIENTS, seconds=seconds)
        cpu, loop = server.cpu(), server.loop_cpu()
        tally = asyncio.run(load(PORT, prompts(), TOKENS, CLIENTS, seconds, 0.0, expected))
        cpu, loop = server.cpu() - cpu, server.loop_cpu() - loop
        if number >= 0:
            rates["engine alone"].append(alone["tokens"] / alone["seconds"])
            work["engine alone"].append(1e3 * alone["cpu"] / alone["tokens"])
            rates["server"].append(tally.tokens / tally.seconds)
            work["server"].append(1e3 * cpu / tally.tokens)
            shares.append(loop / cpu)
    rows = [
        [name, *(f"{spread(values[name])['median']:.{places}f}" for values, places in ((rates, 0), (work, 2)))]
        for name in rates
    ]
    slower, dearer = ratios(rates["server"], rates["engine alone"]), ratios(work["server"], work["engine alone"])
    notes = [
        f"{rounds} rounds of {seconds:.0f} s in turn. Tokens/s of the server over the engine's: {quartiles(slower)}, "
        f"the clients' own work on the same cores included. Processor time a token: {quartiles(dearer)}. Of the "
        f"server's processor time the event loop's thread takes {quartiles(spread(shares))}."
    ]
    return {"columns": ["overhead", "tokens/s", "processor ms a token"], "rows": rows, "notes": notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short, and nothing is written")
    quick = parser.parse_args().quick
    described = machine()
    with tempfile.TemporaryDirectory() as state:
        server = Server(state)
        try:
            expected = asyncio.run(references(PORT, prompts(), TOKENS))
            tables = [under_load(server, 20 if quick else 120, expected)]
            with Peer("engine", model="smollm2-135m") as engine:
                tables.append(overhead(server, engine, 2 if quick else 7, 8 if quick else 15, expected))
        finally:
            server.close()
    title = "The server under load"
    for table in tables:
        print_table(title, table["columns"], table["rows"])
        print("\n".join(table["notes"]))
    if not quick:
        command = "python bench/serve_load.py"
        write_results("serve_load", {"title": title, "command": command, "machine": described, "tables": tables})


if __name__ == "__main__":
    main()
