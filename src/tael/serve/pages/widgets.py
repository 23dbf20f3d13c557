"""Plain HTML controls as NiceGUI elements: buttons with names, fields that keep what is typed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup, escape
from nicegui import ui
from nicegui.element import Element

from tael.serve.pages.icons import icon

# Vue would put "value" back at every change anywhere on the page, over what is being typed.
_START = ".defaultValue"
_VALUE = "(e) => emit(e.target.type === 'checkbox' ? e.target.checked : e.target.value)"


def html(content: str, classes: str = "", tag: str = "div") -> ui.html:
    """HTML that is safe already: built with Markup, or by `markdown.render`."""
    return ui.html(content, sanitize=False, tag=tag).classes(classes)


def text(words: str, tag: str = "p", classes: str = "") -> ui.html:
    """Words in an element of this tag."""
    return html(escape(words), classes, tag)


def button(words: str, on_click: Callable[..., Any] | None, classes: str = "plain", picture: str = "") -> Element:
    """A button with words on it."""
    made = html(
        (icon(picture) if picture else Markup("")) + Markup("<span>{}</span>").format(words), classes, "button"
    )
    made.props["type"] = "button"
    return made.on("click", lambda: on_click()) if on_click else made


def icon_button(words: str, picture: str, on_click: Callable[..., Any] | None = None) -> Element:
    """A button with a picture on it; `words` are its name for screen readers and its hint."""
    made = html(icon(picture), "icon", "button")
    made.props.update({"type": "button", "aria-label": words, "title": words})
    return made.on("click", lambda: on_click()) if on_click else made


class Field:
    """A control; `value` is what it holds (text, or whether a box is ticked)."""

    def __init__(self, control: Element, value: Any, on_change: Callable[[], Any] | None = None):
        self.control = control
        self.value: Any = value
        self._on_change = on_change
        control.on("change", self._changed, js_handler=_VALUE)

    def _changed(self, event: Any) -> None:
        self.value = (
            event.args if isinstance(event.args, bool) else str(event.args or "")
        )  # browsers may send anything
        if self._on_change:
            self._on_change()


@contextmanager
def _labelled(label: str, hint: str, tick: bool = False) -> Iterator[list[Element]]:
    """Put the label beside the one control that is made inside and appended to the list."""
    made: list[Element] = []
    with ui.element("div").classes("field ticked" if tick else "field"):
        words = None if tick else text(label, "label")
        yield made
        words = words or text(label, "label")
        words.props["for"] = made[0].html_id
        if hint:
            text(hint, "small").props["id"] = f"hint-{made[0].html_id}"
            made[0].props["aria-describedby"] = f"hint-{made[0].html_id}"


def text_field(label: str, value: str = "", hint: str = "", kind: str = "text", **props: Any) -> Field:
    """One line of text; `kind` is the type of the HTML input."""
    with _labelled(label, hint) as made:
        made.append(control := ui.element("input"))
        control.props.update({"type": kind, _START: value, "autocomplete": "off"} | props)
        return Field(control, value)


def area_field(label: str, value: str = "", hint: str = "", rows: int = 4) -> Field:
    """Several lines of text."""
    with _labelled(label, hint) as made:
        made.append(control := ui.element("textarea"))
        control.props.update({_START: value, "rows": rows})
        return Field(control, value)


def choice_field(
    label: str, choices: Mapping[str, str], value: str, hint: str = "", on_change: Callable[[], Any] | None = None
) -> Field:
    """One of `choices` (value: words)."""
    with _labelled(label, hint) as made:
        made.append(control := ui.element("select"))
        with control:
            for each, words in choices.items():
                option = text(words, "option")
                option.props["value"] = each
                if each == value:
                    option.props["selected"] = True
        return Field(control, value, on_change)


def tick_field(label: str, value: bool, hint: str = "") -> Field:
    """A box to tick."""
    with _labelled(label, hint, tick=True) as made:
        made.append(control := ui.element("input"))
        control.props.update({"type": "checkbox", "checked": value})
        return Field(control, value)
