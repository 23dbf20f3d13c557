"""Who reached the baseline's quality, and what each had spent by then."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tael.compare.record import Curve, Point
from tael.errors import TaelError, did_you_mean
from tael.evals.statistics import Spread


@dataclass(frozen=True)
class Standing:
    """One contestant over its seeds: medians, least and most. What it spent to the target is None unless every seed
    reached it."""

    name: str
    seeds: int
    reached: int
    parameters_total: int
    parameters_active: int
    cache_bytes_per_token: int
    flops_per_token: float
    tokens_per_second: float
    final: Spread
    """Bits per byte after the last step."""
    seconds: Spread | None
    tokens: Spread | None
    flops: Spread | None
    dollars: float | None
    """At the median of the seconds."""
    cheaper: Spread | None
    """Seconds of the baseline over its own, seed by seed."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Standings:
    """All contestants against `target` bits per byte, the baseline's last quality on its worst seed."""

    baseline: str | None
    target: float
    clock: str
    threads: int
    dollars_per_hour: float
    rows: tuple[Standing, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def standings(
    curves: Sequence[Curve], dollars_per_hour: float, baseline: str | None = None, target: float | None = None
) -> Standings:
    """Compare `curves` at the quality that the contestant `baseline` ends at on every seed, or at `target`.

    dollars_per_hour: of the cores that one contestant occupies. Raises TaelError for an unknown baseline, and
    where neither baseline nor target is given.
    """
    names = list(dict.fromkeys(curve.name for curve in curves))
    if baseline is not None and baseline not in names:
        raise TaelError(f"no contestant is named '{baseline}'{did_you_mean(baseline, names)}")
    if target is None:
        if baseline is None:
            raise TaelError("compare at which quality? Name a baseline or a target in bits per byte")
        target = max(curve.last.bits_per_byte for curve in curves if curve.name == baseline)
    reference = {c.seed: p for c in curves if c.name == baseline and (p := c.reach(target)) is not None}
    rows = [_standing([c for c in curves if c.name == name], target, reference, dollars_per_hour) for name in names]
    first = curves[0]
    return Standings(baseline, target, first.clock, first.threads, dollars_per_hour, tuple(rows))


def _standing(curves: list[Curve], target: float, reference: dict[int, Point], per_hour: float) -> Standing:
    points = [curve.reach(target) for curve in curves]
    there = [point for point in points if point is not None]
    whole = len(there) == len(curves)
    pairs = [
        (reference[c.seed].seconds, p.seconds)
        for c, p in zip(curves, points, strict=True)
        if p is not None and c.seed in reference
    ]
    seconds = Spread.extremes([point.seconds for point in there]) if whole else None
    first = curves[0]
    return Standing(
        name=first.name,
        seeds=len(curves),
        reached=len(there),
        parameters_total=first.parameters_total,
        parameters_active=first.parameters_active,
        cache_bytes_per_token=first.cache_bytes_per_token,
        flops_per_token=first.flops_per_token,
        tokens_per_second=statistics.median(c.last.tokens / max(c.last.seconds, 1e-9) for c in curves),
        final=Spread.extremes([curve.last.bits_per_byte for curve in curves]),
        seconds=seconds,
        tokens=Spread.extremes([point.tokens for point in there]) if whole else None,
        flops=Spread.extremes([point.flops for point in there]) if whole else None,
        dollars=None if seconds is None else seconds.median / 3600 * per_hour,
        cheaper=Spread.extremes([theirs / max(own, 1e-9) for theirs, own in pairs]) if whole and pairs else None,
    )
