"""The sheet in which a run is begun: a recipe, a name, and the values to be changed."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from nicegui import run, ui

from tael.errors import TaelError
from tael.serve.pages.run_parts import say
from tael.serve.pages.widgets import Field, area_field, button, choice_field, text, text_field
from tael.serve.runs import RecipeCard, RunBook


def parse_changes(lines: str) -> dict[str, str]:
    """`key.path=value` a line; raises TaelError naming the line that is not."""
    changes = {}
    for line in filter(None, map(str.strip, lines.splitlines())):
        key, separator, value = line.partition("=")
        if not separator:
            raise TaelError(f"{line[:60]!r}: write key.path=value, as in stages.pretrain.steps=100")
        changes[key.strip()] = value.strip()
    return changes


def free_name(wanted: str, taken: set[str]) -> str:
    """`wanted`, or the first of wanted-2, wanted-3 .. that is not taken."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


class StartSheet:
    """`open` shows it; `on_started(name)` is called when a run has begun."""

    def __init__(self, book: RunBook, on_started: Callable[[str], Awaitable[None]]) -> None:
        self._book, self._on_started = book, on_started
        self._cards: dict[str, RecipeCard] = {}
        self._values: dict[str, tuple[str, Field]] = {}
        with ui.dialog() as self._dialog, ui.element("div").classes("sheet start"):
            text("Start a run", "h2")
            self._body = ui.element("div").classes("form")

    async def open(self) -> None:
        """Show the sheet with the recipes as they are now."""
        cards = await run.io_bound(self._book.recipes) or []
        self._cards = {card.file: card for card in cards if not card.problem}
        self._fill("", [f"{card.file}: {card.problem}" for card in cards if card.problem])
        self._dialog.open()

    def _fill(self, chosen: str, problems: list[str]) -> None:
        chosen = chosen if chosen in self._cards else next(iter(self._cards), "")
        self._body.clear()
        with self._body:
            if not self._cards:
                text("There is no recipe to run in the recipes folder.")
            else:
                self._fields(chosen, problems)
            for problem in problems:
                text(problem, "small", "faint")
            self._alert = text("", "p", "alert")
            self._alert.props["role"] = "alert"
            with ui.element("div").classes("buttons"):
                button("Cancel", self._dialog.close)
                if self._cards:
                    button("Start", self._start, "main-button")

    def _fields(self, chosen: str, problems: list[str]) -> None:
        card = self._cards[chosen]
        taken = {head.name for head in self._book.runs()}
        names = {file: file for file in self._cards}
        self._recipe = choice_field(
            "Recipe", names, chosen, on_change=lambda: self._fill(self._recipe.value, problems)
        )
        text(f"{card.description or card.name}. Stages: {', '.join(card.stages)}.", "small", "faint")
        wanted = card.name.lower().replace("_", "-").replace(".", "-")[:36]
        self._name = text_field("Name", free_name(wanted, taken), "a-z, 0-9 and -", maxlength=40)
        with ui.element("div").classes("values"):
            self._values = {}
            for key, value in card.values.items():
                self._values[key] = (json.dumps(value), text_field(key, json.dumps(value)))
        self._more = area_field("More changes", "", "key.path=value, one a line, as after tael run --set", rows=3)

    async def _start(self) -> None:
        name = self._name.value.strip()
        try:
            changes = {key: field.value.strip() for key, (own, field) in self._values.items() if field.value != own}
            changes |= parse_changes(self._more.value)
            await run.io_bound(self._book.start, self._recipe.value, name, changes)
        except TaelError as error:
            say(self._alert, str(error))
            return
        self._dialog.close()
        await self._on_started(name)
