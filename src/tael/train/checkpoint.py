"""Checkpoints: whole or not there, checked, and loadable on another number of processes.

`STAGE/step-NNNNNN/` holds safetensors shards written by torch.distributed.checkpoint (each process its own; nothing
is pickled), `state.json` (step and counters) and `manifest.json` (bytes and sha256 of every file). It is written
under a temporary name and renamed last.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tael.errors import TaelError
from tael.files import sha256_of, sync
from tael.train.parallel import Parallel

PREFIX = "step-"


def save_checkpoint(
    stage: Path, tensors: dict[str, Tensor], state: dict[str, Any], parallel: Parallel, keep: int
) -> Path:
    """Write `stage/step-NNNNNN` for `state["steps"]`, then drop all but the newest `keep`.

    Later ones are dropped too: they are there only when they were damaged and this run went back before them.
    Raises TaelError, in every process, when the disk is full or the folder cannot be written; what was saved before
    stays.
    """
    final = stage / f"{PREFIX}{state['steps']:06d}"
    partial = stage / f".{final.name}.partial"
    try:
        _in_main(parallel, lambda: _make_room(stage, partial))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
            save(
                dict(tensors),
                storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                no_dist=parallel.mesh is None,
            )
        _in_main(parallel, lambda: _finish(partial, final, state))
        _in_main(parallel, lambda: _prune(stage, state["steps"], keep))
    except (OSError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise TaelError(f"{final}: cannot write the checkpoint: {reason}; earlier ones are kept") from None
    return final


def _in_main(parallel: Parallel, work: Callable[[], None]) -> None:
    """Do `work` in the main process while the others wait; raises OSError in all of them when it fails."""
    failure: OSError | None = None
    if parallel.is_main:
        try:
            work()
        except OSError as error:
            failure = error
    failed = parallel.sum(torch.tensor([float(failure is not None)], device=parallel.device))
    if failed.item():
        raise failure or OSError("the main process could not write")


def _make_room(stage: Path, partial: Path) -> None:
    """An empty `partial`; what a killed process left half written goes."""
    for left in stage.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)


def _prune(stage: Path, step: int, keep: int) -> None:
    steps = {path: int(path.name.removeprefix(PREFIX)) for path in list_checkpoints(stage)}
    upto = [path for path in steps if steps[path] <= step]
    for path in [*upto[:-keep], *(p for p in steps if steps[p] > step)]:
        shutil.rmtree(path, ignore_errors=True)


def _finish(partial: Path, final: Path, state: dict[str, Any]) -> None:
    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(partial.iterdir())
    }
    (partial / "manifest.json").write_text(json.dumps(files, indent=1), encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)


def list_checkpoints(stage: Path) -> list[Path]:
    """Finished checkpoints of a stage, oldest first."""
    found = [p for p in stage.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def verify_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the state; raises TaelError naming the damaged file."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        for name, wanted in files.items():
            path = checkpoint / Path(name).name
            if not path.is_file() or path.stat().st_size != wanted["bytes"] or sha256_of(path) != wanted["sha256"]:
                raise TaelError(f"{path}: damaged or missing")
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TaelError(f"{checkpoint}: manifest.json or state.json is damaged or missing") from None


def load_latest(stage: Path, tensors: dict[str, Tensor], parallel: Parallel) -> dict[str, Any] | None:
    """Fill `tensors` in place from the newest undamaged checkpoint and return its state; None when there is none yet.

    A damaged one is passed over with a warning; raises TaelError when there are some and all are damaged.
    """
    checkpoints = list_checkpoints(stage)
    damaged: list[str] = []
    for checkpoint in reversed(checkpoints):
        try:
            state = verify_checkpoint(checkpoint)
        except TaelError as error:
            damaged.append(str(error))
            logging.getLogger("tael").warning("%s; going back to the checkpoint before it", error)
            continue
        _read(checkpoint, tensors, parallel)
        return state
    if damaged:
        raise TaelError(f"{damaged[0]}; no other checkpoint is left: run with --fresh to begin this run again")
    return None


def _read(checkpoint: Path, tensors: dict[str, Tensor], parallel: Parallel) -> None:
    reader = HuggingFaceStorageReader(str(checkpoint))
    held = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(held.keys() | wanted.keys()):
        if held.get(name) != wanted.get(name):
            raise TaelError(
                f"{checkpoint}: does not fit this recipe's model ({name} is {held.get(name, 'missing')} there and "
                f"{wanted.get(name, 'missing')} here); use another --run-dir, or --fresh"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load(
                tensors,  # type: ignore[arg-type]
                storage_reader=reader,
                no_dist=parallel.mesh is None,
            )
    except CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise TaelError(f"{checkpoint}: cannot be read ({reason}); use another --run-dir, or --fresh") from None
