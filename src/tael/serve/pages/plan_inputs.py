"""The plan page's controls: a searchable list of models, chips, sliders with a box for the exact value, and more.

inputs = PlanInputs(question, run, on_change)       on_change(key, typed value)
inputs.show(question, run)                          what the planner takes where nothing was chosen
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from nicegui import ui
from nicegui.element import Element

from tael.cost import units
from tael.cost.chips import CHIPS, find_chip
from tael.cost.named import MODELS
from tael.cost.planner import Run
from tael.serve.pages.plan_question import Question, written
from tael.serve.pages.run_parts import join, say
from tael.serve.pages.widgets import Field, choice_field, html, text, text_field

Change = Callable[[str, str], Any]

STEPS = 120
"""Places of a slider that is not in powers of two."""
PAUSE = 0.2
"""Seconds between two events of a slider that is drawn along."""
_START = ".defaultValue"  # as in widgets: Vue would put "value" back over what is being typed
_VALUE = "(e) => emit(e.target.value)"
# What has the focus keeps what is typed or drawn there.
_PUT = """for (const [id, value, words] of %s) {
  const control = document.getElementById(id);
  if (!control) continue;
  if (control !== document.activeElement) control.value = value;
  if (words) control.setAttribute("aria-valuetext", words);
}"""


@dataclass(frozen=True)
class Scale:
    """A slider's places as values: equal steps are equal ratios, so that a tenth is as far as ten times."""

    low: float
    high: float
    steps: int = STEPS
    whole: bool = False

    def value(self, place: float) -> float:
        share = min(1.0, max(0.0, place / self.steps))
        value = self.low * (self.high / self.low) ** share
        return float(round(value)) if self.whole else float(f"{value:.3g}")

    def place(self, value: float) -> int:
        """The nearest place."""
        inside = min(self.high, max(self.low, value))
        return round(math.log(inside / self.low) / math.log(self.high / self.low) * self.steps)


def scales(chip_link: float) -> dict[str, Scale]:
    """The sliders, by the question's field; `chip_link`: the chip's own, GB/s."""
    return {
        "chips": Scale(1, 2**17, 17, whole=True),
        "price": Scale(0.05, 20),
        "link": Scale(chip_link / 10, chip_link * 10),
        "tokens": Scale(1e9, 1e15),
    }


_LABELS = {
    "chips": "Chips", "price": "Price, $ a chip-hour", "link": "Link, GB/s one way", "tokens": "Training tokens",
}  # fmt: skip


class Slider:
    """A range and a box for the same value; `on_change` is called with what the one or the other says."""

    def __init__(self, key: str, scale: Scale, value: float, on_change: Change) -> None:
        self._key, self._scale, self._on_change = key, scale, on_change
        with ui.element("div").classes("field slide"):
            label = text(_LABELS[key], "label")
            self._box = ui.element("input").classes("exact")
            self._range = ui.element("input")
            self._own = html("", tag="small")
        label.props["for"] = self._box.html_id
        self._box.props.update(
            {"type": "text", "inputmode": "decimal", _START: shown(key, value), "autocomplete": "off"}
        )
        self._range.props.update(
            {"type": "range", "min": 0, "max": scale.steps, "step": 1, _START: scale.place(value)}
        )
        self._range.props.update({"aria-label": f"{_LABELS[key]}, slider", "aria-valuetext": shown(key, value)})
        self._box.on("change", self._typed, js_handler=_VALUE)
        self._range.on("input", self._drawn, throttle=PAUSE, js_handler=_VALUE)

    def _typed(self, event: Any) -> Any:
        return self._on_change(self._key, str(event.args or ""))

    def _drawn(self, event: Any) -> Any:
        try:
            place = float(str(event.args))
        except ValueError:
            return None  # browsers may send anything
        return self._on_change(self._key, written(self._scale.value(place)) if math.isfinite(place) else "")

    def show(self, scale: Scale, value: float, own: str) -> list[tuple[str, Any, str]]:
        """Take over a value; returns what is to be put into the browser's controls."""
        self._scale = scale
        say(self._own, own)
        words = shown(self._key, value)
        return [(self._box.html_id, words, ""), (self._range.html_id, scale.place(value), words)]


