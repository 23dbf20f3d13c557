"""How a run is shown while it goes on: bars with the time left in a terminal, plain lines now and then elsewhere.

Both are Reporters (tael.pipeline). `make_reporter` chooses; the result is a context manager, so that the terminal is
whole again however the run ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from tael.cost import units

SECONDS_BETWEEN_LINES = 15.0
_RATE_WINDOW_SECONDS = 120.0
"""Time left is told from the steps of this long: evaluations are in it, the slow first step soon is not."""


def step_words(metrics: dict[str, Any]) -> list[str]:
    """What is worth telling of one step, in a few words each."""
    words = []
    if "reward" in metrics:  # a policy's loss says nothing to a reader
        words.append(f"reward {metrics['reward']:.0%}")
        if "completion_tokens" in metrics:
            words.append(f"length {metrics['completion_tokens']:.0f}")
        if "think_rate" in metrics:
            words.append(f"thinks {metrics['think_rate']:.0%}")
    elif "loss" in metrics:
        words.append(f"loss {metrics['loss']:.3f}")
    if metrics.get("tokens_per_second"):
        words.append(f"{units.count(metrics['tokens_per_second'])} tok/s")
    return words


def evaluation_words(metrics: dict[str, Any]) -> list[str]:
    """What an evaluation found."""
    words = []
    if metrics.get("bits_per_byte") is not None:
        words.append(f"{metrics['bits_per_byte']:.3f} bits per byte")
    accuracy = metrics.get("accuracy") or {}
    shares = [f"{mode} {a['correct'] / a['total']:.0%}" for mode, a in accuracy.items() if a.get("total")]
    if shares:
        words.append(f"right: {', '.join(shares)}")
    return words


def clock(seconds: float) -> str:
    """75 -> 1:15; 4000 -> 1:06:40."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlainReporter:
    """A line when something begins, ends or is measured, and one every `every` seconds in between."""

    def __init__(
        self,
        console: Console,
        every: float = SECONDS_BETWEEN_LINES,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._every, self._now = console, every, now
        self._name, self._steps, self._first = "", 0, 0
        self._began = self._told = now()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        return None

    def say(self, text: str) -> None:
        self._print(text)

    def stage(self, name: str, kind: str, steps: int, done: int) -> None:
        self._name, self._steps, self._first = name, steps, done
        self._began = self._told = self._now()
        if steps:
            resumed = f", going on after step {done}" if done else ""
            self._print(f"{name}: {steps} steps{resumed}")

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        now = self._now()
        # The first step is told: it shows that the run moves and how fast.
        if step > self._first + 1 and step < self._steps and now - self._told < self._every:
            return
        self._told = now
        elapsed = now - self._began
        left = elapsed / max(step - self._first, 1) * (self._steps - step)
        times = f"{clock(elapsed)} gone, {clock(left)} left" if step < self._steps else clock(elapsed)
        self._print(f"{self._name} {step}/{self._steps}: {', '.join([*step_words(metrics), times])}")

    def evaluated(self, step: int, metrics: dict[str, Any]) -> None:
        if words := evaluation_words(metrics):
            self._print(f"{self._name} {step}/{self._steps}: {', '.join(words)}")

    def stage_done(self, name: str, metrics: dict[str, Any]) -> None:
        self._print(f"{name}: done in {units.duration(self._now() - self._began)}")

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True, highlight=False)
        self._console.file.flush()


class _StageBar(ProgressColumn):
    """A bar for the stage at work; nothing for those behind it and those still waiting."""

    def __init__(self, table_column: Column) -> None:
        self._bar = BarColumn(None)
        super().__init__(table_column)

    def render(self, task: Task) -> ProgressBar | Text:
        return self._bar.render(task) if task.fields["state"] == "running" else Text("")


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if task.total else "")


class _Times(ProgressColumn):
    """Time gone and left of the stage at work; how long the finished ones took."""

    def render(self, task: Task) -> Text:
        if task.fields["state"] != "running":
            took = f"done, {clock(task.elapsed or 0)}" if task.fields["state"] == "done" else task.fields["state"]
            return Text(took, style="dim")
        left = task.time_remaining
        return Text(clock(task.elapsed or 0) + (f", {clock(left)} left" if left is not None and task.total else ""))


class LiveReporter:
    """A row a stage with its bar, steps and times, and under them what the last step and evaluation said."""

    def __init__(self, console: Console, stages: Iterable[str] = ()) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=16)),
            _StageBar(Column(ratio=1)),
            _Count(table_column=Column(no_wrap=True, justify="right")),
            _Times(table_column=Column(no_wrap=True, justify="right", min_width=18)),
            console=console,
            expand=True,
            speed_estimate_period=_RATE_WINDOW_SECONDS,
            auto_refresh=False,
        )
        self._console = console
        self._rows = {name: self._add(name) for name in ("prepare", *stages)}
        self._current = ""
        self._step: list[str] = []
        self._evaluation: list[str] = []
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._view)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._finish_row(self._current, "done" if error is None else "stopped")
        self._settle(list(self._rows), "done before" if error is None else "waiting")
        self._step = []
        self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), highlight=False)

    def stage(self, name: str, kind: str, steps: int, done: int) -> None:
        if name not in self._rows:
            self._rows[name] = self._add(name)
        names = list(self._rows)
        self._settle(names[: names.index(name)], "done before")
        self._current, self._step, self._evaluation = name, [], []
        row = self._rows[name]
        self._progress.update(row, total=steps or None, completed=done, state="running")
        self._progress.start_task(row)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        self._step = step_words(metrics)
        self._progress.update(self._rows[self._current], completed=step)

    def evaluated(self, step: int, metrics: dict[str, Any]) -> None:
        if words := evaluation_words(metrics):
            self._evaluation = words
            self.say(f"{self._current} step {step}: {', '.join(words)}")

    def stage_done(self, name: str, metrics: dict[str, Any]) -> None:
        self._finish_row(name, "done")
        self._step = []

    def _add(self, name: str):
        return self._progress.add_task(name, start=False, total=None, state="waiting")

    def _settle(self, names: list[str], state: str) -> None:
        for name in names:
            row = self._rows[name]
            if self._progress.tasks[row].fields["state"] == "waiting":
                self._progress.update(row, state=state)

    def _finish_row(self, name: str, state: str) -> None:
        row = self._rows.get(name)
        if row is not None and self._progress.tasks[row].fields["state"] == "running":
            self._progress.stop_task(row)
            self._progress.update(row, state=state)

    def _view(self) -> Group:
        words = " · ".join([*self._step, *self._evaluation])
        line = Text(f"  {words}", style="cyan", no_wrap=True, overflow="ellipsis") if self._step else Text("")
        return Group(self._progress.get_renderable(), line)


def make_reporter(console: Console, stages: Iterable[str] = ()) -> LiveReporter | PlainReporter:
    """Bars where `console` is a terminal that can move its cursor, lines elsewhere."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveReporter(console, stages)
    return PlainReporter(console)
