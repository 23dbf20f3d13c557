"""The recipes on the plan page: what their models are, and what each would take on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from nicegui import run, ui

from tael.cost import units
from tael.cost.prediction import MEMORY_NOTE, Machine, Prediction, Stage
from tael.errors import TaelError
from tael.model.config import ModelConfig
from tael.recipe import PretrainSettings, Recipe, load_recipe
from tael.serve.pages.run_parts import legible, say, table
from tael.serve.pages.widgets import button, choice_field, html, text

HEADS = (
    "Recipe", "Parameters", "Active a token", "FLOPs a token, training", "at context", "Cache a token",
    "same with plain attention", "Tokens of pretraining", "FLOPs of pretraining",
)  # fmt: skip


@dataclass(frozen=True)
class Here:
    """A recipe predicted on this machine: how, and a row for each stage and their sum."""

    how: str
    rows: tuple[tuple[str, ...], ...]


def recipes_part(folder: Path) -> None:
    """The table of the recipes' models, and the prediction of one."""
    text("Recipes", "h2")
    rows, problems = recipe_figures(folder)
    if rows:
        html(table("Figures of the recipes' models", HEADS, rows, numbers=range(1, len(HEADS))))
        words = "Counted from the model's shape: cache in 16-bit values over all layers, FLOPs forward and backward."
        text(words, "p", "small")
        names = [str(row[0]) for row in rows]
        _Predictor(folder, [path for path in sorted(folder.glob("*.toml")) if legible(path.name) in names])
    else:
        text("There is no recipe in the recipes folder.", "p", "faint")
    for problem in problems:
        text(problem, "p", "small")


class _Predictor:
    """A recipe to choose, a button, and what it would take here."""

    def __init__(self, folder: Path, paths: list[Path]) -> None:
        self._paths = {legible(path.name): path for path in paths}
        self._busy = False
        text("On this machine", "h3")
        with ui.element("div").classes("choices here"):
            self._recipe = choice_field("Recipe", {name: name for name in self._paths}, next(iter(self._paths)))
            self._button = button("Predict", self._predict)
        self._told = html("", "faint", "p")
        self._told.props["role"] = "status"
        self._table = html("")

    async def _predict(self) -> None:
        path = self._paths.get(str(self._recipe.value))
        if path is None or self._busy:
            return
        self._busy = True
        say(self._told, "Timing a matrix product…")
        try:
            found = await run.io_bound(predict_here, path)
        except TaelError as error:
            say(self._told, str(error))
            say(self._table, "")
            return
        finally:
            self._busy = False
        if found is not None:  # the server is not going down
            heads = ("Stage", "Steps", "Tokens", "FLOPs", "Time", "Memory", "Cost")
            say(self._table, table(f"{path.name} on this machine", heads, found.rows, numbers=range(1, len(heads))))
            say(self._told, f"{legible(path.name)}: {found.how}")


def predict_here(path: Path) -> Here:
    """The plan that was kept for the recipe on this machine, else a rough one. Raises TaelError."""
    import torch

    from tael.cost.here import plan_recipe
    from tael.cost.kept import find_kept, price_now
    from tael.preparation import check_recipe, processor_name

    recipe = load_recipe(path)
    check_recipe(recipe)
    machine = Machine(processor_name(), torch.get_num_threads())
    found = find_kept(recipe, machine)
    if found is None:
        plans = plan_recipe(recipe, measured=False)
        found = Prediction.of(recipe, plans, False, machine, price_now(recipe))
    advice = (
        ""
        if found.measured
        else f"; may be wrong by a factor of 2, unless `tael plan {path} --measure-here` times it"
    )
    return Here(f"{found.how}{advice}. {MEMORY_NOTE}", tuple(_rows(found)))


def _rows(found: Prediction) -> list[tuple[str, ...]]:
    stages = [_stage_row(stage.name, f"{stage.steps:,.0f}", [stage], found) for stage in found.stages]
    return [*stages, _stage_row("total", "", found.stages, found)]


def _stage_row(name: str, steps: str, parts: Sequence[Stage], found: Prediction) -> tuple[str, ...]:
    seconds = sum(part.seconds for part in parts)
    return (
        name,
        steps,
        units.count(sum(part.tokens for part in parts)),
        units.flops(sum(part.flops for part in parts)),
        units.duration(seconds),
        units.size(max(part.memory_bytes for part in parts)),
        units.money(found.dollars(seconds)),
    )


def recipe_figures(folder: Path) -> tuple[list[list[str | Markup]], list[str]]:
    """(a row for each recipe whose model can be counted, a line for each that cannot)."""
    rows, problems = [], []
    for path in sorted(folder.glob("*.toml")):
        try:
            rows.append(_row(legible(path.name), load_recipe(path)))
        except TaelError as error:
            problems.append(legible(str(error)))
    return rows, problems


def _row(name: str, recipe: Recipe) -> list[str | Markup]:
    if recipe.base is not None:
        raise TaelError(f"{name}: starts from the model {recipe.base}, whose shape is known when it is there")
    config = ModelConfig.from_dict(
        {"vocab_size": recipe.tokenizer.vocab_size, **recipe.model}, where=f"{name}: model"
    )
    stages = [stage for stage in recipe.stages.values() if isinstance(stage, PretrainSettings)]
    length = stages[0].sequence_length if stages else config.max_position_embeddings
    tokens = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in stages)
    flops = sum(
        stage.steps * stage.batch_size * stage.sequence_length * config.flops_per_token(stage.sequence_length / 2)
        for stage in stages
    )
    return [
        name,
        units.count(config.parameters()),
        units.count(config.parameters(active=True)),
        units.flops(config.flops_per_token(length / 2)),
        f"{length:,}",
        units.size(config.cache_bytes_per_token()),
        units.size(config.mha_cache_bytes_per_token()),
        units.count(tokens) if tokens else units.MISSING,
        units.flops(flops) if flops else units.MISSING,
    ]
