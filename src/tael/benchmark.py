"""`tael bench MODEL`: how fast a model runs here, and how near that comes to what memory allows.

A decode step has to read every weight the token passes through; so tokens a second times those bytes, over what a
plain read of memory reaches in the same minute, says how much of the machine is used. Everything is measured in
turns, round after round, and told as median and quartiles.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from tael.data import Tokenizer
from tael.engine import Engine, EngineSettings, SamplingParams
from tael.errors import TaelError
from tael.evals.statistics import Spread
from tael.model import Transformer

TEXT = (
    "The lighthouse stands where the coast turns north. For a hundred and forty years its keepers climbed the stairs "
    "twice a night to wind the clockwork, trim the wick and write down the weather. When the lamp was made electric, "
    "the last of them stayed on and wrote a book about the ships that had passed, the storms and the quiet days. It "
    "begins like this: "
)
BUSY = 0.5
"""Of the processors, how many may be at work before the figures are called into question."""


@dataclass(frozen=True)
class Plan:
    """What is measured: prompts of these lengths; `tokens` answers' tokens for each of these numbers of requests."""

    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    prompt: int
    tokens: int
    rounds: int
    megabytes: int

    @classmethod
    def of(cls, context: int, rounds: int, quick: bool) -> Plan:
        """As much as the context allows; `quick` for a first impression. Raises TaelError for too small a context."""
        prompt, tokens = (16, 16) if quick else (64, 64)
        if context < prompt + tokens:
            prompt = tokens = context // 2
        if tokens < 8:
            raise TaelError(f"a context of {context} tokens is too small to measure anything")
        prompts = [n for n in ((128,) if quick else (128, 512, 2048)) if n < context] or [context - 1]
        batches = (1, 4) if quick else (1, 4, 16)
        return cls(tuple(prompts), batches, prompt, tokens, 1 if quick else rounds, 64 if quick else 512)

    @property
    def cache_tokens(self) -> int:
        """Slots that all of it needs at a time."""
        each = (self.prompt + self.tokens + 48) // 16 * 16
        return max(max(self.prompts) + 64, max(self.batches) * each)


@dataclass
class _Samples:
    """What the rounds brought."""

    prefill: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[tuple[bool, int], list[float]] = field(default_factory=dict)
    drafted: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Prefill:
    """Tokens a second of a prompt of so many tokens."""

    tokens: int
    tokens_per_second: Spread


@dataclass(frozen=True)
class Decode:
    """Tokens a second of so many requests together, and the share of drafts kept where there were some."""

    requests: int
    speculation: str | None
    tokens_per_second: Spread
    acceptance: float | None


@dataclass(frozen=True)
class Report:
    """Everything `measure` found. Bytes; GB are 1e9 bytes."""

    machine: dict[str, Any]
    parameters: int
    backend: str
    rounds: int
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    cache_bytes_per_token: int
    cache_bytes: int
    weight_bytes: int
    weight_bytes_per_token: int
    read_gb_per_second: Spread
    achieved_gb_per_second: float

    @property
    def bandwidth_share(self) -> float:
        return self.achieved_gb_per_second / self.read_gb_per_second.median

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bandwidth_percent": round(100 * self.bandwidth_share, 1)}


