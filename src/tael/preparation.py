"""What a run needs before its first stage: its directory, its text, its tokenizer, the machine's description.

Everything is written once, by the main process, under a temporary name and renamed, and read back by all.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from tael.cost.ledger import Ledger
from tael.cost.measure import matrix_peak
from tael.data import Document, Rows, Tokenizer, load_tokenizer, pack_documents, train_tokenizer
from tael.data.sources import documents, split
from tael.errors import TaelError
from tael.files import write_whole
from tael.model.config import ModelConfig
from tael.recipe import PretrainSettings, Recipe, TrainSettings, load_recipe
from tael.rl.tasks import make_task
from tael.train.parallel import Parallel
from tael.weights import resolve

LEDGER = "ledger.sqlite"
"""The ledger's file name, beside the run directories."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A run directory, ready for its stages."""

    recipe: Recipe
    directory: Path
    parallel: Parallel
    tokenizer: Tokenizer
    config: ModelConfig
    environment: dict[str, Any]

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def held_out(self) -> list[Document]:
        """The documents kept out of training; empty when the run has no text of its own."""
        path = self.data / "held-out.jsonl"
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Document(**json.loads(line)) for line in lines]

    def rows(self, sequence_length: int) -> Rows:
        """Packed training text."""
        return Rows.load(self.data / f"rows-{sequence_length}")

    def peak_flops(self, precision: str) -> float:
        """Measured matrix peak of this machine, FLOP/s."""
        return self.environment["matrix_peak_flops"][precision]


def check_recipe(recipe: Recipe) -> None:
    """Refuse before any work what could only fail later: impossible shapes, unknown tasks, stages without text."""
    if recipe.base is None:
        model = {"vocab_size": recipe.tokenizer.vocab_size, **recipe.model}
        ModelConfig.from_dict(model, where="recipe: model")
    for name, stage in recipe.stages.items():
        if isinstance(stage, PretrainSettings) and not has_text(recipe):
            raise TaelError(f"recipe: stages.{name} needs text: give data.sources, data.path or data.dataset")
        for task in getattr(stage, "tasks", []):
            make_task(task)
        if isinstance(stage, TrainSettings) and not isinstance(stage, PretrainSettings):
            tasks, dialogues = getattr(stage, "tasks", []), getattr(stage, "dialogues", [])
            if not tasks and not dialogues:
                raise TaelError(f"recipe: stages.{name} has nothing to learn from: give tasks or dialogues")
    if not has_text(recipe) and recipe.base is None and recipe.tokenizer.path is None:
        raise TaelError(
            "recipe: a tokenizer cannot be trained without text: give data.sources, data.path or data.dataset"
        )


def has_text(recipe: Recipe) -> bool:
    return bool(recipe.data.sources or recipe.data.path or recipe.data.dataset)


def open_directory(recipe: Recipe, directory: Path, fresh: bool) -> None:
    """Make the run directory, or check that it is this recipe's. `fresh` moves an older run aside."""
    saved = directory / "recipe.toml"
    if fresh and directory.exists():
        number = 1
        while (aside := directory.with_name(f"{directory.name}.previous-{number}")).exists():
            number += 1
        directory.rename(aside)
    if saved.exists():
        if difference := _first_difference(_identity(load_recipe(saved)), _identity(recipe)):
            raise TaelError(
                f"{directory}: holds a run of another recipe ('{difference}' differs); name another --run-dir, or "
                "--fresh to begin again (the old run is moved aside)"
            )
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "run.json", json.dumps({"name": _unused_name(directory)}))
        write_whole(saved, tomli_w.dumps(recipe.model_dump(exclude_none=True)))
    except OSError as error:
        raise TaelError(f"{directory}: cannot be written: {error.strerror}") from None


