"""The planner's room: what `tael plan` tells in a terminal is named, and the recipes' models are counted.

The figures are those of `tael.model.config`; nothing here is a prediction of time or money yet.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup
from nicegui import ui

from tael.cost import units
from tael.errors import TaelError
from tael.model.config import ModelConfig
from tael.recipe import PretrainSettings, Recipe, load_recipe
from tael.serve.pages.run_parts import legible, table
from tael.serve.pages.runs import add_style
from tael.serve.pages.widgets import html, text

HEADS = (
    "Recipe", "Parameters", "Active a token", "FLOPs a token, training", "at context", "Cache a token",
    "same with plain attention", "Tokens of pretraining", "FLOPs of pretraining",
)  # fmt: skip
KNOWN_TO_PLAN = (
    "tael plan recipes/demo.toml --measure-here: time and dollars of every stage on this machine",
    "tael plan deepseek-v3 --chip H800 --chips 2048: layout, step, memory, hours, dollars, serving",
    "tael plan deepseek-v3 --limits: what export limits cost, and what buys it back",
)


def plan_page(recipes: Path = Path("recipes")) -> None:
    """The content of /plan."""
    add_style()
    with ui.element("div").classes("plan"):
        text("Plan", "h1")
        with ui.element("div").classes("room"):
            text("Predictions are not on this page yet. In a terminal, before a run:")
            with ui.element("ul"):
                for each in KNOWN_TO_PLAN:
                    text(each, "li")
        text("What the recipes' models are", "h3")
        rows, problems = recipe_figures(recipes)
        if rows:
            html(table("Figures of the recipes' models", HEADS, rows, numbers=range(1, len(HEADS))))
            words = (
                "Counted from the model's shape: cache in 16-bit values over all layers, FLOPs forward and backward."
            )
            text(words, "p", "small")
        else:
            text("There is no recipe in the recipes folder.", "p", "faint")
        for problem in problems:
            text(problem, "p", "small")


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
