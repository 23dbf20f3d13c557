"""Plans of recipes, kept from `tael plan` until their run.

    keep(recipe, stages, measured, machine)      `tael plan RECIPE`: in the cache, under the recipe's digest
    find_kept(recipe, machine)                   what was kept, or None
    settle(recipe, directory, environment)       `tael run`: RUN/plan.json, once, before the first stage

A kept plan counts for the very recipe it was made of (all but its price and description) on the very machine: a
changed value, another processor or another number of threads finds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tael.cost.here import StagePlan, plan_recipe
from tael.cost.prediction import FILE, Machine, Prediction, parse_prediction, recipe_digest
from tael.cost.prices import hourly
from tael.cost.rundata import read_object
from tael.data.fetch import cache_dir
from tael.errors import TaelError
from tael.files import write_whole
from tael.recipe import Recipe
from tael.train.precision import choose_precision


def price_now(recipe: Recipe) -> float:
    """Dollars an hour by the recipe's [price], at this moment. Raises TaelError where its list does not say."""
    return hourly(recipe.price).at(datetime.now(UTC))


def kept_at(recipe: Recipe) -> Path:
    """Where the plan of `recipe` is kept: plans/DIGEST.json in the cache folder."""
    return cache_dir() / "plans" / f"{recipe_digest(recipe)[:32]}.json"


def keep(recipe: Recipe, plans: Sequence[StagePlan], measured: bool, machine: Machine) -> bool:
    """Keep a plan until `recipe` is run here; a rough one does not replace a measured one of this machine.

    False where nothing was kept, as when the cache cannot be written.
    """
    found = find_kept(recipe, machine)
    if found is not None and found.measured and not measured:
        return False
    path = kept_at(recipe)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, Prediction.of(recipe, plans, measured, machine, price_now(recipe)).to_json())
    except OSError:
        return False
    return True


def find_kept(recipe: Recipe, machine: Machine) -> Prediction | None:
    """The plan kept for this recipe on this machine, at the recipe's price."""
    found = parse_prediction(read_object(kept_at(recipe)))
    if found is None or found.machine != machine or found.recipe != recipe_digest(recipe):
        return None
    return replace(found, price_per_hour=price_now(recipe))


def settle(recipe: Recipe, directory: Path, environment: dict[str, Any]) -> None:
    """Write plan.json for a run that begins: the plan kept for it, else a rough one, which costs nothing here since
    the machine's matrix product is measured already.

    Left alone: a run that has begun (a plan after the fact is none), one on another device than this machine's
    processor, and a recipe that cannot be planned.
    """
    begun = (directory / FILE).exists() or any(directory.glob("*/metrics.jsonl"))
    if begun or environment["device"] != "cpu":
        return
    machine = Machine(environment["processor"], environment["threads"])
    found = find_kept(recipe, machine)
    if found is None:
        precision = choose_precision("auto", torch.device("cpu"))
        try:
            plans = plan_recipe(recipe, measured=False, peak=environment["matrix_peak_flops"][precision])
        except TaelError:
            return
        found = Prediction.of(recipe, plans, False, machine, price_now(recipe))
    try:
        write_whole(directory / FILE, found.to_json())
    except OSError as error:
        raise TaelError(f"{directory / FILE}: cannot be written: {error.strerror}") from None
