"""Reads a run directory as it is: finished, running or broken off, with files missing or half written.

Nothing here raises for what a file holds: a line that is no JSON object is left out, a number that is none is
None. Only a run directory that is not there is a TaelError.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tael.errors import TaelError
from tael.evals.statistics import Accuracy

Line = dict[str, Any]
MODES = ("free", "think", "direct")


@dataclass(frozen=True)
class Sample:
    """One line of samples.jsonl; every text comes from a model or from data and is not to be trusted."""

    label: str
    mode: str
    prompt: str
    reasoning: str | None
    answer: str
    expected: str | None
    correct: bool | None


@dataclass(frozen=True)
class StageRecord:
    """What one stage has written so far; lines are in step order, the last line of a step wins."""

    name: str
    kind: str
    steps: list[Line]
    loads: list[Line]
    evals: list[Line]
    samples: list[Sample]
    result: Line | None

    @property
    def status(self) -> str:
        """finished, running (or broken off) or waiting."""
        if self.result is not None:
            return "finished"
        return "running / unfinished" if self.steps or self.evals else "waiting"

    @property
    def seconds(self) -> float:
        """Seconds the stage has taken so far, by its own lines."""
        times = [number(line.get("seconds")) for line in (*self.steps[-1:], *self.evals[-1:])]
        return max((time for time in times if time is not None), default=0.0)

    def accuracies(self, mode: str) -> list[tuple[Line, Accuracy]]:
        """(eval line, accuracy) of each evaluation that has `mode`."""
        pairs = [(line, read_accuracy((line.get("accuracy") or {}), mode)) for line in self.evals]
        return [(line, value) for line, value in pairs if value is not None]


@dataclass(frozen=True)
class RunRecord:
    """A run directory, read; missing parts are empty."""

    directory: Path
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    summary: dict[str, Any]
    stages: list[StageRecord]

    @property
    def finished(self) -> bool:
        """The pipeline says that all stages are done."""
        return self.summary.get("finished") is True

    def of_kind(self, kind: str) -> list[StageRecord]:
        """The stages of one kind (pretrain, sft, rl) that have begun."""
        return [stage for stage in self.stages if stage.kind == kind and (stage.steps or stage.evals)]


def number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def column(lines: list[Line], key: str) -> list[float | None]:
    """`key` of each line as a number or None."""
    return [number(line.get(key)) for line in lines]


def read_accuracy(table: Any, mode: str) -> Accuracy | None:
    """`{mode: {"correct", "total"}}` -> Accuracy; None when absent, empty or impossible."""
    counts = table.get(mode) if isinstance(table, dict) else None
    if not isinstance(counts, dict):
        return None
    correct, total = counts.get("correct"), counts.get("total")
    if type(correct) is not int or type(total) is not int or not 0 <= correct <= total or total == 0:
        return None
    return Accuracy(correct, total)


def run_name(directory: Path) -> str:
    """The run's name in the ledger: run.json's, else the directory's."""
    name = (read_object(directory / "run.json") or {}).get("name")
    return name if isinstance(name, str) and name else directory.resolve().name


def read_run(directory: Path) -> RunRecord:
    """Read the run at `directory`; raises TaelError when it is no directory."""
    if not directory.is_dir():
        raise TaelError(f"{directory}: no such run directory")
    recipe_text = read_whole(directory / "recipe.toml")
    try:
        recipe = tomllib.loads(recipe_text)
    except tomllib.TOMLDecodeError:
        recipe = {}
    summary = read_object(directory / "summary.json") or {}
    name = summary.get("name") or run_name(directory)
    return RunRecord(
        directory=directory,
        name=str(name),
        recipe=recipe,
        recipe_text=recipe_text,
        environment=read_object(directory / "environment.json") or {},
        summary=summary,
        stages=[_stage(directory / name, kind) for name, kind in stage_kinds(directory, recipe).items()],
    )


def stage_kinds(directory: Path, recipe: dict[str, Any]) -> dict[str, str]:
    """Stage name -> kind, in the recipe's order; folders the recipe does not name come after, by name."""
    tables = recipe.get("stages")
    kinds = {}
    for name, table in (tables if isinstance(tables, dict) else {}).items():
        kind = table.get("kind") if isinstance(table, dict) else None
        kinds[name] = str(kind or name)
    try:
        found = sorted(path.parent.name for path in directory.glob("*/metrics.jsonl"))
    except OSError:
        found = []
    order = {"pretrain": 0, "sft": 1, "rl": 2}
    for name in sorted(found, key=lambda name: order.get(name, 3)):
        kinds.setdefault(name, name)
    return kinds


def _stage(directory: Path, kind: str) -> StageRecord:
    lines = read_lines(directory / "metrics.jsonl")
    return StageRecord(
        name=directory.name,
        kind=kind,
        steps=_by_step(lines, "step"),
        loads=_by_step(lines, "load"),
        evals=_by_step(lines, "eval"),
        samples=[read_sample(line) for line in read_lines(directory / "samples.jsonl")],
        result=read_object(directory / "result.json"),
    )


def _by_step(lines: list[Line], kind: str) -> list[Line]:
    """Lines of one kind in step order; after a resume a step may stand there twice: the later one counts."""
    chosen: dict[float, Line] = {}
    for line in lines:
        step = number(line.get("step"))
        if line.get("kind") == kind and step is not None:
            chosen[step] = line
    return [chosen[step] for step in sorted(chosen)]


def read_sample(line: Line) -> Sample:
    """A line of samples.jsonl."""

    def text(key: str) -> str | None:
        value = line.get(key)
        return None if value is None else str(value)

    correct = line.get("correct")
    return Sample(
        label=text("label") or "",
        mode=text("mode") or "",
        prompt=text("prompt") or "",
        reasoning=text("reasoning"),
        answer=text("answer") or "",
        expected=text("expected"),
        correct=correct if isinstance(correct, bool) else None,
    )


def read_whole(path: Path) -> str:
    """A file's text; empty when there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parse_line(text: str) -> Line | None:
    """A JSON object; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_object(path: Path) -> Line | None:
    """The JSON object a file holds; None for anything else."""
    return parse_line(read_whole(path))


def read_lines(path: Path) -> list[Line]:
    """The JSON objects of a file, one a line; other lines are left out."""
    parsed = (parse_line(line) for line in read_whole(path).split("\n") if line.strip())
    return [line for line in parsed if line is not None]
