"""The cost lines of one run: from the ledger, and for stages it does not know yet from the run directory."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Any

from tael.cost.ledger import EVALUATION, Entry, Ledger, Total, sum_entries
from tael.cost.prices import dollars, hourly
from tael.cost.rundata import RunRecord, StageRecord, number
from tael.errors import TaelError
from tael.recipe import PriceSettings


def run_entries(run: RunRecord, ledger: Ledger | None) -> list[Entry]:
    """The ledger's entries of this run: by its name, else by the name of its folder."""
    if ledger is None:
        return []
    return ledger.entries(run.name) or ledger.entries(run.directory.resolve().name)


def stage_totals(run: RunRecord, ledger: Ledger | None) -> list[Total]:
    """One Total a stage that has begun, its evaluations included, in the run's order; what the recipe does not name
    comes last."""
    entries = run_entries(run, ledger)
    names = list(dict.fromkeys([*(stage.name for stage in run.stages), *(entry.stage for entry in entries)]))
    records = {stage.name: stage for stage in run.stages}
    totals = []
    for name in names:
        mine = [entry for entry in entries if entry.stage == name]
        if mine:
            totals.append(sum_entries(name, mine))
        elif name in records and records[name].status != "waiting":
            totals.append(_from_files(records[name], recipe_price(run.recipe)))
    return totals


def evaluation_total(run: RunRecord, ledger: Ledger | None) -> Total | None:
    """What of all that was evaluation; None where the ledger knows of none."""
    found = [entry for entry in run_entries(run, ledger) if entry.kind == EVALUATION]
    return sum_entries(EVALUATION, found) if found else None


def sum_totals(totals: list[Total]) -> Total:
    """The sum line over stages."""
    prices = {total.price_per_hour for total in totals}
    known = [total.joules for total in totals if total.joules is not None]
    timed = [(total.utilisation, total.seconds) for total in totals if total.utilisation is not None]
    weight = sum(seconds for _, seconds in timed)
    return Total(
        key="total",
        entries=sum(total.entries for total in totals),
        steps=sum(total.steps for total in totals),
        tokens=sum(total.tokens for total in totals),
        flops=sum(total.flops for total in totals),
        utilisation=sum(part * seconds for part, seconds in timed) / weight if weight else None,
        seconds=sum(total.seconds for total in totals),
        peak_memory_bytes=max((total.peak_memory_bytes for total in totals), default=0),
        joules=sum(known) if known else None,
        joules_estimated=any(total.joules_estimated for total in totals),
        joules_partial=bool(known) and any(total.joules is None or total.joules_partial for total in totals),
        price_per_hour=prices.pop() if len(prices) == 1 else None,
        dollars=sum(total.dollars for total in totals),
    )


def recipe_price(recipe: dict[str, Any]) -> float:
    """Dollars an hour by a run's recipe as it was read; today's, where that names a price list."""
    table = recipe.get("price")
    table = table if isinstance(table, dict) else {}
    prices, entry = table.get("prices"), table.get("entry")
    if isinstance(prices, str) and isinstance(entry, str):
        with contextlib.suppress(TaelError):
            return hourly(PriceSettings(prices=prices, entry=entry)).at(datetime.now(UTC))
    price = number(table.get("dollars_per_hour"))
    return PriceSettings().dollars_per_hour if price is None or price < 0 else price


def _from_files(stage: StageRecord, price: float) -> Total:
    """What result.json or the last step line says; 0 entries marks that the ledger does not hold it."""
    last = stage.steps[-1] if stage.steps else {}
    source = last | (stage.result or {})
    seconds = number(source.get("seconds")) or stage.seconds

    def positive(key: str) -> float:
        return max(0.0, number(source.get(key)) or 0.0)

    return Total(
        key=stage.name,
        entries=0,
        steps=int(positive("steps") or positive("step")),
        tokens=int(positive("tokens")),
        flops=positive("flops"),
        utilisation=number(last.get("utilisation")),
        seconds=seconds,
        peak_memory_bytes=int(positive("peak_memory_bytes")),
        joules=None,
        joules_estimated=False,
        joules_partial=False,
        price_per_hour=price,
        dollars=dollars(seconds, price),
    )