def measure(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: EngineSettings,
    plan: Plan,
    progress: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run the plan. `warn` is told when the machine has other work; raises TaelError where the memory does not do."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = os.cpu_count() or 1
    if load > BUSY * cores:
        warn(f"this machine is busy (load {load:.1f} on {cores} processors): it could do better than these figures")
    weights = weight_bytes(model)  # before an engine gives the codes up
    fixed = {"cache_tokens": plan.cache_tokens, "prefix_cache": "off"}
    plain = Engine(model, tokenizer, settings, **fixed, speculate="off")
    drafting = Engine(model, tokenizer, settings, **fixed, speculate="on")
    samples = _Samples()
    for number in range(-1, plan.rounds):  # the first one warms up
        told = "warming up" if number < 0 else f"round {number + 1} of {plan.rounds}"
        found = samples if number >= 0 else _Samples()
        _round(plain, drafting, plan, max(number, 0), found, lambda line, told=told: progress(f"{told}: {line}"))
    drafter = "MTP" if len(model.mtp) else "n-gram"
    return _report(plain, drafter, plan, samples, weights, load)


def _round(
    plain: Engine, drafting: Engine, plan: Plan, seed: int, into: _Samples, progress: Callable[[str], None]
) -> None:
    progress("reading memory")
    into.bandwidth.append(read_bandwidth(plain.model, plan.megabytes))
    for length in plan.prompts:
        progress(f"a prompt of {length} tokens")
        into.prefill.setdefault(length, []).append(_prefill(plain, length, seed))
    for drafts, engine in ((False, plain), (True, drafting)):
        for requests in plan.batches:
            progress(f"{requests} request{'s' * (requests > 1)}{', drafting' if drafts else ''}")
            before = engine.stats.drafted_tokens, engine.stats.accepted_tokens
            rate = _decode(engine, plan, requests, seed)
            into.decode.setdefault((drafts, requests), []).append(rate)
            if drafts:
                for total, now, was in (
                    (into.drafted, engine.stats.drafted_tokens, before[0]),
                    (into.accepted, engine.stats.accepted_tokens, before[1]),
                ):
                    total[requests] = total.get(requests, 0) + now - was


def _prefill(engine: Engine, length: int, seed: int) -> float:
    """Tokens a second from the prompt to the first token."""
    prompt = _prompt(engine, length, seed)
    began = time.perf_counter()
    engine.generate([prompt], SamplingParams(1, 0.0))
    return length / (time.perf_counter() - began)


def _decode(engine: Engine, plan: Plan, requests: int, seed: int) -> float:
    """Tokens a second of all requests together, from when each has its first token until one of them is done.

    Drawn at temperature 1: greedy answers of small models go in circles, which drafts would foresee too well.
    """
    sequences = [
        engine.submit(_prompt(engine, plan.prompt, 31 * seed + i), SamplingParams(plan.tokens, seed=i), text=False)
        for i in range(requests)
    ]
    while not all(s.generated for s in sequences):
        engine.step()
    first, began = sum(s.generated for s in sequences), time.perf_counter()
    while all(s.state != "finished" for s in sequences):
        engine.step()
    rate = (sum(s.generated for s in sequences) - first) / (time.perf_counter() - began)
    for sequence in sequences:
        engine.cancel(sequence)
    while engine.busy:
        engine.step()
    return rate


def _prompt(engine: Engine, length: int, seed: int) -> list[int]:
    """`length` tokens of plain English; another beginning for another seed."""
    assert engine.tokenizer is not None
    words = engine.tokenizer.encode(TEXT)
    start = 7 * seed % len(words)
    known = min(engine.model.config.vocab_size, engine.tokenizer.vocab_size)
    text = [*engine.tokenizer.start_ids, *words[start:], *words * (length // len(words) + 1)]
    return [token % known for token in text[:length]]


# ------------------------------------------------------------------------ bytes


def read_bandwidth(model: Transformer, megabytes: int) -> float:
    """GB/s of a plain read of the memory that holds the model, by as many threads as compute."""
    device = model.norm.weight.device
    if device.type == "cpu":
        from tael.engine.native.build import is_built, load_operator

        if is_built():
            return load_operator().read_bandwidth(torch.get_num_threads(), megabytes)
    values = torch.ones(megabytes << 18, device=device)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        float(values.sum())
        best = min(best, time.perf_counter() - began)
    return values.nbytes / best / 1e9


def weight_bytes(model: Transformer) -> tuple[int, int]:
    """Bytes of all weights, and of those that one token's pass reads, as they lie in the model.

    A token reads K of E experts, a row of the embedding (not counted), and no MTP module. A runner that packs its
    own copy knows better (`NativeRunner.step_bytes`).
    """
    config, seen = model.config, set[int]()
    total = step = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.numel() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        total += tensor.nbytes
        if name.startswith("mtp.") or (name.startswith("embed_tokens.") and not config.tie_word_embeddings):
            continue
        share = config.num_experts_per_tok / (config.n_routed_experts or 1) if ".experts." in name else 1.0
        step += int(tensor.nbytes * share)
    return total, step


# ----------------------------------------------------------------------- report


def _report(
    engine: Engine, drafter: str, plan: Plan, samples: _Samples, weights: tuple[int, int], load: float
) -> Report:
    model, runner = engine.model, engine.pool.runner
    total, step = getattr(runner, "model_bytes", weights[0]), getattr(runner, "step_bytes", weights[1])
    decode = []
    for (drafts, requests), rates in samples.decode.items():
        drafted = samples.drafted.get(requests, 0) if drafts else 0
        kept = samples.accepted.get(requests, 0) / drafted if drafted else None
        decode.append(Decode(requests, drafter if drafts else None, Spread.quartiles(rates), kept))
    machine = {
        "device": str(model.norm.weight.device),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(load, 2),
    }
    return Report(
        machine=machine,
        parameters=model.config.parameters(),
        backend=type(runner).__name__.removesuffix("Runner").lower(),
        rounds=plan.rounds,
        prefill=tuple(Prefill(n, Spread.quartiles(rates)) for n, rates in samples.prefill.items()),
        decode=tuple(decode),
        cache_bytes_per_token=runner.cache_bytes // (runner.num_blocks * runner.block_size),
        cache_bytes=runner.cache_bytes,
        weight_bytes=total,
        weight_bytes_per_token=step,
        read_gb_per_second=Spread.quartiles(samples.bandwidth),
        achieved_gb_per_second=step * statistics.median(samples.decode[False, 1]) / 1e9,
    )


def results_table(report: Report, title: str) -> Table:
    """The report for the terminal; fits 80 columns."""
    machine = report.machine
    by = "the C++ operator" if report.backend == "native" else report.backend
    heading = f"{title}: {report.parameters / 1e6:,.1f}M parameters, {by} on {machine['threads']} threads"
    if machine["device"] != "cpu":
        heading = f"{title}: {report.parameters / 1e6:,.1f}M parameters, {by} on {machine['device']}"
    caption = f"Medians of {report.rounds} rounds and their quartiles." if report.rounds > 1 else "One round."
    table = Table(
        title=Text(heading),
        caption=Text(caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    table.add_column("What")
    table.add_column("Median", justify="right", no_wrap=True)
    table.add_column("Quartiles", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in report.prefill:
        table.add_row(f"Prefill of {row.tokens:,} tokens", *_cells(row.tokens_per_second), "tok/s")
    for row in report.decode:
        requests = "1 request" if row.requests == 1 else f"{row.requests} requests"
        name = f"Decode, {requests}" + (f", {row.speculation}" if row.speculation else "")
        kept = "" if row.acceptance is None else f", {row.acceptance:.0%} of drafts kept"
        table.add_row(name, *_cells(row.tokens_per_second), f"tok/s{kept}")
    table.add_section()
    table.add_row("Cache", _bytes(report.cache_bytes_per_token), "", f"a token; {_bytes(report.cache_bytes)} here")
    weights = f"a token, of {_bytes(report.weight_bytes)}"
    table.add_row("Weights read", _bytes(report.weight_bytes_per_token), "", weights)
    table.add_row("Plain read of memory", *_cells(report.read_gb_per_second), "GB/s")
    share = f"GB/s, {report.bandwidth_share:.0%} of that"
    table.add_row("Weights at 1 request", _number(report.achieved_gb_per_second), "", share)
    return table


def _cells(spread: Spread) -> tuple[str, str]:
    same = spread.low == spread.high
    return _number(spread.median), "" if same else f"{_number(spread.low)} to {_number(spread.high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{_number(count / size)} {unit}"
    return f"{count} B"
