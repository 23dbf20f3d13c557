"""The report's figures as plain plotly dictionaries: data and layout, no styling that depends on the theme.

Colours are the names in PALETTE's light column; the page's script swaps them for the dark ones.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tael.cost.rundata import MODES, Line, RunRecord, StageRecord, column, number

Figure = dict[str, Any]

PALETTE = {  # light -> dark
    "#2a78d6": "#3987e5",  # blue
    "#eb6834": "#d95926",  # orange
    "#1baf7a": "#199e70",  # green
    "#4a3aa7": "#9085e9",  # violet
    "#52514e": "#c3c2b7",  # text
    "#e1e0d9": "#2c2c2a",  # grid
    "#c3c2b8": "#4a4a46",  # axis lines, stage marks
    "#fcfcfb": "#1a1a19",  # surface
    "#f0efec": "#383835",  # neutral middle of the heatmap
}
BLUE, ORANGE, GREEN, VIOLET, TEXT, GRID, AXIS, SURFACE, NEUTRAL = PALETTE
MODE_COLOURS = dict(zip(MODES, (BLUE, ORANGE, GREEN), strict=True))
MODE_NAMES = {"free": "free (the model chooses)", "think": "must think", "direct": "must answer at once"}
MAX_POINTS = 2000


def _axis(**more: Any) -> dict[str, Any]:
    base = {
        "gridcolor": GRID,
        "linecolor": AXIS,
        "zeroline": False,
        "automargin": True,
        "ticks": "",
        "fixedrange": True,
    }
    if "title" in more:
        more["title"] = {"text": more["title"], "standoff": 8, "font": {"size": 12}}
    return base | more


def _layout(height: int, **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": TEXT},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": SURFACE, "bordercolor": AXIS, "font": {"color": TEXT}},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        "showlegend": True,
    } | more


def _line(x: list[Any], y: list[Any], name: str, colour: str, **more: Any) -> dict[str, Any]:
    """A trace without its gaps; long ones are thinned to MAX_POINTS (first and last stay)."""
    stride = max(1, -(-len(y) // MAX_POINTS))
    keep = [i for i, value in enumerate(y) if value is not None and (i % stride == 0 or i == len(y) - 1)]
    trace = {
        "type": "scatter",
        "mode": "lines+markers" if len(keep) <= 2 else "lines",
        "x": [x[i] for i in keep],
        "y": [y[i] for i in keep],
        "name": name,
        "line": {"color": colour, "width": 2},
    }
    if "choices" in more:
        more["choices"] = {key: [values[i] for i in keep] for key, values in more["choices"].items()}
    return trace | more


def _positions(stage: StageRecord, lines: list[Line]) -> dict[str, list[float | None]]:
    """Where `lines` of `stage` stand on each possible x axis: minutes, tokens, steps."""
    steps = column(lines, "step")
    minutes = [None if s is None else s / 60 for s in column(lines, "seconds")]
    known = [(number(line.get("step")) or 0.0, number(line.get("tokens"))) for line in stage.steps]
    tokens = [_interpolate([(s, t) for s, t in known if t is not None], step) for step in steps]
    return {"minutes": minutes, "tokens": tokens, "steps": steps}


def _interpolate(points: list[tuple[float, float]], at: float | None) -> float | None:
    if at is None or not points:
        return None
    for (left, low), (right, high) in pairwise(points):
        if left <= at <= right:
            return low + (high - low) * (at - left) / ((right - left) or 1)
    return points[0][1] if at < points[0][0] else points[-1][1]


def loss_figure(stage: StageRecord) -> Figure | None:
    """Training loss, held-out bits per byte (where evaluated) and learning rate over time, tokens or steps."""
    where = _positions(stage, stage.steps)
    loss = column(stage.steps, "loss")
    if not any(value is not None for value in loss):
        return None
    bits = column(stage.evals, "bits_per_byte")
    has_bits = any(value is not None for value in bits)
    traces = [_line(where["minutes"], loss, "training loss", BLUE, choices=where, line={"color": BLUE, "width": 1.5})]
    mtp = column(stage.steps, "mtp_loss")
    if any(mtp):
        thin = {"color": VIOLET, "width": 1}
        traces.append(_line(where["minutes"], mtp, "MTP loss", VIOLET, choices=where, line=thin))
    if has_bits:
        at = _positions(stage, stage.evals)
        marks = {"mode": "lines+markers", "yaxis": "y2", "choices": at}
        traces.append(_line(at["minutes"], bits, "held-out bits per byte", ORANGE, **marks))
    rate = column(stage.steps, "learning_rate")
    thin = {"color": TEXT, "width": 1.5}
    traces.append(
        _line(where["minutes"], rate, "learning rate", TEXT, yaxis="y3", choices=where, line=thin, showlegend=False)
    )
    bands = {"y": [0.55, 1], "y2": [0.24, 0.47], "y3": [0, 0.15]} if has_bits else {"y": [0.3, 1], "y3": [0, 0.2]}
    layout = _layout(
        520 if has_bits else 380,
        xaxis=_axis(title="minutes", anchor="y3", showgrid=False),
        yaxis=_axis(title="nats a token", domain=bands["y"]),
        yaxis3=_axis(title="rate", domain=bands["y3"], nticks=3, rangemode="tozero"),
    )
    if has_bits:
        layout["yaxis2"] = _axis(title="bits a byte", domain=bands["y2"], nticks=5)
    return {"data": traces, "layout": layout}


def reward_figure(stage: StageRecord) -> Figure | None:
    """Reward and held-out accuracy (left) with completion length (right) over RL steps; below, the think rate."""
    steps = column(stage.steps, "step")
    reward = column(stage.steps, "reward")
    if not any(value is not None for value in reward):
        return None
    length = column(stage.steps, "completion_tokens")
    think = column(stage.steps, "think_rate")
    free = stage.accuracies("free")
    dashed = {"color": ORANGE, "width": 2, "dash": "dot"}
    traces = [
        _line(steps, reward, "reward", BLUE),
        _line(steps, length, "completion length (right)", ORANGE, yaxis="y2", line=dashed),
    ]
    if free:
        x, y = [line["step"] for line, _ in free], [value.share for _, value in free]
        traces.append(_line(x, y, "held-out accuracy", GREEN, mode="lines+markers"))
    traces.append(_line(steps, think, "think rate", VIOLET, yaxis="y3"))
    ticks = {"tickmode": "auto", "nticks": 6}  # else plotly puts them at the left axis's heights, on odd numbers
    share = {"range": [-0.02, 1.04], "tickformat": ".0%"}
    plain = all(value is None or 0 <= value <= 1 for value in reward)  # else: shaped rewards, any range
    layout = _layout(
        480,
        xaxis=_axis(title="RL steps", anchor="y3", showgrid=False),
        yaxis=_axis(title="reward, accuracy", domain=[0.36, 1], **(share if plain else {})),
        yaxis2=_axis(title="tokens", overlaying="y", side="right", showgrid=False, rangemode="tozero", **ticks),
        yaxis3=_axis(title="thinks", domain=[0, 0.26], nticks=4, **share),
    )
    return {"data": traces, "layout": layout}


def _timeline(stages: list[StageRecord]) -> tuple[dict[str, float], dict[str, Any]]:
    """Minutes at which each stage begins when put end to end, and layout parts that mark the borders."""
    offsets: dict[str, float] = {}
    elapsed = 0.0
    shapes, notes = [], []
    for stage in stages:
        offsets[stage.name] = elapsed
        mark = {"x0": elapsed, "x1": elapsed, "y0": 0, "y1": 1, "yref": "paper", "type": "line", "layer": "below"}
        if elapsed:
            shapes.append(mark | {"line": {"color": AXIS, "width": 1}})
        note = {"x": elapsed, "y": 1, "yref": "paper", "text": _plain(stage.name), "showarrow": False}
        notes.append(note | {"xanchor": "left", "yanchor": "bottom", "font": {"color": TEXT, "size": 12}})
        elapsed += stage.seconds / 60
    return offsets, {"shapes": shapes, "annotations": notes}


def accuracy_figure(run: RunRecord) -> Figure | None:
    """Held-out accuracy through SFT and RL for each way of answering, with Wilson 95% intervals as bands."""
    stages = [stage for stage in run.stages if any(stage.accuracies(mode) for mode in MODES)]
    if not stages:
        return None
    offsets, marks = _timeline(stages)
    traces = []
    for mode in MODES:
        x, y, low, high = [], [], [], []
        for stage in stages:
            for line, value in stage.accuracies(mode):
                lower, upper = value.interval()
                x.append(offsets[stage.name] + (number(line.get("seconds")) or 0.0) / 60)
                y.append(value.share)
                low.append(lower)
                high.append(upper)
        if x:
            traces.extend(_band(x, low, high, MODE_COLOURS[mode], mode))
            # ± in the hover text, since bands carry none of their own
            span = [f"{a:.0%} to {b:.0%}" for a, b in zip(low, high, strict=True)]
            hover = "%{y:.1%} (95%: %{customdata})"
            traces.append(
                _line(x, y, MODE_NAMES[mode], MODE_COLOURS[mode], mode="lines+markers", legendgroup=mode)
                | {"customdata": span, "hovertemplate": hover}
            )
    layout = _layout(
        400,
        xaxis=_axis(title="minutes of training", showgrid=False),
        yaxis=_axis(title="correct", range=[-0.02, 1.02], tickformat=".0%"),
        **marks,
    )
    layout["legend"]["y"] = 1.08
    return {"data": traces, "layout": layout}


def _band(x: list[float], low: list[float], high: list[float], colour: str, group: str) -> list[dict[str, Any]]:
    quiet = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False, "legendgroup": group}
    none = {"color": colour, "width": 0}
    return [
        quiet | {"x": x, "y": low, "line": none},
        quiet | {"x": x, "y": high, "line": none, "fill": "tonexty", "fillcolor": colour + "22"},
    ]


def expert_loads(stage: StageRecord) -> list[list[float]]:
    """The last load line as multiples of a fair share: one list a MoE layer; empty when there is none."""
    layers = stage.loads[-1].get("layers") if stage.loads else None
    rows = []
    for layer in layers if isinstance(layers, list) else []:
        shares = [number(share) for share in layer] if isinstance(layer, list) else []
        known = [share for share in shares if share is not None and share >= 0]
        if known and len(known) == len(shares) and sum(known) > 0:
            rows.append([share * len(known) / sum(known) for share in known])
    return rows


def balance_figure(stage: StageRecord) -> Figure | None:
    """Heatmap of the last load line: expert by layer, 1 is a fair share."""
    rows = expert_loads(stage)
    if not rows:
        return None
    small = len(rows) <= 16 and max(map(len, rows)) <= 16
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": rows,
        "zmin": 0,
        "zmax": 2,
        "colorscale": [[0, BLUE], [0.5, NEUTRAL], [1, ORANGE]],
        "xgap": 2 if small else 0,
        "ygap": 2 if small else 0,
        "colorbar": {"tickvals": [0, 1, 2], "ticktext": ["0×", "fair", "2×"], "thickness": 10, "outlinewidth": 0},
        "hovertemplate": "MoE layer %{y}, expert %{x}: %{z:.2f} × fair share<extra></extra>",
    }
    if small:
        trace |= {"texttemplate": "%{z:.1f}", "textfont": {"size": 11}}
    layout = _layout(
        max(200, min(520, 90 + 28 * len(rows))),
        hovermode="closest",
        showlegend=False,
        xaxis=_axis(title="expert", showgrid=False, tickformat="d"),
        yaxis=_axis(
            title="MoE layer", showgrid=False, autorange="reversed", tickformat="d", dtick=max(1, len(rows) // 8)
        ),
    )
    return {"data": [trace], "layout": layout}


def imbalance_figure(run: RunRecord) -> Figure | None:
    """Load of the busiest expert over the mean, through all stages."""
    key = "load_max_over_mean"
    stages = [stage for stage in run.stages if any(v is not None for v in column(stage.steps, key))]
    if not stages:
        return None
    offsets, marks = _timeline(stages)
    x: list[Any] = []
    y: list[Any] = []
    for stage in stages:
        seconds = column(stage.steps, "seconds")
        x.extend(None if s is None else offsets[stage.name] + s / 60 for s in seconds)
        y.extend(column(stage.steps, key))
    layout = _layout(
        260,
        showlegend=False,
        margin={"l": 8, "r": 8, "t": 26, "b": 8},
        xaxis=_axis(title="minutes of training", showgrid=False),
        yaxis=_axis(title="max / mean", rangemode="tozero"),
        **marks,
    )
    return {"data": [_line(x, y, "busiest expert / mean", BLUE)], "layout": layout}


def prediction_figure(stages: list[tuple[str, float, float]]) -> Figure | None:
    """(name, predicted, measured) seconds as pairs of bars, the predicted ones hollow; None without any."""
    if not stages:
        return None
    longest = max(max(one, other) for _, one, other in stages)
    divisor, unit = next(pair for pair in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
                         if longest >= 3 * pair[0] or pair[0] == 1)  # fmt: skip
    names = [_plain(name) for name, _, _ in stages]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "y": names,
            "x": [seconds / divisor for seconds in values],
            "name": words,
            "marker": {"color": fill, "line": {"color": colour, "width": 2}},
            "hovertemplate": f"%{{x:.3g}} {unit}",
        }
        for values, words, colour, fill in (
            ([one for _, one, _ in stages], "predicted", BLUE, SURFACE),
            ([other for _, _, other in stages], "measured", ORANGE, ORANGE),
        )
    ]
    layout = _layout(
        90 + 54 * len(stages),
        barmode="group",
        bargap=0.3,
        hovermode="y unified",
        xaxis=_axis(title=unit, rangemode="tozero"),
        yaxis=_axis(autorange="reversed", showgrid=False),
    )
    return {"data": traces, "layout": layout}


def _plain(text: str) -> str:
    """Plotly reads a small HTML in labels; a stage's name is shown as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
