"""Trainings in turns: each gets slices of a few seconds, so that what slows the machine for a while slows all.

The clock runs in training steps alone, not in evaluations. With one thread it counts processor time, which other
work on the machine hardly moves; with several it counts wall-clock time, and the machine should be idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tael.compare.record import Curve, Point

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
"""After which shares of its steps a contestant is evaluated: closer where the learning rate falls."""
SLICE_SECONDS = 4.0


class Contestant(Protocol):
    """One model being trained; `steps` says how many steps it will take."""

    name: str
    seed: int
    setup: str
    steps: int
    parameters_total: int
    parameters_active: int
    cache_bytes_per_token: int
    flops_per_token: float
    tokens_per_step: int

    def step(self) -> None:
        """Take the next training step."""
        ...

    def bits_per_byte(self) -> float:
        """Of the held-out text, now."""
        ...


@dataclass(frozen=True)
class Clock:
    """What a second is: of `threads` threads, by the function that `read` is."""

    name: str
    threads: int
    read: Callable[[], float]

    @classmethod
    def here(cls) -> Clock:
        threads = torch.get_num_threads()
        return cls("processor", 1, time.process_time) if threads == 1 else cls("wall", threads, time.perf_counter)


OnPoint = Callable[[Contestant, Point], None]


class _Turn:
    """A contestant's way through the race."""

    def __init__(self, contestant: Contestant, clock: Clock, on_point: OnPoint | None) -> None:
        self.contestant, self.clock, self.on_point = contestant, clock, on_point
        self.done, self.seconds = 0, 0.0
        self.points: list[Point] = []
        self.stops = sorted({max(1, round(share * contestant.steps)) for share in FRACTIONS})

    @property
    def finished(self) -> bool:
        return self.done >= self.contestant.steps

    def run(self, slice_seconds: float) -> None:
        """Train for about `slice_seconds`, a step at least, or until an evaluation is due."""
        until = self.seconds + slice_seconds
        while not self.finished:
            began = self.clock.read()
            self.contestant.step()
            self.seconds += self.clock.read() - began
            self.done += 1
            if self.done in self.stops:
                self._evaluate()
                return
            if self.seconds >= until:
                return

    def _evaluate(self) -> None:
        contestant = self.contestant
        tokens = self.done * contestant.tokens_per_step
        point = Point(
            step=self.done,
            tokens=tokens,
            flops=tokens * contestant.flops_per_token,
            seconds=round(self.seconds, 4),
            bits_per_byte=round(contestant.bits_per_byte(), 6),
        )
        self.points.append(point)
        if self.on_point:
            self.on_point(contestant, point)

    def curve(self) -> Curve:
        c = self.contestant
        return Curve(
            name=c.name,
            seed=c.seed,
            setup=c.setup,
            clock=self.clock.name,
            threads=self.clock.threads,
            parameters_total=c.parameters_total,
            parameters_active=c.parameters_active,
            cache_bytes_per_token=c.cache_bytes_per_token,
            flops_per_token=c.flops_per_token,
            points=tuple(self.points),
        )


def race(
    contestants: Sequence[Contestant], on_point: OnPoint | None = None, slice_seconds: float = SLICE_SECONDS
) -> list[Curve]:
    """Train all of them to their last step, in turns; their curves in the order given."""
    clock = Clock.here()
    turns = [_Turn(contestant, clock, on_point) for contestant in contestants]
    while left := [turn for turn in turns if not turn.finished]:
        for turn in left:
            turn.run(slice_seconds)
    return [turn.curve() for turn in turns]
