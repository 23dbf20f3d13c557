"""Around the place to write: which model, how it thinks, how full its context is; and the sheet of settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from markupsafe import Markup
from nicegui import ui

from tael.errors import TaelError
from tael.serve.pages.figures import number
from tael.serve.pages.icons import icon
from tael.serve.pages.widgets import area_field, button, choice_field, html, text, text_field, tick_field
from tael.serve.pages.wishes import Settings

_THINKING = {"auto": "Auto: the model decides", "enabled": "On", "disabled": "Off"}
_SHORT = {"auto": "auto", "enabled": "on", "disabled": "off"}
_EFFORT = {"": "The model's own", "low": "Low", "medium": "Medium", "high": "High"}
_NUMBERS = (
    ("temperature", "Temperature", "0 to 2; 0 is always the likeliest"),
    ("top_p", "Top p", "over 0, up to 1"),
    ("top_k", "Top k", "how many tokens are considered"),
    ("min_p", "Min p", "0 to 1, of the likeliest token"),
    ("max_tokens", "Most tokens", "thoughts and answer"),
    ("seed", "Seed", "the same seed, the same answer"),
)


class ModelPicker:
    """The button with the model's name, and the list of models."""

    def __init__(self, models: Callable[[], list[Any]], on_pick: Callable[[str], Any]):
        self._models = models
        self._on_pick = on_pick
        self.value = ""
        with ui.element("button").classes("pick").props('type="button" aria-haspopup="menu"') as self._button:
            self._label = html("", tag="span")
            html(icon("down"), tag="span").classes("faint")
            with ui.menu() as self._menu:
                self._list = html("", "menu")
                self._list.props.update({"role": "menu", "aria-label": "Models"})
        self._menu.on("before-show", self._fill)
        picked = "(e) => { const b = e.target.closest('[data-model]'); if (b) emit(b.dataset.model) }"
        self._list.on("click", self._picked, js_handler=picked)

    def show(self, name: str) -> None:
        """Show this one as chosen."""
        self.value = name
        self._label.set_content(Markup("{}").format(name or "no model"))
        self._button.props["aria-label"] = f"Model: {name}"
        self._fill()

    def _fill(self) -> None:
        self._list.set_content(models_list(self._models(), self.value))

    def _picked(self, event: Any) -> None:
        self._menu.close()
        if any(event.args == card.name for card in self._models()):
            self._on_pick(event.args)


def models_list(cards: list[Any], current: str) -> str:
    """The models as items of a menu: loaded or not, context, thinking, price."""
    items = Markup("").join(
        Markup(
            '<button type="button" class="item" role="menuitemradio" aria-checked="{}" data-model="{}"><b>{}</b>'
            "<small>{}</small><small>{}</small></button>"
        ).format("true" if card.name == current else "false", card.name, card.name, _traits(card), _price(card.price))
        for card in cards
    )
    return items or Markup('<p class="faint">No model is served.</p>')


def _traits(card: Any) -> str:
    parts = ["loaded" if card.loaded else "loads when asked"]
    if card.context:
        parts.append(f"{number(card.context)} tokens of context")
    if card.thinks:
        parts.append("thinks")
    return " · ".join(parts)


def _price(price: Any) -> str:
    return f"${price.hit:g} cached, ${price.miss:g} new, ${price.output:g} written, a million tokens"


class ThinkingPicker:
    """Whether the next answer is thought about, how hard, and for how many tokens at most."""

    def __init__(self, settings: Callable[[], Settings], on_change: Callable[[Settings], Any]):
        self._settings = settings
        self._on_change = on_change
        with ui.element("button").classes("pick").props('type="button" aria-haspopup="dialog"') as self.button:
            self._label = html("", tag="span")
            html(icon("down"), tag="span").classes("faint")
            with ui.menu() as menu:
                self._fields = ui.element("div").classes("menu fields")
        menu.on("before-show", self._fill)

    def show(self, thinks: bool | None) -> None:
        """The state of things; a model that cannot think has no such button."""
        settings = self._settings()
        words = f"Thinking: {_SHORT[settings.thinking]}"
        if settings.thinking != "disabled" and settings.effort:
            words += f", {settings.effort}"
        self._label.set_content(Markup("{}").format(words))
        self.button.props["aria-label"] = words
        self.button.set_visibility(thinks is not False)

    def _fill(self) -> None:
        settings = self._settings()
        self._fields.clear()
        with self._fields:
            thinking = choice_field("Thinking", _THINKING, settings.thinking, on_change=lambda: keep())
            effort = choice_field("Effort", _EFFORT, settings.effort or "", on_change=lambda: keep())
            kept = "" if settings.budget is None else str(settings.budget)
            budget = text_field("Budget", kept, "Tokens of thought at most; empty: no limit.", "number", min=1)
            budget.control.on("change", lambda: keep())

        def keep() -> None:
            form = settings.model_dump() | {
                "thinking": thinking.value,
                "effort": effort.value,
                "budget": budget.value,
            }
            try:
                self._on_change(Settings.of_form(form))
            except TaelError as error:
                ui.notify(str(error), type="negative")


def settings_sheet(system: str, settings: Settings, on_save: Callable[[str, Settings], Any]) -> None:
    """Open the sheet of one conversation's settings."""
    with ui.dialog() as dialog, ui.element("div").classes("sheet"):
        text("Settings of this conversation", "h2")
        instructions = area_field("System prompt", system, "What the model is told before everything else.")
        text("Sampling, empty: the model's own", "h3")
        fields = {}
        with ui.element("div").classes("pairs"):
            for name, label, hint in _NUMBERS:
                value = getattr(settings, name)
                kept = "" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)
                fields[name] = text_field(label, kept, hint, "number", step="any", min=0)
        stops = "\n".join(stop.replace("\n", "\\n") for stop in settings.stop)
        fields["stop"] = area_field("Stop at", stops, "One text a line; \\n is the end of a line.", 2)
        fields["json_mode"] = tick_field("Answer in JSON", settings.json_mode, "The question must say “json”.")
        fields["tools"] = area_field("Tools", settings.tools, "A JSON list of functions the model may call.", 3)
        problem = text("", classes="problem")
        problem.set_visibility(False)
        problem.props["role"] = "alert"

        def save() -> None:
            form = settings.model_dump() | {name: field.value for name, field in fields.items()}
            try:
                on_save(str(instructions.value), Settings.of_form(form))
            except TaelError as error:
                problem.set_content(Markup("{}").format(str(error)))
                problem.set_visibility(True)
                return
            dialog.close()

        with ui.element("div").classes("buttons"):
            button("Cancel", dialog.close)
            button("Save", save, "main-button")
    dialog.on("hide", dialog.delete)
    dialog.open()


class Gauge:
    """How much of the model's context the conversation takes."""

    def __init__(self) -> None:
        self._shown = ""
        self._line = html("", "gauge", "span")

    def show(self, used: int, limit: int | None) -> None:
        """Tokens of prompt and answer against the context; nothing before the first answer."""
        content = ""
        if used:
            words = f"{number(used)} of {number(limit)} tokens" if limit else f"{number(used)} tokens"
            meter = Markup('<meter min="0" max="{0}" high="{1}" value="{2}" aria-label="Context used"></meter>')
            bar = meter.format(limit, int(limit * 0.85), min(used, limit)) if limit else Markup("")
            content = Markup("<span>context {}</span>{}").format(words, bar)
        if content != self._shown:
            self._shown = content
            self._line.set_content(content)
