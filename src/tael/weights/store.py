"""Where a model is: a model folder, a run directory, or the name of a run under ./runs."""

from __future__ import annotations

from pathlib import Path

from tael.errors import TaelError
from tael.recipe import load_recipe

RUNS = Path("runs")


def resolve(name_or_path: str | Path, runs: Path = RUNS) -> Path:
    """The model folder (config.json + safetensors) that `name_or_path` means.

    Tried in this order: a model folder; a run directory; a run of that name under `runs`. Of a run the last finished
    stage's model is taken, in the order of its recipe; where there is no readable recipe, the one written last.
    Raises TaelError that lists what there is when nothing fits.
    """
    path = Path(name_or_path)
    candidates = [path] if path.is_absolute() or len(path.parts) != 1 else [path, runs / path]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
        if models := finished_models(candidate):
            return models[-1]
    if any(_is_run(candidate) for candidate in candidates):
        raise TaelError(f"{name_or_path}: this run has no finished model yet; go on with `tael run`")
    if path.is_file():
        raise TaelError(f"{name_or_path}: is a file; give the folder that holds config.json and the safetensors")
    known = ", ".join(available(runs)) or "none"
    raise TaelError(f"{name_or_path}: no such model folder or run; runs with a model under {runs}/: {known}")


def available(runs: Path = RUNS) -> list[str]:
    """Names of the runs under `runs` that have a finished model."""
    return sorted(folder.name for folder in runs.glob("*") if finished_models(folder))


def finished_models(run: Path) -> list[Path]:
    """The model folders of a run's finished stages (those with a result.json), first stage first.

    Without any result.json every stage that wrote a model counts: a run copied without its records.
    """
    models = [path.parent for path in run.glob("*/model/config.json")]
    if not models:
        return []
    done = [model for model in models if (model.parent / "result.json").is_file()] or models
    order = _stage_order(run)
    return sorted(
        done,
        key=lambda model: (
            order.index(model.parent.name) if model.parent.name in order else -1,
            (model / "config.json").stat().st_mtime_ns,
        ),
    )


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("recipe.toml", "environment.json"))


def _stage_order(run: Path) -> list[str]:
    try:
        return list(load_recipe(run / "recipe.toml").stages)
    except TaelError:
        return []