class PlanInputs:
    """All controls."""

    def __init__(self, question: Question, run: Run, on_change: Change) -> None:
        self._change = on_change
        with ui.element("div").classes("plan-inputs"):
            self._model = _model_field(question, lambda value: on_change("model", value))
            self._chip = self._chip_field(question)
            self._precision = self._precision_field(question)
        with ui.element("div").classes("plan-inputs"):
            ranges = scales(own_link(question))
            self._sliders = {key: Slider(key, scale, taken(key, run), on_change) for key, scale in ranges.items()}
        with ui.element("details").classes("more"):
            text("Layout of your own, sequences, serving", "summary")
            with ui.element("div").classes("plan-inputs"):
                self._texts = {
                    key: self._text_field(key, label, hint, getattr(question, key)) for key, label, hint in _MORE
                }

    def _chip_field(self, question: Question) -> Field:
        words = {name: f"{name} ({units.size(c.memory_bytes)}, {c.peaks['bf16'] / 1e12:g} TFLOP/s)"
                 for name, c in CHIPS.items()}  # fmt: skip
        return choice_field("Chip", words, question.chip, on_change=lambda: self._change("chip", self._chip.value))

    def _precision_field(self, question: Question) -> Field:
        words = {"": "As the model was trained", "bf16": "bf16", "fp8": "fp8", "fp4": "fp4"}
        return choice_field(
            "Matrix products in", words, question.precision or "",
            on_change=lambda: self._change("precision", self._precision.value),
        )  # fmt: skip

    def _text_field(self, key: str, label: str, hint: str, value: float | str | None) -> Field:
        field = text_field(label, "" if value is None else written(value), hint)
        field.control.on("change", lambda event: self._change(key, str(event.args or "")), js_handler=_VALUE)
        return field

    def show(self, question: Question, run: Run) -> None:
        """Bring every control in line with the question and what the planner takes for it."""
        ranges, puts = scales(own_link(question)), []
        for key, slider in self._sliders.items():
            puts += slider.show(ranges[key], taken(key, run), own_words(key, question, run))
        puts += [(self._model.html_id, question.model, "")]
        puts += [(self._chip.control.html_id, question.chip, "")]
        puts += [(self._precision.control.html_id, question.precision or "", "")]
        for key, field in self._texts.items():
            value = getattr(question, key)
            puts.append((field.control.html_id, "" if value is None else written(value), ""))
        ui.run_javascript(_PUT % json.dumps(puts).replace("<", "\\u003c"))


_MORE = (
    ("layout", "Layout", "as in pipeline=16,expert=64,recompute=full; the best one unless given"),
    ("sequence", "Tokens of a sequence", "the model's own unless given"),
    ("batch_tokens", "Tokens of a batch", "the model's own unless given"),
    ("context", "Serving: tokens in the cache", "4,096 unless given"),
    ("speed", "Serving: tokens a second a reader", "20 unless given"),
)


def _model_field(question: Question, on_change: Callable[[str], Any]) -> Element:
    """A text field with the models' names under it, searched as one types; any part of a name or note finds it."""
    with ui.element("div").classes("field"):
        label = text("Model", "label")
        control = ui.element("input")
        options = join(
            Markup('<option value="{}">{}, {} active</option>').format(
                name,
                units.count(model.shape.parameters(mtp=False)),
                units.count(model.shape.parameters(active=True, mtp=False)),
            )
            for name, model in MODELS.items()
        )
        listed = html(options, tag="datalist")
        hint = text("Type to search; empty shows all.", "small")
    control.props.update({"type": "text", "list": listed.html_id, _START: question.model, "autocomplete": "off",
                          "spellcheck": "false", "aria-describedby": hint.html_id})  # fmt: skip
    label.props["for"] = control.html_id
    control.on("focus", js_handler="(e) => e.target.select()")
    control.on("change", lambda event: on_change(str(event.args or "")), js_handler=_VALUE)
    return control


def own_link(question: Question) -> float:
    """The chip's own link, GB/s."""
    return find_chip(question.chip).link_bandwidth / 1e9


def taken(key: str, run: Run) -> float:
    """What the planner takes for a slider's value."""
    values = {"chips": run.devices, "price": run.price or 0.0, "link": run.chip.link_bandwidth / 1e9}
    return float(values.get(key, run.tokens))


def shown(key: str, value: float) -> str:
    """A value as its box holds it."""
    if key == "tokens":
        return units.count(value) if float(f"{value:.3g}") == value else written(value)
    return f"{value:,.0f}" if key == "chips" else f"{value:.4g}"


def own_words(key: str, question: Question, run: Run) -> str:
    """What stands under a slider: where the value comes from, and what it would be otherwise."""
    if key == "link":
        return f"{question.chip} has {own_link(question):g}"
    if key == "price":
        return run.chip.price_source if question.price is None else ""
    if key == "tokens":
        model = question.known_model()
        return f"{model.name} was trained on {units.count(model.tokens)}"
    return "enough for about two months" if question.chips is None else ""