def _unused_name(directory: Path) -> str:
    """A name that the ledger does not know yet: the directory's, or that with a number after --fresh."""
    known = {total.key for total in Ledger(directory.parent / LEDGER).totals("run")}
    name, number = directory.resolve().name, 1
    while name in known:
        number += 1
        name = f"{directory.resolve().name}-{number}"
    return name


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two recipes the same run: all but price and description."""
    return recipe.model_dump(exclude={"price", "description"}, exclude_none=True)


def _first_difference(old: Any, new: Any, path: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            if found := _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key)):
                return found
        return None
    return None if old == new or _listed(old) == _listed(new) else path


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def prepare(recipe: Recipe, directory: Path, parallel: Parallel, say: Say) -> Prepared:
    """Fetch and split the text, train the tokenizer, pack the rows, describe the machine; what is there is kept."""
    if parallel.is_main:
        _prepare_files(recipe, directory, parallel, say)
    parallel.barrier()
    tokenizer = load_tokenizer(directory / "tokenizer")
    environment = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
    return Prepared(recipe, directory, parallel, tokenizer, model_config(recipe, tokenizer), environment)


def _prepare_files(recipe: Recipe, directory: Path, parallel: Parallel, say: Say) -> None:
    lengths = {s.sequence_length for s in recipe.stages.values() if isinstance(s, PretrainSettings)}
    data = directory / "data"
    missing = [n for n in sorted(lengths) if not (data / f"rows-{n}").exists()]
    need_tokenizer = not (directory / "tokenizer").exists()
    if has_text(recipe) and (missing or need_tokenizer or not (data / "held-out.jsonl").exists()):
        say(f"reading text: {', '.join(recipe.data.sources) or recipe.data.path or recipe.data.dataset}")
        training, held_out = split(documents(recipe.data), recipe.data.holdout)
        data.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": d.text, "source": d.source}) for d in held_out]
        write_whole(data / "held-out.jsonl", "\n".join(lines) + "\n")
        characters = sum(len(d.text) for d in training)
        say(f"{len(training):,} documents, {characters / 1e6:.1f} M characters; {len(held_out):,} documents held out")
    else:
        training = []
    if need_tokenizer:
        _save_folder(directory / "tokenizer", _make_tokenizer(recipe, training, say).save)
    if missing:
        tokenizer = load_tokenizer(directory / "tokenizer")
        for length in missing:
            rows = pack_documents(training, tokenizer, length, recipe.data.fim_rate, recipe.seed)
            _save_folder(data / f"rows-{length}", rows.save)
            say(f"packed {len(rows):,} rows of {length} tokens ({len(rows) * length / 1e6:.1f} M tokens)")
    write_whole(directory / "environment.json", json.dumps(describe_machine(parallel.device), indent=1))


def _save_folder(folder: Path, save: Callable[[Path], object]) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save(partial)
        partial.rename(folder)
    except OSError as error:
        raise TaelError(f"{folder}: cannot be written: {error.strerror}") from None


def _make_tokenizer(recipe: Recipe, training: list[Document], say: Say) -> Tokenizer:
    if recipe.base is not None:
        return load_tokenizer(resolve(recipe.base))
    if recipe.tokenizer.path is not None:
        return load_tokenizer(recipe.tokenizer.path)
    left, texts = recipe.tokenizer.max_characters, []
    for document in training:
        if left <= 0:
            break
        texts.append(document.text[:left])
        left -= len(document.text)
    tokenizer = train_tokenizer(texts, recipe.tokenizer.vocab_size)
    say(f"trained a tokenizer of {tokenizer.vocab_size:,} tokens")
    return tokenizer


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    """The model's shape: the recipe's [model] with the tokenizer's ids, or its base's own."""
    if recipe.base is not None:
        return ModelConfig.load(resolve(recipe.base))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    table = {"vocab_size": max(recipe.tokenizer.vocab_size, tokenizer.vocab_size), **ids, **recipe.model}
    config = ModelConfig.from_dict(table, where="recipe: model")
    if config.vocab_size < tokenizer.vocab_size:
        raise TaelError(
            f"recipe: model.vocab_size {config.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} tokens"
        )
    return config


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge a figure; no host names or paths."""
    peaks = {"fp32": matrix_peak(device, torch.float32), "bf16": matrix_peak(device, torch.bfloat16)}
    return {
        "tael": importlib.metadata.version("tael"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "matrix_peak_flops": peaks,
    }


def processor_name() -> str:
    """The CPU's model name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
