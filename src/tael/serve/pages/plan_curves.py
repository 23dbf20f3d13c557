"""Curves of a plan: days and dollars over the number of chips and over the link's speed, both in decades."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tael.cost import units
from tael.serve.pages.plan_answers import Curves, Point
from tael.serve.pages.plots import COLOURS, Chart, axis_of, ground

_CHIPS, _LINK = "chips", "link, GB/s one way"


def curve_charts(curves: Curves) -> list[Chart]:
    """Four charts, each with its words; one is left out where no point has a value."""
    wanted = [
        ("days-chips", "Days over chips", curves.over_chips, "days", _CHIPS, curves.chips),
        ("dollars-chips", "Dollars over chips", curves.over_chips, "dollars", _CHIPS, curves.chips),
        ("days-link", "Days over the link's speed", curves.over_link, "days", _LINK, curves.link),
        ("dollars-link", "Dollars over the link's speed", curves.over_link, "dollars", _LINK, curves.link),
    ]
    return [_chart(*each) for each in wanted if any(getattr(point, each[3]) is not None for point in each[2])]


def _chart(key: str, title: str, points: Sequence[Point], field: str, words: str, here: float) -> Chart:
    return Chart(key, title, _figure(points, field, words, here), summary(points, field, words, here))


def _figure(points: Sequence[Point], field: str, words: str, here: float) -> dict[str, Any]:
    values = [getattr(point, field) for point in points]
    form = "%{y:$.3s}" if field == "dollars" else "%{y:.3~g} days"
    colour = COLOURS[1 if field == "dollars" else 0]
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [point.at for point in points],
        "y": [None if value is None else float(f"{value:.6g}") for value in values],
        "name": field,
        "connectgaps": False,
        "line": {"color": colour, "width": 1.6},
        "marker": {
            "color": colour,
            "size": [12 if point.at == here else 5 for point in points],
            "symbol": ["diamond" if point.at == here else "circle" for point in points],
        },
        "hovertemplate": f"%{{x:,.4~g}} {words.partition(',')[0]}: {form}<extra></extra>",
    }
    across = axis_of(words, showgrid=False, type="log") | _ticks([point.at for point in points])
    vertical = axis_of(field, type="log") if _wide(values) else axis_of(field, rangemode="tozero")
    vertical |= {"tickformat": "~s"} | ({"tickprefix": "$"} if field == "dollars" else {})
    figure = ground([line], across, vertical)
    figure["layout"]["hovermode"] = "closest"
    return figure


def _ticks(places: Sequence[float]) -> dict[str, Any]:
    """At the points themselves: every second one where there are many."""
    chosen = list(places)[:: 2 if len(places) > 6 else 1]
    return {"tickmode": "array", "tickvals": chosen, "ticktext": [short(place) for place in chosen]}


def _wide(values: Sequence[float | None]) -> bool:
    """Whether the values span so much that only decades show them."""
    known = [value for value in values if value]
    return len(known) > 1 and max(known) > 8 * min(known)


def summary(points: Sequence[Point], field: str, words: str, here: float) -> str:
    """What the eye would see: ends, where we are, the best, and what cannot be planned."""
    known = [(point.at, value) for point in points if (value := getattr(point, field)) is not None]
    if not known:
        return "Nothing can be planned there."
    unit = "chips" if words == _CHIPS else "GB/s"
    ends = f"From {told(known[0][1], field)} at {short(known[0][0])} {unit} to {told(known[-1][1], field)} at "
    ends += f"{short(known[-1][0])}"
    now = next((value for at, value in known if at == here), None)
    least = min(known, key=lambda pair: pair[1])
    parts = [ends] if len(known) > 1 else []
    parts += [f"now {told(now, field)} at {short(here)}"] if now is not None else []
    parts += [f"least {told(least[1], field)} at {short(least[0])}"]
    missing = [short(point.at) for point in points if getattr(point, field) is None]
    parts += [f"not possible at {', '.join(missing)}"] if missing else []
    return "; ".join(parts) + "."


def told(value: float, field: str) -> str:
    if field == "dollars":
        return units.money(value)
    return f"{value:,.0f} days" if value >= 100 else f"{value:.3g} days"


def short(value: float) -> str:
    """A place on the axis: 32,768 as 32,768; 1048576 as 1.05M."""
    return f"{value:,.0f}" if 100 <= value < 1e6 else units.count(value) if value >= 1e6 else f"{value:.3g}"
