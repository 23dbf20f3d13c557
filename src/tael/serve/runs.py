"""Runs, seen and steered: the directories under runs/ read as they grow; a recipe started, stopped, resumed.

    book = RunBook()
    book.runs()                                        every run in a line
    book.run("demo")                                   one in full: curves, costs, what is left, samples, log
    book.start("demo.toml", "try-1", {"stages.pretrain.steps": 100})

A run is a process of its own and outlives whoever began it. What comes in here comes from browsers: only recipes of
the recipes folder are run, only under plain names in the runs folder, and no override may name a file.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tael.cost.ledger import Ledger, Total
from tael.cost.report import headline, render, sample_pairs
from tael.cost.rundata import RunRecord, number, read_run
from tael.errors import TaelError, did_you_mean
from tael.preparation import LEDGER, check_recipe
from tael.recipe import Recipe, Settings, load_recipe
from tael.serve import run_process
from tael.serve.run_files import RunFiles, stamp
from tael.serve.run_views import RunHead, RunView, State, costs, predict, price, stage_settings, stage_views

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
"""Names of runs that are begun here."""
KNOWN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of runs that may be there already."""
Overrides = Mapping[str, Any]
KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
MOST_RUNNING = 4
"""Runs that may go on at once when begun from here: a machine is soon full."""
MOST_FOLLOWED = 32
"""Runs whose curves are kept in memory."""


@dataclass(frozen=True)
class RecipeCard:
    """A recipe that can be run. `problem` says why not."""

    file: str
    name: str
    description: str
    stages: list[str]
    values: dict[str, Any] = field(default_factory=dict)
    """What one most likely wants to change: key path -> value."""
    problem: str = ""


