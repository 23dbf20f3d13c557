"""The ledger as a table for the terminal (`tael costs [RUN]`) and as plain rows for `--json`."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tael.cost import units
from tael.cost.ledger import Ledger, Total, sum_entries
from tael.errors import TaelError, did_you_mean

_COLUMNS = ("Tokens", "FLOPs", "Util", "Time", "Memory", "Energy", "Cost")


def cost_totals(ledger: Ledger, run: str | None = None) -> list[Total]:
    """One Total a run, or one a stage of `run`. Raises TaelError when `run` has no entry."""
    totals = ledger.totals("run" if run is None else "stage", run)
    if run is not None and not totals:
        names = {entry.run for entry in ledger.entries()}
        hint = did_you_mean(run, names) if names else "; the ledger is empty"
        raise TaelError(f"{ledger.path}: no costs for run '{run}'{hint}")
    return totals


def cost_rows(ledger: Ledger, run: str | None = None) -> list[dict[str, Any]]:
    """What `cost_table` shows, as numbers in SI units, without the sum line; `key` is named `run` or `stage`."""
    name = "run" if run is None else "stage"
    rows = [total.model_dump() for total in cost_totals(ledger, run)]
    return [{name: row.pop("key"), **row} for row in rows]


def cost_cells(total: Total) -> tuple[str, ...]:
    """The readable cells of one line: tokens, FLOPs, utilisation, time, memory, energy, cost."""
    return (
        units.count(total.tokens),
        units.flops(total.flops),
        units.percent(total.utilisation),
        units.duration(total.seconds),
        units.size(total.peak_memory_bytes),
        units.energy(total.joules, total.joules_estimated, total.joules_partial),
        units.money(total.dollars),
    )


def cost_table(ledger: Ledger, run: str | None = None) -> Table:
    """Costs by run, or by stage of `run`, with their sum; fits 80 columns."""
    totals = cost_totals(ledger, run)
    whole = sum_entries("total", ledger.entries(run))
    title = Text("Costs by run") if run is None else Text(f"Costs of {run} by stage")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_footer=len(totals) > 1)
    footer = cost_cells(whole)
    table.add_column("Run" if run is None else "Stage", footer="Total", overflow="fold", ratio=None)
    for name, sum_cell in zip(_COLUMNS, footer, strict=True):
        table.add_column(name, footer=sum_cell, justify="right", no_wrap=True)
    for total in totals:
        # Text, not str: rich would read [brackets] in a name as markup.
        table.add_row(Text(total.key), *cost_cells(total))
    table.caption = _caption(whole)
    table.caption_justify = "left"
    return table


def _caption(whole: Total) -> Text:
    if not whole.entries:
        return Text("nothing in the ledger yet")
    price = "at the price of each entry"
    if whole.price_per_hour is not None:
        price = f"at {units.money(whole.price_per_hour)} an hour"
    estimate = "; ~ energy is estimated from average watts" if whole.joules_estimated else ""
    return Text(f"{price}{estimate}; memory is the largest of its entries")
