"""Prices what a run does while it does it: training and evaluation apart, and no second in both.

costs = Costs(recipe.price, name, Ledger(path), parallel)
stage = costs.stage("pretrain", "pretrain", peak)
TrainerSetup(.., on_saved=stage.saved)          an entry with each checkpoint
with stage.evaluation() as spent: ...           an entry of its own for each evaluation
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from tael.cost.ledger import EVALUATION, Entry, Ledger
from tael.cost.measure import peak_memory_bytes
from tael.cost.prices import Charge, dollars, energy, hourly
from tael.recipe import PriceSettings
from tael.train import Parallel, StageResult


class Costs:
    """Writes a run's entries; of several processes only the main one does. Raises TaelError for a bad price list."""

    def __init__(self, price: PriceSettings, run: str, ledger: Ledger, parallel: Parallel) -> None:
        self.watts, self.run, self.ledger, self.parallel = price.watts, run, ledger, parallel
        self.hourly = hourly(price)

    def add(
        self,
        stage: str,
        kind: str,
        started: datetime,
        done: StageResult,
        charge: Charge | None = None,
        peak: float | None = None,
    ) -> None:
        """Record `done`, begun at `started`. `charge`: what it cost, where that is not the price of its seconds.

        `peak`: FLOP/s of a matrix product on all devices, for the utilisation column.
        """
        if not self.parallel.is_main:
            return
        charge = charge or self.hourly.over(started, done.seconds)
        joules = energy(done.seconds, self.watts)
        self.ledger.add(
            Entry(
                run=self.run,
                stage=stage,
                kind=kind,
                started=started.isoformat(),
                tokens=done.tokens,
                flops=done.flops,
                utilisation=done.flops / (done.step_seconds * peak) if peak and done.step_seconds else None,
                seconds=done.seconds,
                peak_memory_bytes=peak_memory_bytes(),
                joules=joules,
                joules_estimated=joules is not None,
                price_per_hour=charge.per_hour,
                dollars=charge.dollars,
                steps=done.steps,
            )
        )

    @contextmanager
    def measured(self, stage: str, kind: str) -> Iterator[None]:
        """Record the time the block takes, however it ends."""
        started, began = datetime.now(UTC), time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, kind, started, StageResult(seconds=time.perf_counter() - began))

    def stage(self, name: str, kind: str, peak: float) -> StageCosts:
        """The books of one stage; `peak`: FLOP/s of a matrix product on one device, 0 where it is not known."""
        return StageCosts(self, name, kind, peak)


class StageCosts:
    """One stage's entries, from now on: a stretch of training with each checkpoint, and every evaluation."""

    def __init__(self, costs: Costs, name: str, kind: str, peak: float) -> None:
        self._costs, self._name, self._kind, self._peak = costs, name, kind, peak
        self._began = datetime.now(UTC)
        self._evaluated, self._paid = 0.0, 0.0
        """Seconds and dollars of the evaluations since then."""

    @contextmanager
    def evaluation(self) -> Iterator[StageResult]:
        """Record the block's time, and the tokens and FLOPs it puts into the result it is given, at once.

        A block that ends without any, as where nothing is evaluated at a stage's beginning, stays with the training;
        one that fails is recorded with what is known.
        """
        started, began, spent, failed = datetime.now(UTC), time.perf_counter(), StageResult(), True
        try:
            yield spent
            failed = False
        finally:
            if failed or spent.tokens:
                spent.seconds = spent.step_seconds = time.perf_counter() - began
                charge = self._costs.hourly.over(started, spent.seconds)
                self._costs.add(self._name, EVALUATION, started, spent, charge, self._peak)
                self._evaluated += spent.seconds
                self._paid += charge.dollars

    def saved(self, before: StageResult, now: StageResult) -> None:
        """Record what was trained between two results, less the evaluations in between; for the loop's `on_saved`."""
        whole = now.seconds - before.seconds
        done = StageResult(
            now.steps - before.steps,
            now.tokens - before.tokens,
            now.flops - before.flops,
            max(0.0, whole - self._evaluated),
            now.step_seconds - before.step_seconds,
        )
        charge = _rest(self._costs.hourly.over(self._began, whole), self._paid, done.seconds)
        self._costs.add(
            self._name, self._kind, self._began, done, charge, self._peak * self._costs.parallel.world_size
        )
        self._began, self._evaluated, self._paid = datetime.now(UTC), 0.0, 0.0


def _rest(whole: Charge, paid: float, seconds: float) -> Charge:
    """What is left to pay of a stretch: its `seconds` lie scattered among what is `paid`, at whatever price held."""
    left = max(0.0, whole.dollars - paid)
    if math.isclose(left, dollars(seconds, whole.per_hour), rel_tol=1e-9, abs_tol=1e-12) or not seconds:
        return Charge(left, whole.per_hour)
    return Charge(left, left * 3600 / seconds)
