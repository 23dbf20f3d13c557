"""Run directories that are being written, read without reading again what was read before.

`tael.cost.rundata` says what the files hold and forgives what is wrong in them; here they are followed: metrics from
where the last look ended, the rest again when it has changed.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tael.cost import rundata
from tael.cost.rundata import Line, RunRecord, StageRecord, number

Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """What changes when a file does: inode, time, size; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


class Tail:
    """A growing file of lines. `read` gives those that came since, and whether the file is another than before.

    The last line waits until it has its end. A file that was cut, or replaced (as after a resume), is read anew.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._inode, self._offset = path, -1, 0

    def read(self) -> tuple[list[str], bool]:
        """(complete new lines, whether what was read before no longer counts)."""
        now = stamp(self.path)
        inode, size = (now[0], now[2]) if now else (-1, 0)
        anew = inode != self._inode or size < self._offset
        if anew:
            self._inode, self._offset = inode, 0
        if size == self._offset:
            return [], anew
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read(size - self._offset).rpartition(b"\n")
        except OSError:
            return [], anew
        self._offset += len(whole) + len(newline)
        return [line for line in whole.decode("utf-8", "replace").split("\n") if line.strip()], anew


MOST_STEPS = 4000
"""Step lines kept of a stage; of more, every second one is let go, as often as needed: plots show fewer still."""


@dataclass
class StageFiles:
    """A stage's directory, followed. Load lines are large: only the last is kept whole, the others as `balance`."""

    directory: Path
    steps: dict[float, Line] = field(default_factory=dict)
    evals: dict[float, Line] = field(default_factory=dict)
    balance: dict[float, list[float]] = field(default_factory=dict)
    """Step -> load of the busiest expert over the mean, for each MoE layer."""
    last_load: Line | None = None
    record: StageRecord | None = None

    def __post_init__(self) -> None:
        self._metrics, self._stamps = Tail(self.directory / "metrics.jsonl"), ()

    def read(self, kind: str) -> StageRecord:
        """What the stage has written by now; the same object when nothing has changed."""
        lines, anew = self._metrics.read()
        if anew:
            self.steps, self.evals, self.balance, self.last_load = {}, {}, {}, None
        for line in lines:
            if (parsed := rundata.parse_line(line)) is not None:
                self._take(parsed)
            if len(self.steps) > MOST_STEPS:
                self.steps = thinned(self.steps)
        stamps = tuple(stamp(self.directory / name) for name in ("result.json", "samples.jsonl"))
        if self.record is None or lines or anew or stamps != self._stamps:
            self._stamps, self.record = stamps, self._record(kind)
        return self.record

    def _take(self, line: Line) -> None:
        step, kind = number(line.get("step")), line.get("kind")
        if step is None:
            return
        if kind == "step":
            self.steps[step] = line
        elif kind == "eval":
            self.evals[step] = line
        elif kind == "load" and (ratios := load_ratios(line)):
            self.balance[step], self.last_load = ratios, line

    def _record(self, kind: str) -> StageRecord:
        return StageRecord(
            name=self.directory.name,
            kind=kind,
            steps=[self.steps[step] for step in sorted(self.steps)],
            loads=[] if self.last_load is None else [self.last_load],
            evals=[self.evals[step] for step in sorted(self.evals)],
            samples=[rundata.read_sample(line) for line in rundata.read_lines(self.directory / "samples.jsonl")],
            result=rundata.read_object(self.directory / "result.json"),
        )


def thinned(lines: dict[float, Line]) -> dict[float, Line]:
    """Every second line; the first and the last stay."""
    steps = sorted(lines)
    return {step: lines[step] for i, step in enumerate(steps) if i % 2 == 0 or i == len(steps) - 1}


def load_ratios(line: Line) -> list[float]:
    """Max over mean of each layer of a load line; empty when it is not one."""
    layers, ratios = line.get("layers"), []
    for layer in layers if isinstance(layers, list) else []:
        shares = [number(share) for share in layer] if isinstance(layer, list) else []
        known = [share for share in shares if share is not None and share >= 0]
        if not known or len(known) != len(shares) or sum(known) <= 0:
            return []
        ratios.append(max(known) * len(known) / sum(known))
    return ratios


SMALL_FILES = ("recipe.toml", "run.json", "environment.json", "summary.json")


class RunFiles:
    """A run's directory, followed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stages: dict[str, StageFiles] = {}
        self._record: RunRecord | None = None
        self._stamps: tuple[Stamp | None, ...] = ()

    def read(self) -> RunRecord:
        """The run as it is now; the same object when nothing has changed."""
        stamps = tuple(stamp(self.directory / name) for name in SMALL_FILES)
        fresh = self._record is None or stamps != self._stamps
        base = self._small(stamps) if fresh or self._record is None else self._record
        kinds = rundata.stage_kinds(self.directory, base.recipe)
        self.stages = {name: self.stages.get(name) or StageFiles(self.directory / name) for name in kinds}
        stages = [self.stages[name].read(kind) for name, kind in kinds.items()]
        same = len(stages) == len(base.stages) and all(a is b for a, b in zip(stages, base.stages, strict=True))
        if fresh or not same:
            self._record = RunRecord(
                base.directory, base.name, base.recipe, base.recipe_text, base.environment, base.summary, stages
            )
        return self._record or base

    def _small(self, stamps: tuple[Stamp | None, ...]) -> RunRecord:
        self._stamps = stamps
        text = rundata.read_whole(self.directory / "recipe.toml")
        try:
            recipe: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            recipe = {}
        environment = rundata.read_object(self.directory / "environment.json") or {}
        summary = rundata.read_object(self.directory / "summary.json") or {}
        name = str(summary.get("name") or rundata.run_name(self.directory))
        return RunRecord(self.directory, name, recipe, text, environment, summary, [])
