"""Curves of a comparison as one SVG: bits per byte over seconds, FLOPs or tokens, a thin line a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from markupsafe import escape

from tael.compare.record import Curve, Point
from tael.cost import units

Axis = Literal["seconds", "flops", "tokens"]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 780, 400, 56, 170, 16, 44
COLOURS = ("#eb6834", "#2a78d6", "#1baf7a", "#7b6ee0", "#c2418c", "#8a7a2f", "#4f8f9f", "#9a6b4f")
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #52514e } .grid { stroke: #e1e0d9 } .target { stroke: #52514e }
@media (prefers-color-scheme: dark) { text { fill: #c3c2b7 } .grid { stroke: #3a3a37 } .target { stroke: #c3c2b7 } }
"""
_SHOWN: dict[Axis, tuple[str, Callable[[float], str]]] = {
    "seconds": ("seconds of training", lambda value: f"{value:g} s"),
    "flops": ("floating-point operations", units.flops),
    "tokens": ("tokens", units.count),
}


def curves_picture(curves: Sequence[Curve], target: float | None = None, axis: Axis = "seconds") -> str:
    """An SVG that stands alone; names are escaped. `target` is drawn as a dashed line."""
    names = list(dict.fromkeys(curve.name for curve in curves))
    across = [_along(point, axis) for curve in curves for point in _late(curve)]
    up = [point.bits_per_byte for curve in curves for point in _late(curve)] + ([target] if target else [])
    to_x = _scale(min(across), max(across), LEFT, WIDTH - RIGHT)
    low, high = min(up), max(up)
    to_y = _scale(low - 0.03 * (high - low), high, HEIGHT - BOTTOM, TOP)
    parts = [_grid(math.exp(min(across)), math.exp(max(across)), low, high, axis, to_x, to_y)]
    if target is not None:
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{to_y(target):.1f}" y2="{to_y(target):.1f}"'
        parts.append(f'<line class="target" {ends} stroke-dasharray="5 4"/>')
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        own = [curve for curve in curves if curve.name == name]
        for curve in own:
            line = " ".join(f"{to_x(_along(p, axis)):.1f},{to_y(p.bits_per_byte):.1f}" for p in _late(curve))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        y = TOP + 14 + 20 * index
        x = WIDTH - RIGHT + 12
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{escape(name)}</text>')
    words = escape(_summary(curves, names, target))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">'
        f"<title>{words}</title><style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _late(curve: Curve) -> tuple[Point, ...]:
    """Without the first evaluations, whose large values would flatten the rest; a curve of few keeps all."""
    return curve.points[2:] if len(curve.points) > 5 else curve.points


def _along(point: Point, axis: Axis) -> float:
    """The logarithm of where a point stands; what took no time to speak of stands at the beginning."""
    return math.log(max(getattr(point, axis), 1e-4))


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (stop - start)


def _grid(
    left: float, right: float, low: float, high: float, axis: Axis, to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> str:  # fmt: skip
    title, shown = _SHOWN[axis]
    lines = []
    step = 10 ** math.floor(math.log10((high - low) or 1.0))
    step = step / 2 if (high - low) / step < 4 else step
    value = math.ceil(low / step) * step
    while value <= high:
        y = to_y(value)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        value += step
    for value in _round_numbers(left, right):
        x = to_x(math.log(value))
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        lines.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(shown(value))}</text>'
        )
    lines.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{title} (logarithmic); upwards: held-out bits per byte</text>')
    return "".join(lines)


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between the two; at most about eight."""
    first = math.floor(math.log10(low))
    found = [digit * 10.0**power for power in range(first, first + 20) for digit in (1, 2, 5)]
    found = [value for value in found if low <= value <= high]
    return found if len(found) <= 8 else [value for value in found if f"{value:e}"[0] == "1"]


def _summary(curves: Sequence[Curve], names: Sequence[str], target: float | None) -> str:
    ends = [
        f"{name} ends at {min(c.last.bits_per_byte for c in curves if c.name == name):.3f} bits per byte"
        for name in names
    ]
    return "; ".join(ends) + ("" if target is None else f"; the target is {target:.3f}")
