"""Runs a recipe: prepare, then its stages in order, each priced; skips what is finished, resumes what is not.

    run_recipe(load_recipe("recipes/demo.toml"), Path("runs/demo"), reporter)

The same recipe and run directory go on from wherever the last attempt ended.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from tael.cost.bookkeeping import Costs
from tael.cost.kept import settle
from tael.cost.ledger import Ledger
from tael.cost.measure import give_back_memory, reset_peak_memory
from tael.cost.prices import hourly
from tael.cost.report import write_report
from tael.cost.rundata import run_name
from tael.errors import TaelError
from tael.files import write_whole
from tael.model import Transformer, build_model
from tael.preparation import LEDGER, Prepared, check_recipe, open_directory, prepare
from tael.recipe import Recipe, StageSettings
from tael.stages import plan_stage
from tael.train import Parallel, Trainer, TrainerSetup, choose_device
from tael.train.precision import choose_precision, limit_kernel_cache
from tael.weights import load_model, resolve, save_model


class Reporter(Protocol):
    """Who is told how a run is going; only the main process calls."""

    def say(self, text: str) -> None: ...
    def stage(self, name: str, kind: str, steps: int, done: int) -> None: ...
    def step(self, step: int, metrics: dict[str, Any]) -> None: ...
    def evaluated(self, step: int, metrics: dict[str, Any]) -> None: ...
    def stage_done(self, name: str, metrics: dict[str, Any]) -> None: ...


class Silent:
    """A Reporter that says nothing."""

    def say(self, text: str) -> None: ...
    def stage(self, name: str, kind: str, steps: int, done: int) -> None: ...
    def step(self, step: int, metrics: dict[str, Any]) -> None: ...
    def evaluated(self, step: int, metrics: dict[str, Any]) -> None: ...
    def stage_done(self, name: str, metrics: dict[str, Any]) -> None: ...


def default_run_directory(recipe: Recipe) -> Path:
    """runs/NAME, where the recipe's run lives unless told otherwise."""
    return Path("runs") / recipe.name


def run_recipe(recipe: Recipe, run_directory: Path, reporter: Reporter, *, fresh: bool = False) -> dict[str, Any]:
    """Run `recipe` to its end and return the summary (as in summary.json).

    Raises TaelError for what the user can mend, and its kind `Stopped` after Ctrl-C; both leave a run that the same
    call goes on with. Ctrl-C outside a training step raises KeyboardInterrupt, with the same promise.
    """
    check_recipe(recipe)
    hourly(recipe.price).at(datetime.now(UTC))  # refuse a price nobody knows before there is anything to pay
    limit_kernel_cache()
    parallel = Parallel.start(choose_device(recipe.device))
    reporter = reporter if parallel.is_main else Silent()
    try:
        if parallel.is_main:
            open_directory(recipe, run_directory, fresh)
        parallel.barrier()
        with _only_one(run_directory, parallel):
            return _run(recipe, run_directory, parallel, reporter)
    finally:
        parallel.finish()


def _run(recipe: Recipe, directory: Path, parallel: Parallel, reporter: Reporter) -> dict[str, Any]:
    costs = Costs(recipe.price, run_name(directory), Ledger(directory.parent / LEDGER), parallel)
    reporter.stage("prepare", "prepare", 0, 0)
    with costs.measured("prepare", "prepare"):
        prepared = prepare(recipe, directory, parallel, reporter.say)
    reporter.stage_done("prepare", {})
    write_summary(prepared, finished=False)
    if parallel.world_size == 1:  # what was predicted is one process on this machine
        settle(recipe, directory, prepared.environment)
    previous: Path | None = resolve(recipe.base) if recipe.base else None
    for name, settings in recipe.stages.items():
        stage = directory / name
        if not (stage / "result.json").exists():
            run_stage(prepared, name, settings, previous, costs, reporter)
        previous = stage / "model"
    summary = write_summary(prepared, finished=True)
    if parallel.is_main:
        write_report(directory, costs.ledger)
    parallel.barrier()
    return summary


def run_stage(
    prepared: Prepared, name: str, settings: StageSettings, previous: Path | None, costs: Costs, reporter: Reporter
) -> None:
    """Train one stage from its checkpoint or from `previous`'s model, and leave model/ and result.json behind."""
    directory, parallel = prepared.directory / name, prepared.parallel
    directory.mkdir(exist_ok=True)
    give_back_memory()  # of the stage before
    reset_peak_memory()
    model = load_model(previous) if previous else build_model(prepared.config, prepared.recipe.seed)
    plan = plan_stage(prepared, name, settings, model)
    kind = getattr(settings, "kind", name)

    peak = prepared.peak_flops(choose_precision(settings.precision, parallel.device))
    books = costs.stage(name, kind, peak)

    def evaluate(compute: Transformer, step: int) -> dict[str, Any]:
        with books.evaluation() as spent:
            found = plan.evaluate(compute, step)
            spent.tokens, spent.flops = found.work
        if found.metrics:
            reporter.evaluated(step, found.metrics)
        return found.metrics

    setup = TrainerSetup(
        directory,
        plan.steps,
        settings,
        parallel,
        plan.micro_batches,
        plan.bias_update_speed,
        peak,
        evaluate,
        reporter.step,
        books.saved,
    )
    trainer = Trainer(model, plan.source, plan.objective, setup)
    reporter.stage(name, kind, plan.steps, trainer.resume())
    result = trainer.run()
    trained = parallel.gather(trainer.model)
    if parallel.is_main:
        save_model(trained, directory / "model", prepared.tokenizer)
        write_whole(directory / "result.json", json.dumps(asdict(result), indent=1))
    parallel.barrier()
    reporter.stage_done(name, result.metrics)


def write_summary(prepared: Prepared, *, finished: bool) -> dict[str, Any]:
    """Collect the run's figures from its stages' results into summary.json."""
    config, environment = prepared.config, prepared.environment
    summary: dict[str, Any] = {
        "name": run_name(prepared.directory),
        "finished": finished,
        "model": {
            "parameters_total": config.parameters(),
            "parameters_active": config.parameters(active=True),
            "cache_bytes_per_token": config.cache_bytes_per_token(),
            "mha_cache_bytes_per_token": config.mha_cache_bytes_per_token(),
        },
        "matrix_peak_flops": environment["matrix_peak_flops"]["bf16"],
        "device": environment["processor"] if environment["device"] == "cpu" else environment["device"],
        "bits_per_byte": None,
        "accuracy": {},
    }
    for name, settings in prepared.recipe.stages.items():
        path = prepared.directory / name / "result.json"
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.exists() else {}
        if "bits_per_byte" in metrics:
            summary["bits_per_byte"] = metrics["bits_per_byte"]
        if "accuracy" in metrics:
            is_rl = getattr(settings, "kind", "") == "rl"
            summary["accuracy"]["after" if is_rl else "before"] = metrics["accuracy"]
    if prepared.parallel.is_main:
        write_whole(prepared.directory / "summary.json", json.dumps(summary, indent=1))
    return summary


@contextmanager
def _only_one(directory: Path, parallel: Parallel) -> Iterator[None]:
    """Hold the run directory's lock; raises TaelError when another process runs there."""
    if not parallel.is_main:
        yield
        return
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TaelError(
                f"{directory}: another `tael run` is at work here; wait for it or stop it first"
            ) from None
        yield