class RunBook:
    """The runs in `root` and the recipes in `recipes`. Methods may be called from several threads."""

    def __init__(self, root: Path = Path("runs"), recipes: Path = Path("recipes")) -> None:
        self.root, self.folder = root.absolute(), recipes.absolute()
        self._lock = threading.RLock()
        self._followed: dict[str, RunFiles] = {}
        self._heads: dict[str, tuple[Any, RunHead]] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._ledger: Ledger | None = None

    # ------------------------------------------------------------------- seeing

    def runs(self) -> list[RunHead]:
        """Every run, the one that wrote last first. A run that cannot be read is left out."""
        with self._lock:
            self._reap()
            found = [self._head(directory) for directory in self._directories()]
            return sorted(found, key=lambda head: (-head.updated, head.name))

    def run(self, name: str) -> RunView:
        """The run `name` as it is now; raises TaelError when there is none."""
        with self._lock:
            self._reap()
            directory = self._find(name)
            files, notes = self._follow(directory), []
            record = files.read()
            totals, whole = self._costs(record, notes)
            stages = stage_views(record, files.stages, totals, self._experience(record))
            per_hour = price(record)
            return RunView(
                head=self._head(directory),
                record=record,
                stages=stages,
                totals=totals,
                whole=whole,
                price_per_hour=per_hour,
                prediction=predict(stages, whole, per_hour),
                samples=sample_pairs(record),
                log=run_process.output_tail(directory),
                notes=notes,
            )

    def report(self, name: str) -> str:
        """The run's report as one HTML page; raises TaelError when there is no such run."""
        with self._lock:
            directory = self._find(name)
            record = read_run(directory)
            try:
                return render(record, self._open_ledger())
            except TaelError:  # the ledger's
                return render(record, None)

    def recipes(self) -> list[RecipeCard]:
        """The recipes that can be run, by file name."""
        found = sorted(self.folder.glob("*.toml"))
        return [_card(path) for path in found if path.is_file() and path.name.isprintable()]

    # ----------------------------------------------------------------- steering

    def start(self, recipe: str | Path, name: str | None = None, overrides: Overrides | None = None) -> RunHead:
        """Begin a run. `recipe`: a file of the recipes folder; `name`: the recipe's own unless given.

        `overrides`: key path -> value; text is read as after `tael run --set`. Raises TaelError for a recipe, name or
        value that is refused, and when such a run is there already.
        """
        path = self._recipe(recipe)
        settings = [_override(key, value) for key, value in (overrides or {}).items()]
        checked = checked_recipe(path, settings)
        name = re.sub(r"[^a-z0-9]+", "-", checked.name.lower()).strip("-")[:40] if name is None else name
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise TaelError(
                f"name {str(name)[:60]!r}: use up to 40 of the characters a-z, 0-9 and -, beginning with no -"
            )
        with self._lock:
            directory = self.root / name
            if self._alive(directory):
                raise TaelError(f"{name} is running already; stop it first, or choose another name")
            if (directory / "recipe.toml").exists():
                raise TaelError(f"{name} is there already; resume it, or choose another name")
            if directory.exists() and run_process.read_process(directory) is None:
                raise TaelError(f"{name}: something that is no run is there already; choose another name")
            return self._launch(directory, path, settings)

    def resume(self, name: str) -> RunHead:
        """Go on with a run that stopped or failed, by the recipe that its directory holds."""
        with self._lock:
            directory = self._find(name)
            head = self._head(directory)
            if head.state in ("running", "finished"):
                raise TaelError(f"{name} is {head.state}{' already' if head.state == 'running' else ''}")
            saved, process = directory / "recipe.toml", run_process.read_process(directory)
            if saved.exists():
                load_recipe(saved)
                return self._launch(directory, saved, [])
            if process is None:
                raise TaelError(f"{name}: nothing tells which recipe it ran")
            path = self._recipe(process.recipe)
            checked_recipe(path, process.overrides)
            return self._launch(directory, path, process.overrides)

    def stop(self, name: str) -> RunHead:
        """Ask a run to stop, as Ctrl-C does: it ends its step and keeps what is done. Twice: at once."""
        with self._lock:
            self._reap()
            directory = self._find(name)
            process = run_process.read_process(directory)
            if process is not None and process.find() is not None:
                process.interrupt()
            elif run_process.is_locked(directory):
                raise TaelError(f"{name} was begun elsewhere; stop it with Ctrl-C where it runs")
            else:
                raise TaelError(f"{name} is not running")
            return self._head(directory)

    # ------------------------------------------------------------------ helpers

    def _launch(self, directory: Path, recipe: Path, overrides: list[str]) -> RunHead:
        self._reap()
        at_work = sum(1 for each in self._directories() if self._alive(each))
        if at_work >= MOST_RUNNING:
            raise TaelError(f"{at_work} runs are at work already; wait for one to end, or stop it")
        self._children.append(run_process.launch(directory, recipe, overrides))
        return self._head(directory)

    def _reap(self) -> None:
        """Take note of children that have ended, which else stay in the process table."""
        self._children = [child for child in self._children if child.poll() is None]

    def _recipe(self, recipe: str | Path) -> Path:
        path = Path(recipe)
        known = {found.name: found for found in self.folder.glob("*.toml")}
        if path.name in known and str(recipe) in (path.name, str(known[path.name])):
            return known[path.name]
        raise TaelError(f"{str(recipe)[:80]}: no such recipe{did_you_mean(path.name, known)}")

    def _directories(self) -> list[Path]:
        try:
            return [path for path in sorted(self.root.iterdir()) if _is_run(path)]
        except OSError:
            return []

    def _find(self, name: str) -> Path:
        directory = self.root / name if isinstance(name, str) and KNOWN_NAME.fullmatch(name) else None
        if directory is None or not _is_run(directory):
            raise TaelError(f"{str(name)[:80]}: no such run")
        return directory

    def _follow(self, directory: Path) -> RunFiles:
        files = self._followed.pop(directory.name, None) or RunFiles(directory)
        self._followed[directory.name] = files  # last in order: last to be dropped
        while len(self._followed) > MOST_FOLLOWED:
            del self._followed[next(iter(self._followed))]
        return files

    def _costs(self, record: RunRecord, notes: list[str]) -> tuple[list[Total], Total]:
        """Costs of the stages and their sum; when the ledger cannot be read, from the run's files, and a note."""
        try:
            return costs(record, self._open_ledger())
        except TaelError as error:
            notes.append(f"costs are from the run's own files: {error}")
            return costs(record, None)

    def _open_ledger(self) -> Ledger | None:
        if self._ledger is None and (self.root / LEDGER).exists():
            self._ledger = Ledger(self.root / LEDGER)
        return self._ledger

    def _alive(self, directory: Path) -> bool:
        process = run_process.read_process(directory)
        return (process is not None and process.find() is not None) or run_process.is_locked(directory)

    def _head(self, directory: Path) -> RunHead:
        """The run in a line, read again only when a file of it has changed."""
        written = _written(directory)
        stamps = tuple(stamp(path) for path in written)
        process = run_process.read_process(directory)
        ours = process is not None and process.find() is not None
        key = (stamps, ours, ours or run_process.is_locked(directory))
        known = self._heads.get(directory.name)
        if known is not None and known[0] == key:
            return known[1]
        record = self._follow(directory).read()
        _, whole = self._costs(record, [])
        state, reason = _state(record, directory, running=key[2])
        stage, progress = _position(record)
        head = RunHead(
            name=directory.name,
            state=state,
            reason=reason,
            stage=stage,
            progress=progress,
            updated=max((found[1] for found in stamps if found), default=0) / 1e9,
            dollars=whole.dollars,
            headline=headline(record, whole),
            ours=ours,
        )
        self._heads[directory.name] = key, head
        return head

    def _experience(self, record: RunRecord) -> dict[str, float]:
        """Seconds that stages of this run took in another run of the same model, stage and machine."""
        wanted = {_likeness(record, stage.name): stage.name for stage in record.stages}
        found: dict[str, float] = {}
        for files in self._followed.values():
            other = files.read() if files.directory != record.directory else record
            for stage in other.stages if other is not record else []:
                seconds = number((stage.result or {}).get("seconds"))
                name = wanted.get(_likeness(other, stage.name))
                if seconds and name is not None:
                    found[name] = seconds
        return found


