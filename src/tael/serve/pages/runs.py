"""The page of runs: all of them at the left, the chosen one live, or several laid over each other.

with frame("Runs", "/runs"):
    runs_page(runbook, caller)         ?run=NAME or ?compare=NAME,NAME says what is shown at first

report_response(runbook, name)         for the address /runs/NAME/report, to which the page links
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from markupsafe import Markup, escape
from nicegui import app, run, ui

from tael.errors import TaelError
from tael.serve.caller import Caller
from tael.serve.pages import run_parts
from tael.serve.pages.plots import AXES, QUANTITIES, Chart, comparison, stage_charts
from tael.serve.pages.run_charts import Charts, axis_field
from tael.serve.pages.run_parts import say
from tael.serve.pages.start_sheet import StartSheet
from tael.serve.pages.widgets import button, choice_field, html, text
from tael.serve.run_views import Axis, RunHead, RunView, Series
from tael.serve.runs import RunBook

SECONDS_BETWEEN_LOOKS = 2.0
MOST_COMPARED = 6
STYLE = Path(__file__).with_name("static") / "runs.css"


def runs_page(runbook: RunBook, caller: Caller | None) -> None:
    """The content of /runs. `caller` None may look, not start or stop."""
    add_style()
    ui.add_head_html(QUIET)
    RunsPage(runbook, may_steer=caller is not None).build(dict(ui.context.client.request.query_params))


def add_reports(runbook: RunBook, asks: Callable[[Request], Caller | None]) -> None:
    """Register /runs/NAME/report, to which the page links. `asks` tells who asks; None is sent to /login."""

    @app.get("/runs/{name}/report")
    def report(request: Request, name: str) -> Response:
        if asks(request) is None:
            return RedirectResponse("/login", 303)
        try:
            return HTMLResponse(run_parts.legible(runbook.report(name)))
        except TaelError as error:
            return HTMLResponse(f"<!DOCTYPE html><title>Tael</title><p>{escape(str(error))}</p>", 404)


# NiceGUI begins to watch a plot's size after plotly has come; one that was taken away meanwhile then complains.
QUIET = """<script>addEventListener("unhandledrejection", (event) => {
  if (String(event.reason).includes("must be passed a displayed plot")) event.preventDefault();
});</script>"""


def add_style() -> None:
    """The style sheet that runs and plan share."""
    version = hashlib.sha256(STYLE.read_bytes()).hexdigest()[:12]
    ui.add_head_html(f'<link rel="stylesheet" href="/static/tael/{STYLE.name}?{version}">')


class RunsPage:
    """One browser's view. What is shown is changed in place, so that focus and scrolling stay where they are."""

    def __init__(self, book: RunBook, *, may_steer: bool) -> None:
        self.book, self.may_steer = book, may_steer
        self.chosen = ""
        self.marked: list[str] = []
        self._rows: dict[str, Row] = {}
        self._states: dict[str, str] = {}
        self._panel: RunPanel | ComparePanel | None = None

    def build(self, query: dict[str, str]) -> None:
        heads = self.book.runs()
        names = [head.name for head in heads]
        asked = [name for name in query.get("compare", "").split(",") if name in names]
        self.chosen = query.get("run", "") if query.get("run", "") in names else (names[0] if names else "")
        self.marked = list(dict.fromkeys(asked))[:MOST_COMPARED]
        with ui.element("div").classes("runs"):
            with ui.element("section").classes("run-list").props('aria-label="All runs"'):
                self._build_side()
            with ui.element("section").props('aria-label="The chosen run"'):
                self._alert = text("", "p", "alert")
                self._alert.props["role"] = "alert"
                self._main = ui.element("div")
        self._show_list(heads)
        if len(asked) > 1:
            self._open_compare()
        else:
            self._open_run()
        ui.timer(SECONDS_BETWEEN_LOOKS, self._look, immediate=False)

    def _build_side(self) -> None:
        text("Runs", "h1")
        with ui.element("div").classes("buttons"):
            if self.may_steer:
                sheet = StartSheet(self.book, self._started)
                button("Start a run", sheet.open, "main-button")
            self._compare = button("Compare marked runs", self.compare)
        self._list = ui.element("ul")
        self._none = text(
            "No run is there yet. Start one here, or in a terminal: tael run recipes/demo.toml", "p", "faint"
        )

    # ------------------------------------------------------------------ looking

    async def _look(self) -> None:
        """Look again at everything that is shown."""
        heads = await run.io_bound(self.book.runs)
        if heads is not None:  # the server is not going down
            self._show_list(heads)
        if self._panel is not None:
            await self._panel.look()

    def _show_list(self, heads: list[RunHead]) -> None:
        states = {head.name: head.state for head in heads}
        if states != self._states:  # else it keeps its order, and what has the focus keeps it
            self._states = states
            self._list.clear()
            with self._list:
                self._rows = {head.name: Row(head, self) for head in sorted_heads(heads)}
        for head in heads:
            self._rows[head.name].show(head, current=head.name == self.chosen and isinstance(self._panel, RunPanel))
        self._none.set_visibility(not heads)
        self._compare.set_visibility(len(heads) > 1)
        self._compare.props["disabled"] = len(self.marked) < 2
        self._compare.update()

    # ----------------------------------------------------------------- choosing

    async def choose(self, name: str) -> None:
        """Show the run `name`."""
        self.chosen = name
        self._open_run()
        await self._look()

    def mark(self, name: str, marked: bool) -> None:
        """Take `name` among the runs to compare, or out of them."""
        self.marked = [each for each in self.marked if each != name] + ([name] if marked else [])
        self._compare.props["disabled"] = len(self.marked) < 2
        self._compare.update()

    async def compare(self) -> None:
        """Lay the marked runs over each other."""
        known = [name for name in self.marked if name in self._rows]
        if len(known) > MOST_COMPARED:
            self.complain(f"up to {MOST_COMPARED} runs can be told apart; unmark some")
        elif len(known) > 1:
            self.marked = known
            self._open_compare()
            await self._look()

    def _open_run(self) -> None:
        self.complain("")
        self._main.clear()
        self._panel = None
        if self.chosen:
            with self._main:
                self._panel = RunPanel(self, self.chosen)
            ui.navigate.history.replace(f"/runs?run={quote(self.chosen)}")

    def _open_compare(self) -> None:
        self.complain("")
        self._main.clear()
        with self._main:
            self._panel = ComparePanel(self.book, self.marked)
        ui.navigate.history.replace(f"/runs?compare={quote(','.join(self.marked), safe=',')}")

    # ----------------------------------------------------------------- steering

    async def _started(self, name: str) -> None:
        await self.choose(name)

    async def steer(self, action: Callable[[str], RunHead], name: str) -> bool:
        """Stop or resume a run; what goes wrong is said at the top. True when it went well."""
        if not self.may_steer:
            return False
        try:
            await run.io_bound(action, name)
        except TaelError as error:
            self.complain(str(error))
            return False
        self.complain("")
        await self._look()
        return True

    def complain(self, words: str) -> None:
        """Say in red what went wrong; nothing when `words` is empty."""
        say(self._alert, words)


