"""The planner's room: a training run and the serving of its model, predicted while one chooses.

with frame("Plan", "/plan"):
    plan_page()                        the address says what is asked: /plan?model=deepseek-v3&chips=2048

It is what `tael plan` prints, with pictures. Plans are computed in a thread, one at a time for each page; what is
asked meanwhile is computed next, and only the last of it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nicegui import run, ui

from tael.errors import TaelError
from tael.serve.pages import plan_answers
from tael.serve.pages.frame import STATIC
from tael.serve.pages.plan_answers import Answer
from tael.serve.pages.plan_curves import curve_charts
from tael.serve.pages.plan_inputs import PlanInputs
from tael.serve.pages.plan_layout import picture, spread_of
from tael.serve.pages.plan_parts import (
    command_part,
    limits_part,
    plan_sentence,
    plan_tiles,
    serving_part,
    tiles,
)
from tael.serve.pages.plan_pictures import draw, flops_bar, memory_bar, step_bar
from tael.serve.pages.plan_question import FIRST, Question, read_question
from tael.serve.pages.plan_recipes import recipes_part
from tael.serve.pages.run_charts import Charts
from tael.serve.pages.run_parts import say
from tael.serve.pages.runs import QUIET, add_style
from tael.serve.pages.widgets import html, text

Result = TypeVar("Result")

PATIENCE = 0.3
"""Seconds before the page says that it computes."""
SECONDS_BETWEEN_LOOKS = 0.1
STYLE = "plan.css"


def plan_page(recipes: Path = Path("recipes")) -> None:
    """The content of /plan."""
    add_style()
    version = hashlib.sha256((STATIC / STYLE).read_bytes()).hexdigest()[:12]
    ui.add_head_html(f'<link rel="stylesheet" href="/static/tael/{STYLE}?{version}">' + QUIET)
    with ui.element("div").classes("plan"):
        text("Plan", "h1")
        text("What a training run and the serving of its model would take, before it costs anything.", "p", "faint")
        PlanPage(dict(ui.context.client.request.query_params))
        recipes_part(recipes)


class PlanPage:
    """One browser's question and its answer."""

    def __init__(self, query: dict[str, str]) -> None:
        question, self._misread = read_question(query)
        self._question, self._shown = question, None
        self._open = True
        ui.context.client.on_delete(self._leave)
        with ui.element("form").props("onsubmit='return false' aria-label='What is planned'"):
            self._inputs = PlanInputs(question, _run_of(question), self.change)
        self._alert = text(" ".join(self._misread), "p", "alert")
        self._alert.props["role"] = "alert"
        self._status = html("", "status-line", "p")
        self._status.props["role"] = "status"
        self._command = html(command_part(question.command()))
        self._results = _Results(self._limits_opened)
        self._timer = ui.timer(SECONDS_BETWEEN_LOOKS, self._look)

    def change(self, key: str, value: str) -> None:
        """One choice is another; what cannot be read is said and changes nothing."""
        try:
            question = self._question.with_value(key, value)
        except TaelError as error:
            say(self._alert, str(error))
            return
        self._misread = []
        say(self._alert, "")
        if question != self._question:
            self._question = question
            self._timer.activate()

    def _leave(self) -> None:
        self._open = False

    def _limits_opened(self) -> None:
        self._shown = None  # once more, with the tables
        self._timer.activate()

    async def _look(self) -> None:
        """Answer what was asked last, until nothing new has been asked meanwhile."""
        self._timer.deactivate()
        while self._open and self._question is not self._shown:
            question = self._question
            if not await self._answer(question):
                continue
            self._shown = question
            await self._fill(question)

    async def _answer(self, question: Question) -> bool:
        """Show the plan of `question`; False when another was asked before it was there."""
        answer = await self._computed(plan_answers.plan, question)
        if answer is None:  # the server, or the page, is going down
            self._open = False
        if answer is None or question is not self._question:
            return False
        ui.navigate.history.replace(question.address())
        say(self._command, command_part(question.command()))
        if answer.run is not None:
            self._inputs.show(question, answer.run)
        say(self._alert, " ".join(filter(None, (*self._misread, answer.problem))))
        say(self._status, "" if answer.table is None else plan_sentence(answer.table))
        self._results.show(answer)
        return True

    async def _fill(self, question: Question) -> None:
        """Curves and tables, which take longer, while nothing else is asked."""
        if not self._results.there:
            return
        curves = await run.io_bound(plan_answers.curves, question, lambda: self._wanted(question))
        if curves is None or not self._wanted(question):
            return
        self._results.show_curves(curve_charts(curves))
        if self._results.limits_open:
            limits = await run.io_bound(plan_answers.limits, question)
            if limits is not None and self._wanted(question):
                self._results.show_limits(limits_part(limits))

    def _wanted(self, question: Question) -> bool:
        return self._open and question is self._question

    async def _computed(self, work: Callable[[Question], Result], question: Question) -> Result | None:
        """The work's result from a thread; that it computes is said when it takes long."""
        task = asyncio.ensure_future(run.io_bound(work, question))
        await asyncio.wait({task}, timeout=PATIENCE)
        if not task.done() and self._open:
            say(self._status, "Computing…")
        found: Any = await task
        return found if self._open else None


class _Results:
    """Everything that is told of a plan, changed in place."""

    def __init__(self, on_limits: Callable[[], None]) -> None:
        self.there = self.limits_open = False
        self._on_limits = on_limits
        with ui.element("div").classes("results") as self._box:
            self._tiles = html("")
            text("How it is spread", "h3")
            self._layout = html("")
            text("Where time, memory and arithmetic go", "h3")
            self._bars = html("", "bars")
            text("Serving the model", "h3")
            self._serving = html("")
            text("More or fewer chips, faster or slower links", "h3")
            text("Each point has the best layout for it.", "p", "small")
            self._charts = Charts()
            with ui.element("details").classes("more") as details:
                text("Export limits, and what the answers to them buy", "summary")
                self._limits = html('<p class="small">Computing…</p>')
            details.on("toggle", self._toggled, js_handler="(e) => emit(e.target.open)")
        self._box.set_visibility(False)

    def _toggled(self, event: Any) -> None:
        opened = event.args is True
        if opened and not self.limits_open:
            self.limits_open = True
            self._on_limits()
        self.limits_open = opened

    def show(self, answer: Answer) -> None:
        """A plan, or nothing where there is none."""
        table, run_ = answer.table, answer.run
        self.there = table is not None and run_ is not None
        self._box.set_visibility(self.there)
        if table is None or run_ is None:
            return
        say(self._tiles, tiles(plan_tiles(table)))
        say(self._layout, picture(spread_of(table, run_.shape, run_.chip.domain)))
        bars = (step_bar(table), memory_bar(table, run_.chip.memory_bytes), flops_bar(table))
        say(self._bars, draw(bars[0]) + draw(bars[1]) + draw(bars[2]))
        say(self._serving, serving_part(table))

    def show_curves(self, charts: list[Any]) -> None:
        self._charts.show(charts)

    def show_limits(self, content: str) -> None:
        say(self._limits, content)


def _run_of(question: Question) -> Any:
    """What the controls begin with: where the question cannot be planned, what the first one would take."""
    return _known_run(question) or plan_answers.taken(FIRST)


def _known_run(question: Question) -> Any:
    try:
        return plan_answers.taken(question)
    except TaelError:
        return None
