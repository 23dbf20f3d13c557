"""A realistic made-up run directory and its ledger, for the report and the tables."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from tael.cost.ledger import Entry, Ledger

RECIPE = """name = "demo"
description = "A small mixture-of-experts model learns English & arithmetic on two CPU cores."
seed = 0

[price]
dollars_per_hour = 0.08
watts = 30.0

[stages.pretrain]
kind = "pretrain"
steps = 600

[stages.sft]
kind = "sft"
steps = 200

[stages.rl]
kind = "rl"
steps = 60
[[stages.rl.tasks]]
name = "addition"
"""
HOSTILE = "</pre></script><script>window.pwned = 1</script><img src=https://evil.example/x onerror=window.pwned=2>"


def _write(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _accuracy(**shares: float) -> dict:
    return {mode: {"correct": round(200 * share), "total": 200} for mode, share in shares.items()}


def _load(random_: random.Random, step: int, spread: float) -> dict:
    layers = []
    for _ in range(3):
        raw = [math.exp(random_.gauss(0, spread)) for _ in range(8)]
        layers.append([share / sum(raw) for share in raw])
    return {"kind": "load", "step": step, "layers": layers}


def _step(step: int, **more: float) -> dict:
    return {"kind": "step", "step": step, "grad_norm": 1.0, "utilisation": 0.21, **more}


def write_pretrain(directory: Path, steps: int = 600) -> None:
    draw = random.Random(1)
    lines = []
    for step in range(5, steps + 1, 5):
        loss = 2.6 + 5.0 * math.exp(-step / 70) + draw.gauss(0, 0.06)
        rate = 3e-3 * min(1, step / 20) * min(1, (600 - step) / 240 + 0.01)
        balance = {"load_max_over_mean": 1.15 + 1.1 * math.exp(-step / 60) + abs(draw.gauss(0, 0.04))}
        where = {"tokens": step * 8192, "seconds": step * 0.52}
        lines.append(_step(step, loss=loss, mtp_loss=loss + 0.6, learning_rate=rate, **balance, **where))
        if step % 100 == 0:
            lines.append(_load(draw, step, 0.12))
            bits = 1.68 + 2.2 * math.exp(-step / 110)
            lines.append({"kind": "eval", "step": step, "seconds": step * 0.52, "bits_per_byte": bits})
    _write(directory / "pretrain" / "metrics.jsonl", lines)


def write_sft(directory: Path) -> None:
    draw = random.Random(2)
    lines = []
    for step in range(2, 201, 2):
        loss = 0.5 + 2.2 * math.exp(-step / 30) + draw.gauss(0, 0.03)
        where = {"tokens": step * 8192, "seconds": step * 0.6, "learning_rate": 1e-3 * (1 - step / 210)}
        lines.append(_step(step, loss=loss, load_max_over_mean=1.25 + abs(draw.gauss(0, 0.05)), **where))
        if step % 50 == 0:
            grown = step / 200
            accuracy = _accuracy(free=0.02 + 0.29 * grown, think=0.02 + 0.55 * grown, direct=0.02 + 0.2 * grown)
            lines.append({"kind": "eval", "step": step, "seconds": step * 0.6, "accuracy": accuracy})
    lines.append(_load(draw, 200, 0.15))
    _write(directory / "sft" / "metrics.jsonl", lines)


def write_rl(directory: Path, steps: int = 60) -> None:
    draw = random.Random(3)
    lines = []
    for step in range(1, steps + 1):
        grown = 1 / (1 + math.exp(-(step - 24) / 6))
        more = {"reward": min(1.0, 0.33 + 0.56 * grown + draw.gauss(0, 0.03)), "think_rate": 0.45 + 0.53 * grown}
        more |= {"completion_tokens": 12 + 17 * grown + draw.gauss(0, 0.6), "kept_groups": 12, "logprob_gap": 0.002}
        lines.append(_step(step, loss=0.01, learning_rate=2e-4, tokens=step * 5000, seconds=step * 2.1, **more))
        if step % 10 == 0:
            accuracy = _accuracy(free=0.31 + 0.58 * grown, think=0.57 + 0.33 * grown, direct=0.22 + 0.02 * grown)
            lines.append({"kind": "eval", "step": step, "seconds": step * 2.1, "accuracy": accuracy})
    lines.append(_load(draw, steps, 0.15))
    _write(directory / "rl" / "metrics.jsonl", lines)
    _write(directory / "rl" / "samples.jsonl", _samples())


def _samples() -> list[dict]:
    lines = []
    for a, b in ((47, 38), (19, 64)):
        base = {"mode": "free", "prompt": f"What is {a} + {b}?", "expected": str(a + b)}
        thought = (
            f"{a % 10} + {b % 10} = {a % 10 + b % 10}, carry 1\n{a // 10} + {b // 10} + 1 = {a // 10 + b // 10 + 1}"
        )
        wrong = {"label": "before", "reasoning": None, "answer": str(a + b - 10), "correct": False}
        lines.append({**base, **wrong})
        lines.append({**base, "label": "after", "reasoning": thought, "answer": str(a + b), "correct": True})
    hostile = {
        "mode": "free",
        "prompt": HOSTILE,
        "expected": None,
        "reasoning": HOSTILE,
        "answer": "\ud800" + HOSTILE,
    }
    lines.append({**hostile, "label": "after", "correct": None})
    return lines


def entry(**more: object) -> Entry:
    base = {
        "run": "demo",
        "stage": "pretrain",
        "kind": "pretrain",
        "started": "2025-11-23T12:00:00Z",
        "tokens": 4_915_200,
        "flops": 1.2e13,
        "utilisation": 0.21,
        "seconds": 312.0,
        "peak_memory_bytes": 1_430_000_000,
        "joules": 9360.0,
        "joules_estimated": True,
        "price_per_hour": 0.08,
        "dollars": 312 / 3600 * 0.08,
        "steps": 600,
    }
    return Entry.model_validate(base | more)


def fill_ledger(path: Path) -> Ledger:
    ledger = Ledger(path)
    ledger.add(entry())
    half = {"stage": "sft", "kind": "sft", "tokens": 819_200, "flops": 2e12, "seconds": 60.0, "joules": 1800.0}
    for minute in (6, 8):
        ledger.add(entry(**half, steps=100, started=f"2025-11-23T12:0{minute}:00+00:00", dollars=60 / 3600 * 0.08))
    rl = {"stage": "rl", "kind": "rl", "tokens": 300_000, "flops": 9e11, "seconds": 126.0, "joules": 3780.0}
    ledger.add(
        entry(**rl, steps=60, utilisation=0.09, started="2025-11-23T12:10:00+00:00", dollars=126 / 3600 * 0.08)
    )
    return ledger


def make_run(directory: Path) -> Path:
    """A finished run: pretraining, SFT, RL, samples, recipe, environment, summary."""
    directory.mkdir(parents=True)
    (directory / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    environment = {
        "torch": "2.13.0",
        "python": "3.11.7",
        "cpu": "2 shared vCPUs",
        "threads": 1,
        "packages": {"numpy": "2"},
    }
    (directory / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    write_pretrain(directory)
    write_sft(directory)
    write_rl(directory)
    for stage in ("pretrain", "sft", "rl"):
        (directory / stage / "result.json").write_text('{"tokens": 10, "flops": 2e12, "seconds": 30.0, "steps": 5}')
    sizes = {"parameters_total": 5_210_000, "parameters_active": 2_100_000}
    cache = {"cache_bytes_per_token": 1600, "mha_cache_bytes_per_token": 12288}
    summary = {"name": "demo", "finished": True, "model": sizes | cache, "bits_per_byte": 1.7, "device": "cpu"}
    summary["accuracy"] = {"before": _accuracy(free=0.31), "after": _accuracy(free=0.89)}
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return directory


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "demo")


@pytest.fixture
def pretrain_only(tmp_path: Path) -> Path:
    """A run broken off inside pretraining: no summary, no samples, half a last line."""
    directory = tmp_path / "runs" / "early"
    write_pretrain(directory, steps=150)
    with (directory / "pretrain" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind":"step","step":155,"lo')
    return directory


@pytest.fixture
def make_entry():  # the function itself: tests import nothing from one another
    return entry


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return fill_ledger(tmp_path / "runs" / "ledger.sqlite")


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of recipes are kept in the cache folder: not in the user's."""
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path / "cache"))
