"""Curves as plain plotly dictionaries, the same for dark and light.

Lines have colours that stand out on both grounds, and a dash of their own, so that nobody needs to tell colours
apart; words and grid take the page's colours from static/runs.css.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tael.cost import units
from tael.serve.run_views import Axis, Series, StageView

Figure = dict[str, Any]

COLOURS = ("#2a7fd4", "#d9631e", "#1a9c72", "#b0559f", "#9a7b14", "#7a78d8")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
GREY = "#85878a"
"""For grids and words where the style sheet does not reach."""


@dataclass(frozen=True)
class Quantity:
    """How one metric is written: its name, its unit (on the axis), how its values are shown."""

    name: str
    unit: str
    form: str = ".4g"
    share: bool = False


QUANTITIES = {
    "loss": Quantity("training loss", "nats a token"),
    "mtp_loss": Quantity("MTP loss", "nats a token"),
    "bits_per_byte": Quantity("held-out text", "bits a byte"),
    "reward": Quantity("reward", "share of answers", ".1%", True),
    "think_rate": Quantity("answers that think", "share of answers", ".1%", True),
    "completion_tokens": Quantity("length of answers", "tokens"),
    "accuracy.free": Quantity("free to think", "right, share of problems", ".1%", True),
    "accuracy.think": Quantity("must think", "right, share of problems", ".1%", True),
    "accuracy.direct": Quantity("no thinking", "right, share of problems", ".1%", True),
    "load_max_over_mean": Quantity("busiest expert of any layer", "max over mean load"),
    "tokens_per_second": Quantity("speed", "tokens a second", ".3s"),
    "learning_rate": Quantity("learning rate", "learning rate"),
    "utilisation": Quantity("utilisation", "share of the matrix peak", ".1%", True),
}
AXES: dict[Axis, str] = {"steps": "steps", "tokens": "tokens", "seconds": "time", "dollars": "dollars"}


@dataclass(frozen=True)
class Chart:
    """A figure with its words: `summary` says in a sentence what the eye would see."""

    key: str
    title: str
    figure: Figure
    summary: str


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    name: str
    series: Series
    place: int
    """Which colour and dash."""


def stage_charts(stage: StageView, axis: Axis) -> list[Chart]:
    """All charts of one stage that have something to show."""
    groups = [
        ("loss", "Loss", ("loss", "mtp_loss")),
        ("bits", "Held-out text", ("bits_per_byte",)),
        ("reward", "Reward and thinking", ("reward", "think_rate")),
        ("accuracy", "Held-out accuracy", ("accuracy.free", "accuracy.think", "accuracy.direct")),
        ("length", "Length of answers", ("completion_tokens",)),
        ("balance", "Expert balance", tuple(name for name in stage.series if name.startswith("balance."))),
        ("speed", "Speed", ("tokens_per_second",)),
        ("rate", "Learning rate", ("learning_rate",)),
    ]
    if stage.kind == "rl":  # the loss of a policy gradient says nothing to a reader
        groups = groups[1:]
    charts = []
    for key, title, names in groups:
        found = [(name, stage.series[name]) for name in names if name in stage.series]
        if found:
            charts.append(_balance(stage, found, axis) if key == "balance" else _chart(key, title, found, axis))
    return charts


def _chart(key: str, title: str, found: list[tuple[str, Series]], axis: Axis) -> Chart:
    first = QUANTITIES[found[0][0]]
    curves = [Curve(QUANTITIES[name].name, series, place) for place, (name, series) in enumerate(found)]
    words = "; ".join(f"{QUANTITIES[name].name} {span(series, QUANTITIES[name])}" for name, series in found)
    return Chart(key, title, chart(curves, axis, first), f"{words}.")


def _balance(stage: StageView, found: list[tuple[str, Series]], axis: Axis) -> Chart:
    """A line a layer; of many layers only the busiest and the calmest at the end, and the middle one."""
    unit = Quantity("busiest expert", "max over mean load")
    if len(found) > len(COLOURS):
        ranked = sorted(found, key=lambda pair: pair[1].values[-1])
        found = [ranked[-1], ranked[len(ranked) // 2], ranked[0]]
    names = [f"MoE layer {name.partition('.')[2]}" for name, _ in found]
    curves = [Curve(name, series, i) for i, (name, (_, series)) in enumerate(zip(names, found, strict=True))]
    last = [series.values[-1] for _, series in found]
    words = (
        f"The busiest expert of a layer gets {min(last):.2f} to {max(last):.2f} times the mean load at the last "
        f"measurement; 1 is perfect balance."
    )
    return Chart("balance", "Expert balance", chart(curves, axis, unit), words)


def span(series: Series, quantity: Quantity) -> str:
    """As in `from 7.681 to 4.139`, or the one value there is."""
    first, last = (_shown(series.values[i], quantity) for i in (0, -1))
    return f"from {first} to {last}" if len(series.values) > 1 else first


def _shown(value: float, quantity: Quantity) -> str:
    return units.count(value) if quantity.form == ".3s" else format(value, quantity.form)


def comparison(runs: Sequence[tuple[str, Series]], name: str, axis: Axis) -> Figure:
    """The same quantity of several runs, overlaid."""
    return chart([Curve(run, series, place) for place, (run, series) in enumerate(runs)], axis, QUANTITIES[name])


def chart(curves: Iterable[Curve], axis: Axis, quantity: Quantity) -> Figure:
    """Lines over `axis`, which begins at 0."""
    curves = list(curves)
    scale, horizontal = _horizontal(axis, max((curve.series.along(axis)[-1] for curve in curves), default=0.0))
    traces = [_trace(curve, axis, scale, quantity) for curve in curves]
    vertical = axis_of(quantity.unit) | ({"tickformat": ".0%", "rangemode": "tozero"} if quantity.share else {})
    if quantity.form == ".3s":
        vertical |= {"tickformat": "~s", "rangemode": "tozero"}
    if quantity.unit == "learning rate":  # a constant one would else stand in the middle of -1 to 1
        vertical |= {"rangemode": "tozero", "exponentformat": "power"}
    across = axis_of(horizontal, showgrid=False, rangemode="tozero")
    across |= {"tickprefix": "$"} if axis == "dollars" else {"tickformat": "~s"} if axis == "tokens" else {}
    return ground(traces, across, vertical)


def ground(traces: list[dict[str, Any]], across: dict[str, Any], vertical: dict[str, Any]) -> Figure:
    """A figure of `traces` over two axes, in the look that all charts share."""
    layout = {
        "height": 260,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12.5, "color": GREY},
        "hovermode": "x unified" if len(traces) < 7 else "closest",
        "showlegend": len(traces) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        "xaxis": across,
        "yaxis": vertical,
    }
    return {"data": traces, "layout": layout, "config": {"displayModeBar": False, "scrollZoom": False}}


def _trace(curve: Curve, axis: Axis, scale: float, quantity: Quantity) -> dict[str, Any]:
    few = len(curve.series.values) <= 24
    look = curve.place % len(COLOURS)
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "x": [_short(value / scale) for value in curve.series.along(axis)],
        "y": [_short(value) for value in curve.series.values],
        "name": plain(curve.name),
        "line": {"color": COLOURS[look], "width": 1.6, "dash": DASHES[look]},
        "marker": {"size": 5, "color": COLOURS[look]},
        "hovertemplate": f"%{{y:{quantity.form}}}",
    }


def _short(value: float) -> float:
    """Six digits are more than a plot can show, and half as long to send."""
    return float(f"{value:.6g}")


def _horizontal(axis: Axis, largest: float) -> tuple[float, str]:
    """(what to divide by, the axis's words with their unit)."""
    if axis == "seconds":
        scale, unit = next(pair for pair in ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
                           if largest >= 3 * pair[0] or pair[0] == 1)  # fmt: skip
        return scale, f"time in the stage ({unit})"
    return 1, {"steps": "steps", "tokens": "tokens", "dollars": "dollars"}[axis]


def axis_of(words: str, **more: Any) -> dict[str, Any]:
    """An axis with its words and unit."""
    title = {"text": words, "standoff": 6, "font": {"size": 12.5}}
    base = {"title": title, "gridcolor": GREY, "zeroline": False, "automargin": True, "fixedrange": True, "nticks": 6}
    return base | more


def plain(text: str) -> str:
    """Plotly reads a small HTML in names; a run's name is shown as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
