"""The recipe is the run: one TOML file fixes data, model, stages, seeds and the price of an hour.

`load_recipe(path, overrides)` reads the file, applies `key.path=value` overrides and checks every key. An
unknown key is refused with the nearest valid one; a value of the wrong kind is refused by its full path.
The `[model]` table is kept as written (Hugging Face's DeepSeek keys) and checked by `tael.model.config`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from tael.errors import TaelError, did_you_mean


class Settings(BaseModel):
    """Base of every table in a recipe: frozen, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PriceSettings(Settings):
    """What an hour of this machine costs; the default is two shared cloud vCPUs at list price.

    `prices` and `entry` take the place of `dollars_per_hour`: a price list (docs/cost.md) and a name in it.
    """

    dollars_per_hour: Annotated[float, Field(ge=0)] = 0.08
    prices: str | None = None
    entry: str | None = None
    watts: Annotated[float, Field(gt=0)] | None = None
    """Average draw in watts, for the estimated energy column; None leaves the column empty."""

    @model_validator(mode="after")
    def _one_price(self) -> PriceSettings:
        if (self.prices is None) != (self.entry is None):
            raise ValueError("prices and entry go together: a price list, and a name in it")
        if self.prices is not None and "dollars_per_hour" in self.model_fields_set:
            raise ValueError("give dollars_per_hour, or prices and entry, not both")
        return self

    @model_serializer(mode="wrap")
    def _as_given(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what `prices` takes the place of, so that what is written can be read again."""
        values = whole(self)
        if self.prices is not None:
            values.pop("dollars_per_hour", None)
        return values


class TokenizerSettings(Settings):
    """A byte-level BPE trained on the run's own text, or one taken from `path` (folder or tokenizer.json)."""

    vocab_size: Annotated[int, Field(ge=320, le=1_000_000)] = 2048
    path: str | None = None
    max_characters: Annotated[int, Field(ge=1000)] = 8_000_000
    """Characters of training text the BPE merges are learned from."""


class DataSettings(Settings):
    """Text for pretraining: named sources (`tael models` lists them) or the user's own files."""

    sources: list[str] = []
    path: str | None = None
    """A file or glob of .txt, .jsonl (`text` field) or .parquet (`text` column); replaces `sources`."""
    dataset: str | None = None
    """A hub data set `NAME[:SPLIT]`, streamed through the `datasets` extra; replaces `sources`."""
    text_field: str = "text"
    holdout: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    max_documents: Annotated[int, Field(ge=2)] | None = None
    fim_rate: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _one_origin(self) -> DataSettings:
        if sum((bool(self.sources), self.path is not None, self.dataset is not None)) > 1:
            raise ValueError("give one of sources, path and dataset, not several")
        return self


class OptimizerSettings(Settings):
    """AdamW for embedding, head, norms and gates; Muon (or AdamW) for the matrices."""

    matrices: Literal["muon", "adamw"] = "muon"
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    matrix_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the Muon group; None takes `learning_rate`."""
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    newton_schulz_steps: Annotated[int, Field(ge=1, le=20)] = 5
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0


class ScheduleSettings(Settings):
    """Warmup, stable, decay: fractions of the stage's steps, and the last rate as a fraction of the peak."""

    warmup: Annotated[float, Field(ge=0, le=1)] = 0.02
    decay: Annotated[float, Field(ge=0, le=1)] = 0.4
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    shape: Literal["linear", "cosine"] = "linear"


class StageSettings(Settings):
    """What every training stage has in common."""

    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    precision: Literal["auto", "bf16", "fp32", "fp8-emulated"] = "auto"
    """auto: bf16 where the device multiplies it in hardware, else fp32. fp8-emulated: see tael.train.fp8."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    """Steps between checkpoints."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    eval_every: Annotated[int, Field(ge=1)] = 100
    seed: int | None = None
    """Seed of the stage's data order and sampling; None takes the recipe's."""


class TrainSettings(StageSettings):
    """Pretraining and SFT share the one loop and these settings."""

    steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows a step, over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Rows a forward pass; None takes the whole batch at once."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    mask_documents: bool = True
    """Attention stays inside a document (V4); False lets packed documents see each other (V3)."""
    mtp_weight: Annotated[float, Field(ge=0)] = 0.3
    balance_loss_weight: Annotated[float, Field(ge=0)] = 1e-4
    bias_update_speed: Annotated[float, Field(ge=0)] = 1e-3

    @model_validator(mode="after")
    def _divides(self) -> TrainSettings:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class PretrainSettings(TrainSettings):
    """Next-token (and multi-token) prediction on packed documents."""

    kind: Literal["pretrain"] = "pretrain"
    eval_documents: Annotated[int, Field(ge=1)] = 100


class TaskSettings(Settings):
    """One family of reasoning problems and its difficulty as numbers (see `tael.rl.tasks`)."""

    name: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    difficulty: dict[str, int] = {}


class SftSettings(TrainSettings):
    """Supervised fine-tuning on dialogues and on worked and direct answers to reasoning tasks."""

    kind: Literal["sft"] = "sft"
    tasks: list[TaskSettings] = []
    dialogues: list[str] = []
    """Named conversation sources, or paths of .jsonl files with a `messages` list a line."""
    dialogue_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of training examples that are dialogues."""
    worked_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the task examples that are answered after a worked trace in <think>."""
    examples: Annotated[int, Field(ge=1)] = 50_000
    eval_problems: Annotated[int, Field(ge=1)] = 200


class RlSettings(StageSettings):
    """GRPO with verifiable rewards (DeepSeekMath, R1): group-normalised, token-level, no KL by default."""

    kind: Literal["rl"] = "rl"
    tasks: Annotated[list[TaskSettings], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1)] = 50
    problems: Annotated[int, Field(ge=1)] = 16
    """Problems a step."""
    group: Annotated[int, Field(ge=2)] = 16
    """Samples a problem."""
    mode: Literal["free", "think", "direct"] = "free"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 48
    loss: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "dapo"
    """dapo takes the mean over all tokens, grpo over each sequence first; see tael.rl.policy_loss."""
    clip_low: Annotated[float, Field(gt=0)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    importance_cap: Annotated[float, Field(gt=0)] = 3.0
    """Largest trainer/sampler probability ratio of a token; beyond it the token is masked."""
    bias_update_speed: Annotated[float, Field(ge=0)] = 0.0
    eval_problems: Annotated[int, Field(ge=1)] = 200
    eval_every: Annotated[int, Field(ge=1)] = 10
    require_thinking_gain: bool = True
    """Refuse to start when forced thinking is not more accurate than direct answers: RL would lock it out."""


Stage = Annotated[PretrainSettings | SftSettings | RlSettings, Field(discriminator="kind")]


class Recipe(Settings):
    """A whole run. `model` holds Hugging Face config keys, checked by `tael.model.config.ModelConfig`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    seed: int = 0
    device: str = "auto"
    base: str | None = None
    """A model folder to start from instead of random weights; its config and tokenizer are taken over."""
    price: PriceSettings = PriceSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    model: dict[str, Any] = {}
    stages: Annotated[dict[str, Stage], Field(min_length=1)]


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _apply_override(table: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator or not path.strip():
        raise TaelError(f"--set {override!r}: write it as key.path=value, as in --set stages.pretrain.steps=100")
    *parents, last = path.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise TaelError(f"--set {override!r}: '{parent}' is a value, not a table")
    table[last] = _parse_value(value.strip())


ORIGINS = ("sources", "path", "dataset")


def _replace_origin(table: dict[str, Any], overrides: list[str]) -> None:
    """`--set data.path=book.txt` alone takes the place of the recipe's sources: text has one origin."""
    given = {override.partition("=")[0].strip().removeprefix("data.") for override in overrides}
    data = table.get("data")
    if isinstance(data, dict) and given & set(ORIGINS):
        for origin in set(ORIGINS) - given:
            data.pop(origin, None)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the table that `location` (a pydantic error path) points into."""
    tables: dict[str, type[Settings]] = {
        "price": PriceSettings,
        "tokenizer": TokenizerSettings,
        "data": DataSettings,
        "optimizer": OptimizerSettings,
        "schedule": ScheduleSettings,
        "pretrain": PretrainSettings,
        "sft": SftSettings,
        "rl": RlSettings,
        "tasks": TaskSettings,
    }
    for part in reversed(location[:-1]):
        if part in tables:
            return list(tables[str(part)].model_fields)
    return list(Recipe.model_fields)


def _explain(error: ValidationError, where: str) -> TaelError:
    first = error.errors()[0]
    location = first["loc"]
    # pydantic names the union's branch ("pretrain") after the stage's own name: leave it out of the path.
    shown = [str(p) for i, p in enumerate(location) if not (i == 2 and location[0] == "stages")]
    path = ".".join(shown)
    if first["type"] == "extra_forbidden":
        return TaelError(f"{where}: unknown key '{path}'{did_you_mean(str(location[-1]), _fields_at(location))}")
    if first["type"] == "missing":
        return TaelError(f"{where}: '{path}' is missing")
    got = repr(first.get("input"))
    shown_input = got if len(got) <= 60 else got[:57] + "..."
    message = first["msg"].removeprefix("Value error, ")
    return TaelError(f"{where}: {path or 'recipe'}: {message} (got {shown_input})")


def parse_recipe(table: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe given as nested tables; raises TaelError naming the first wrong key."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise _explain(error, where) from None


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read the TOML at `path`, apply `key.path=value` overrides, check it.

    Raises TaelError when the file is missing, is no TOML, or holds an unknown key or a wrong value.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaelError(f"{path}: no such recipe; the ones that come with Tael are in recipes/") from None
    except IsADirectoryError:
        raise TaelError(f"{path}: is a folder, not a recipe file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TaelError(f"{path}: not a TOML file: {error}") from None
    for override in overrides or []:
        _apply_override(table, override)
    _replace_origin(table, overrides or [])
    return parse_recipe(table, str(path))