def sorted_heads(heads: list[RunHead]) -> list[RunHead]:
    """Those at work first, then the one that wrote last."""
    return sorted(heads, key=lambda head: (head.state != "running", -head.updated, head.name))


class Row:
    """A run in the list: a box to mark it, a button to show it."""

    def __init__(self, head: RunHead, page: RunsPage) -> None:
        with ui.element("li"):
            box = ui.element("input")
            box.props.update({"type": "checkbox", "checked": head.name in page.marked})
            box.props["aria-label"] = f"Mark {head.name} to compare it"
            box.on("change", lambda event: page.mark(head.name, event.args is True), js_handler=_TICK)
            self._button = html("", tag="button")
            self._button.props["type"] = "button"
            self._button.on("click", lambda: page.choose(head.name))

    def show(self, head: RunHead, *, current: bool) -> None:
        say(self._button, run_parts.row(head))
        value = "true" if current else None
        if self._button.props.get("aria-current") != value:
            self._button.props["aria-current"] = value
            self._button.update()


_TICK = "(e) => emit(e.target.checked)"


class RunPanel:
    """The chosen run."""

    def __init__(self, page: RunsPage, name: str) -> None:
        self._page, self._name = page, name
        self._view: RunView | None = None
        self._stopping = False
        with ui.element("div").classes("run-head"):
            text(name, "h2")
            self._badge = html("")
            self._buttons()
        self._summary, self._stages = html(""), html("")
        with ui.element("div").classes("choices") as self._choices:
            self._axis = axis_field(self._draw)
        self._box = ui.element("div")
        self._charts: dict[str, Charts] = {}
        self._samples = html("")
        with ui.element("details") as self._details:
            text("What it says", "summary")
            self._log = html("", "log", "pre")
            self._log.props.update({"tabindex": "0", "aria-label": f"Output of {name}"})
        try:
            self._show(page.book.run(name))
        except TaelError as error:
            page.complain(str(error))

    def _buttons(self) -> None:
        book, page = self._page.book, self._page
        with ui.element("div").classes("buttons"):
            self._stop = button("Stop", self._ask_to_stop)
            self._resume = button("Resume", lambda: page.steer(book.resume, self._name))
            address = f"/runs/{quote(self._name)}/report"
            link = Markup('<a class="plain-link" href="{}" target="_blank" rel="noopener">Report</a>')
            html(link.format(address), tag="span")
        self._stop.set_visibility(False)
        self._resume.set_visibility(False)

    async def _ask_to_stop(self) -> None:
        if await self._page.steer(self._page.book.stop, self._name):
            self._stopping = True
            await self.look()

    async def look(self) -> None:
        """Read the run again and show what is new."""
        try:
            view = await run.io_bound(self._page.book.run, self._name)
        except TaelError as error:
            self._page.complain(str(error))
            return
        if view is not None:
            self._show(view)

    def _show(self, view: RunView) -> None:
        head, before = view.head, self._view
        self._view = view
        self._stopping = self._stopping and head.state == "running"
        say(self._badge, run_parts.badge(head))
        say(self._summary, run_parts.summary(view))
        say(self._stages, Markup("<h3>Stages</h3>") + run_parts.stage_table(view))
        self._show_buttons(head)
        if before is None or [s.series for s in before.stages] != [s.series for s in view.stages]:
            self._draw()
        if before is None or before.samples != view.samples:
            say(self._samples, run_parts.sample_cards(view))
        say(self._log, "\n".join(view.log))
        self._details.set_visibility(bool(view.log))

    def _show_buttons(self, head: RunHead) -> None:
        steer = self._page.may_steer
        self._stop.set_visibility(steer and head.state == "running" and head.ours)
        self._resume.set_visibility(steer and head.state in ("stopped", "failed"))
        say(self._stop, Markup("<span>{}</span>").format("Stop at once" if self._stopping else "Stop"))

    def _draw(self) -> None:
        axis: Axis = self._axis.value if self._axis.value in AXES else "steps"
        begun = [stage for stage in self._view.stages if stage.series] if self._view else []
        self._choices.set_visibility(bool(begun))
        if [stage.name for stage in begun] != list(self._charts):
            self._box.clear()
            with self._box:
                self._charts = {}
                for stage in reversed(begun):  # the stage at work first
                    text(stage.name, "h3")
                    self._charts[stage.name] = Charts()
            self._charts = {stage.name: self._charts[stage.name] for stage in begun}
        for stage in begun:
            self._charts[stage.name].show(stage_charts(stage, axis))


