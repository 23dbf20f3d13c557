"""Charts on a page: drawn once, then changed in place, each with its words for those who cannot see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui
from nicegui.element import Element

from tael.serve.pages.plots import AXES, Chart
from tael.serve.pages.run_parts import say
from tael.serve.pages.widgets import Field, choice_field, text


class Charts:
    """Plots with their words, updated in place."""

    def __init__(self, classes: str = "") -> None:
        self._box = ui.element("div").classes(f"charts {classes}")
        self._shown: dict[str, tuple[ui.plotly, Element]] = {}

    def show(self, charts: list[Chart]) -> None:
        if [chart.key for chart in charts] != list(self._shown):
            self._box.clear()
            with self._box:
                self._shown = {chart.key: self._build(chart) for chart in charts}
            return
        for chart in charts:
            plot, words = self._shown[chart.key]
            if plot.figure != chart.figure:
                plot.update_figure(chart.figure)
                plot.props["aria-label"] = f"{chart.title}: {chart.summary}"
                say(words, chart.summary)

    @staticmethod
    def _build(chart: Chart) -> tuple[ui.plotly, Element]:
        with ui.element("figure"):
            text(chart.title, "h4")
            plot = ui.plotly(chart.figure).classes("plot")
            plot.props.update({"role": "img", "aria-label": f"{chart.title}: {chart.summary}"})
            return plot, text(chart.summary, "figcaption")


def axis_field(on_change: Callable[[], Any]) -> Field:
    """What the curves stand over."""
    return choice_field("Curves over", {**AXES}, "steps", on_change=on_change)
