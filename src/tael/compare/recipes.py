"""Recipes as contestants: the first pretraining stage of each, on the text and the tokenizer of the first recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tael.data import Document
from tael.errors import TaelError
from tael.evals.perplexity import bits_per_byte
from tael.files import digest
from tael.model import build_model
from tael.preparation import Prepared, model_config
from tael.recipe import PretrainSettings, Recipe
from tael.stages import plan_stage
from tael.train.trainer import Trainer, TrainerSetup


def pretraining(recipe: Recipe) -> tuple[str, PretrainSettings]:
    """The first pretraining stage and its name; raises TaelError where there is none."""
    for name, stage in recipe.stages.items():
        if isinstance(stage, PretrainSettings):
            return name, stage
    raise TaelError(f"{recipe.name}: has no pretrain stage to compare")


def check_comparable(recipes: Sequence[Recipe]) -> None:
    """Refuse what would not be a comparison: fewer than two, one name twice, other text, another tokenizer."""
    if len(recipes) < 2:
        raise TaelError("compare what with what? Name two recipes or more")
    first, names = recipes[0], [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise TaelError(f"two recipes are named '{name}'; give one another name: --set does not reach it")
    lengths = {recipe.name: pretraining(recipe)[1].sequence_length for recipe in recipes}
    for recipe in recipes:
        if recipe.base is not None:
            raise TaelError(f"{recipe.name}: starts from a model (base); a comparison starts from random weights")
        for table in ("data", "tokenizer"):
            if getattr(recipe, table) != getattr(first, table):
                raise TaelError(
                    f"{recipe.name}: its [{table}] differs from that of {first.name}; quality compares on one text "
                    "with one tokenizer"
                )
        if lengths[recipe.name] != lengths[first.name]:
            raise TaelError(
                f"{recipe.name}: sequence_length {lengths[recipe.name]} differs from {first.name}'s "
                f"{lengths[first.name]}"
            )


def setup_of(recipe: Recipe, documents: int, threads: int) -> str:
    """A digest of all that decides a training's figures but its seed; `documents` are read at each evaluation."""
    kept = recipe.model_dump(include={"tokenizer", "data", "model"}, mode="json")
    kept["stage"] = pretraining(recipe)[1].model_dump(mode="json")
    return digest({**kept, "documents": documents, "threads": threads})[:16]


def corpus_folder(folder: Path, recipe: Recipe) -> Path:
    """Where its text, packed with its tokenizer, lies: another recipe's is never taken for it."""
    key = recipe.model_dump(include={"data", "tokenizer"}, mode="json")
    return folder / f"corpus-{digest({**key, 'length': pretraining(recipe)[1].sequence_length})[:12]}"


class RecipeContestant:
    """The pretraining stage of `recipe` with `seed`, step by step, on `prepared`'s text and tokenizer."""

    def __init__(
        self, recipe: Recipe, seed: int, prepared: Prepared, held_out: Sequence[Document], directory: Path
    ) -> None:
        stage_name, settings = pretraining(recipe)
        settings = settings.model_copy(update={"seed": seed})
        config = model_config(recipe, prepared.tokenizer)
        own = Prepared(
            recipe, prepared.directory, prepared.parallel, prepared.tokenizer, config, prepared.environment
        )
        model = build_model(config, seed)
        plan = plan_stage(own, stage_name, settings, model)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "metrics.jsonl").unlink(missing_ok=True)
        self._trainer = Trainer(
            model,
            plan.source,
            plan.objective,
            TrainerSetup(
                directory,
                settings.steps,
                settings,
                prepared.parallel,
                micro_batches=plan.micro_batches,
                bias_update_speed=plan.bias_update_speed,
            ),
        )
        self._tokenizer, self._held_out, self._length = prepared.tokenizer, held_out, settings.sequence_length
        self.name, self.seed, self.steps = recipe.name, seed, settings.steps
        self.setup = setup_of(recipe, len(held_out), torch.get_num_threads())
        self.parameters_total = config.parameters(mtp=False)
        self.parameters_active = config.parameters(active=True, mtp=False)
        self.cache_bytes_per_token = config.cache_bytes_per_token()
        self.flops_per_token = config.flops_per_token(settings.sequence_length / 2)
        self.tokens_per_step = settings.batch_size * settings.sequence_length

    def step(self) -> None:
        self._trainer.step()

    def bits_per_byte(self) -> float:
        model = self._trainer.twin.compute
        return bits_per_byte(model, self._tokenizer, self._held_out, self._length).bits_per_byte