class ComparePanel:
    """Several runs: one quantity of one stage overlaid, and their figures side by side."""

    def __init__(self, book: RunBook, names: list[str]) -> None:
        self._book, self._names = book, names
        self._views = self._read()
        with ui.element("div").classes("run-head"):
            text(f"{len(self._views)} runs compared", "h2")
        self._table = html("")
        choices = {f"{stage}|{name}": f"{stage}: {QUANTITIES[name].name}" for stage, name in self._curves()}
        if not choices:
            text("None of them has a curve yet.", "p", "faint")
            self._what = self._axis = self._charts = None
        else:
            with ui.element("div").classes("choices"):
                self._what = choice_field("Curve", choices, next(iter(choices)), on_change=self._draw)
                self._axis = axis_field(self._draw)
            self._charts = Charts("wide")
        self._draw()

    def _read(self) -> list[RunView]:
        views = []
        for name in self._names:
            try:
                views.append(self._book.run(name))
            except TaelError:
                continue  # it was taken away meanwhile
        return views

    def _curves(self) -> list[tuple[str, str]]:
        """(stage, quantity) that at least one run has, those of most runs first."""
        found: dict[tuple[str, str], int] = {}
        for view in self._views:
            for stage in view.stages:
                for name in stage.series:
                    if name in QUANTITIES and not (stage.kind == "rl" and name == "loss"):
                        found[stage.name, name] = found.get((stage.name, name), 0) + 1
        return sorted(found, key=lambda key: -found[key])

    async def look(self) -> None:
        """Read the runs again and show what is new."""
        views = await run.io_bound(self._read)
        if views is not None:
            self._views = views
            self._draw()

    def _draw(self) -> None:
        say(self._table, Markup("<h3>Figures</h3>") + run_parts.comparison_table(self._views))
        if self._what is None or self._axis is None or self._charts is None:
            return
        stage, _, name = self._what.value.partition("|")
        axis: Axis = self._axis.value if self._axis.value in AXES else "steps"
        if name not in QUANTITIES:
            return
        found = [(view.head.name, series) for view in self._views if (series := _series(view, stage, name))]
        quantity = QUANTITIES[name]
        words = "; ".join(f"{run}: {series.values[-1]:{quantity.form}}" for run, series in found)
        figure = comparison(found, name, axis)
        figure["layout"]["height"] = 420
        self._charts.show([Chart("compared", f"{stage}: {quantity.name}", figure, f"Last values: {words}.")])


def _series(view: RunView, stage: str, name: str) -> Series | None:
    return next((each.series.get(name) for each in view.stages if each.name == stage), None)
