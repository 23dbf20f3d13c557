"""Tables and fitted lines of bench/cost_to_quality.py: curves and standings in, what results.md shows out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from common import print_table

from tael.compare import Curve
from tael.compare.standings import Standings
from tael.evals.statistics import Spread

Table = dict[str, Any]
PAIRS = (("meta", "tael"), ("meta", "deepseek"), ("deepseek", "tael"))


def power_law(curves: Sequence[Curve]) -> tuple[float, float]:
    """(a, b) of bits per byte = a seconds^-b, least squares over the ends of `curves` in logarithms."""
    x = [math.log(curve.last.seconds) for curve in curves]
    y = [math.log(curve.last.bits_per_byte) for curve in curves]
    slope, offset = statistics.linear_regression(x, y)
    return math.exp(offset), -slope


def crossing(one: tuple[float, float], other: tuple[float, float]) -> float | None:
    """Seconds at which two such laws meet; None where they are parallel."""
    if math.isclose(one[1], other[1], rel_tol=1e-3):
        return None
    exponent = math.log(one[0] / other[0]) / (one[1] - other[1])
    return math.exp(exponent) if abs(exponent) < 200 else None


def _spread(values: Spread, form: str) -> str:
    return f"{values.median:{form}} ({values.low:{form}} to {values.high:{form}})"


def race_table(result: Standings) -> Table:
    rows = []
    for row in result.rows:
        rows.append([
            row.name,
            f"{row.parameters_total / 1e6:.2f}M / {row.parameters_active / 1e6:.2f}M",
            f"{row.tokens_per_second:,.0f}",
            _spread(row.final, ".3f"),
            _spread(row.seconds, ".0f") if row.seconds else f"{row.reached} of {row.seeds} seeds",
            f"{row.tokens.median / 1e6:.2f}M" if row.tokens else "",
            f"{row.flops.median / 1e12:.2f}T" if row.flops else "",
            "" if row.dollars is None else f"${row.dollars:.5f}",
            _spread(row.cheaper, ".2f") if row.cheaper else "",
        ])  # fmt: skip
    columns = ["recipe", "parameters / active", "tokens/s", "ends at, bits/byte", "seconds to target", "tokens",
               "FLOPs", "dollars", "times cheaper than meta"]  # fmt: skip
    notes = [f"Target: {result.target:.4f} held-out bits per byte, where meta ends on its worst seed. Median, least "
             f"and most over {result.rows[0].seeds} seeds; the quotient is taken seed by seed. A core costs "
             f"${result.dollars_per_hour:.2f} an hour."]  # fmt: skip
    return {"columns": columns, "rows": rows, "notes": notes}


def tuning_table(curves: Sequence[Curve]) -> Table:
    rows = [[c.name, str(c.last.step), f"{c.last.bits_per_byte:.4f}", f"{c.last.seconds:.0f}"] for c in curves]
    notes = [
        "On a seed that nothing else uses: baselines at a quarter of their steps, modern at half, unless said. "
        "Where a rate was tried whole, that decides."
    ]
    return {"columns": ["tried", "steps", "ends at, bits/byte", "seconds"], "rows": rows, "notes": notes}


def ablation_table(curves: Sequence[Curve], target: float) -> Table:
    """Against the whole recipe of the same seed: bits per byte at equal steps, and time."""
    whole = {c.seed: c for c in curves if c.name == "deepseek"}
    rows = []
    for name in dict.fromkeys(c.name for c in curves):
        own = [c for c in curves if c.name == name and c.seed in whole]
        gaps = [c.last.bits_per_byte - whole[c.seed].last.bits_per_byte for c in own]
        times = [c.last.seconds / whole[c.seed].last.seconds for c in own]
        reached = [c.interpolated(target) for c in own]
        seconds = [s for s in reached if s is not None]
        rows.append([
            name,
            f"{own[0].parameters_total / 1e6:.2f}M / {own[0].parameters_active / 1e6:.2f}M",
            f"{statistics.mean(c.last.bits_per_byte for c in own):.4f}",
            " ".join(f"{gap:+.4f}" for gap in gaps),
            f"{statistics.mean(times):.2f}",
            f"{statistics.mean(seconds):.0f}" if len(seconds) == len(own) else "not reached",
            f"{own[0].cache_bytes_per_token:,}",
        ])  # fmt: skip
    columns = ["DeepSeek's parts", "parameters / active", "ends at, bits/byte", "change, by seed", "time a step",
               "seconds to target", "cache, bytes a token"]  # fmt: skip
    notes = ["Equal steps and batches; time over the whole recipe's. Seconds to the race's target on a "
             "straight line between evaluations. Emulated FP8 shows quality alone: it saves nothing."]  # fmt: skip
    return {"columns": columns, "rows": rows, "notes": notes}


def scaling_table(scaled: dict[str, list[Curve]], sizes: Sequence[str]) -> tuple[Table, dict[str, Any]]:
    """The ladder: where each recipe ends at each size, when it was as good as meta ends there, fitted lines."""
    rows = []
    for name, curves in scaled.items():
        for size, c, theirs in zip(sizes, curves, scaled["meta"], strict=True):
            reached = c.interpolated(theirs.last.bits_per_byte)
            rows.append([
                f"{name}, {size}",
                f"{c.parameters_total / 1e6:.2f}M / {c.parameters_active / 1e6:.2f}M",
                f"{c.last.tokens / 1e6:.2f}M",
                f"{c.last.flops / 1e12:.2f}T",
                f"{c.last.seconds:.0f}",
                f"{c.last.bits_per_byte:.4f}",
                "not reached" if reached is None else f"{reached:.0f}",
                "" if reached is None else f"{theirs.last.seconds / reached:.1f}",
            ])  # fmt: skip
    laws = {name: power_law(curves) for name, curves in scaled.items()}
    said = "; ".join(f"{name} {a:.3f}, {b:.4f}" for name, (a, b) in laws.items())
    notes = [
        "Width, depth and tokens grow together; one seed: a direction.",
        f"bits per byte = a x seconds^-b over the three: {said}.",
    ]
    crossings = {
        f"{one} and {other}": crossing(laws[one], laws[other]) for one, other in PAIRS if {one, other} <= {*laws}
    }
    for pair, seconds in crossings.items():
        met = "the lines do not cross" if seconds is None else f"the lines cross at {seconds:.3g} core-seconds"
        notes.append(f"{pair}: {met}.")
    columns = ["layers x width", "parameters / active", "tokens", "FLOPs", "seconds", "ends at, bits/byte",
               "seconds to meta's end at this size", "times cheaper"]  # fmt: skip
    return {"columns": columns, "rows": rows, "notes": notes}, {"laws": laws, "crossings": crossings}


def inference_table(inference: Sequence[dict[str, Any]]) -> Table:
    rows = [[r["name"], f"{r['cache_bytes_per_token']:,}", f"{r['decode_tokens_per_second']:,}"] for r in inference]
    notes = ["Tael's engine for all, greedy, 64 tokens of prompt, 128 of answer, fp32, one thread. "
             "QK-norm (modern, tael) runs on torch, the others on the C++ operator."]  # fmt: skip
    return {"columns": ["Inference", "cache, bytes a token (16-bit)", "tokens/s"], "rows": rows, "notes": notes}


def print_rows(table: Table) -> None:
    print_table("", table["columns"], table["rows"])
    for note in table["notes"]:
        print(note)