def checked_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe with its overrides, checked as `tael run` does, and changed in nothing that names a file."""
    own, changed = load_recipe(path), load_recipe(path, overrides)
    if list(own.stages) != list(changed.stages):
        raise TaelError("a run started from here has the stages of its recipe, no others")
    if own.name != changed.name:
        raise TaelError("give the run's name in its own field, not as a value of the recipe")
    before, after = _places(own), _places(changed)
    for key in before:
        if before[key] != after[key]:
            raise TaelError(f"{key} names files or models and cannot be changed from here; write a recipe instead")
    check_recipe(changed)
    return changed


def _places(recipe: Recipe) -> dict[str, Any]:
    """The settings that may name a file, a model or a data set."""
    places: dict[str, Any] = {"base": recipe.base, "tokenizer.path": recipe.tokenizer.path}
    places |= {f"data.{key}": getattr(recipe.data, key) for key in ("path", "dataset", "sources")}
    return places | {f"stages.{n}.dialogues": getattr(stage, "dialogues", None) for n, stage in recipe.stages.items()}


def _override(key: str, value: Any) -> str:
    if not isinstance(key, str) or not KEY.fullmatch(key) or len(key) > 200:
        raise TaelError(f"{str(key)[:60]!r}: write a key of the recipe, as in stages.pretrain.steps")
    if isinstance(value, bool | int | float):
        return f"{key}={json.dumps(value)}"
    if not isinstance(value, str):
        raise TaelError(f"{key}: give a number, true or false, or text")
    if len(value) > 2000 or not value.isprintable():
        raise TaelError(f"{key}: give one line of text")
    return f"{key}={value}"


def _card(path: Path) -> RecipeCard:
    try:
        recipe = load_recipe(path)
        check_recipe(recipe)
    except TaelError as error:
        return RecipeCard(path.name, path.stem, "", [], problem=str(error))
    values: dict[str, Any] = {"seed": recipe.seed}
    if recipe.price.prices is None:
        values["price.dollars_per_hour"] = recipe.price.dollars_per_hour
    for name, stage in recipe.stages.items():
        for key in ("steps", "batch_size", "problems", "group"):
            if hasattr(stage, key):
                values[f"stages.{name}.{key}"] = getattr(stage, key)
        if isinstance(stage, Settings):
            values[f"stages.{name}.optimizer.learning_rate"] = stage.optimizer.learning_rate
    return RecipeCard(path.name, recipe.name, recipe.description, list(recipe.stages), values)


def _is_run(path: Path) -> bool:
    names = ("recipe.toml", run_process.PROCESS)
    return bool(KNOWN_NAME.fullmatch(path.name)) and any((path / name).is_file() for name in names)


def _written(directory: Path) -> list[Path]:
    """The files by which a run is known to have changed."""
    names = ("recipe.toml", "summary.json", run_process.PROCESS, run_process.OUTPUT)
    deeper = (path for name in ("metrics.jsonl", "result.json") for path in directory.glob(f"*/{name}"))
    return [*(directory / name for name in names), *sorted(deeper)]


def _state(record: RunRecord, directory: Path, *, running: bool) -> tuple[State, str]:
    if running:
        return "running", ""
    if record.finished:
        return "finished", ""
    output = stamp(directory / run_process.OUTPUT)
    metrics = [stamp(directory / stage.name / "metrics.jsonl") for stage in record.stages]
    newest = max((found[1] for found in metrics if found), default=0)
    if output is None or newest - output[1] > 60e9:  # what ran last was begun in a terminal, and said it there
        return "stopped", ""
    failed, reason = run_process.last_words(directory)
    return ("failed" if failed else "stopped"), reason


def _position(record: RunRecord) -> tuple[str, float]:
    """(stage at work or next, mean share of steps done over all stages)."""
    shares, current = [], ""
    for stage in record.stages:
        steps = number(stage_settings(record, stage.name).get("steps"))
        done = number(stage.steps[-1].get("step")) if stage.steps else None
        part = min(1.0, (done or 0.0) / steps) if steps and steps > 0 else 0.0
        shares.append(1.0 if stage.result is not None else part)
        if stage.result is None and not current:
            current = stage.name
    return current, sum(shares) / len(shares) if shares else 0.0


def _likeness(record: RunRecord, stage: str) -> str:
    """Equal for stages that do the same work on the same machine."""
    table = stage_settings(record, stage)
    where = [record.environment.get(key) for key in ("device", "processor", "threads")]
    what = [record.recipe.get("model"), record.recipe.get("tokenizer"), table, where]
    return json.dumps(what, sort_keys=True, default=str)
