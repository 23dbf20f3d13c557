"""Costs as a table for the terminal, as plain rows for JSON, and as CSV (`tael costs [RUN]`).

A line is one kind of work under one key. Kinds do not overlap: what an evaluation took is not in the training's line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from tael.cost import units
from tael.cost.ledger import EVALUATION, Entry, Grouping, Ledger, Total, sum_entries
from tael.cost.runcosts import sum_totals
from tael.errors import TaelError, did_you_mean

LineKind = Literal["training", "evaluation", "serving"]
KINDS: tuple[LineKind, ...] = ("training", "evaluation", "serving")
KEY = 14
"""Characters of a name that are not broken over lines before a figure that can be spared gives way."""


@dataclass(frozen=True)
class Span:
    """UTC days, both ends included; None: no end."""

    since: date | None = None
    until: date | None = None

    def has(self, started: str) -> bool:
        """Whether a moment, as ledgers write it, lies in it."""
        day = started[:10]
        return (self.since is None or self.since.isoformat() <= day) and (
            self.until is None or day <= self.until.isoformat()
        )

    def __str__(self) -> str:
        words = [(self.since, "since"), (self.until, "until")]
        return " ".join(f"{word} {day.isoformat()}" for day, word in words if day is not None)


@dataclass(frozen=True)
class Answers:
    """What only served requests have."""

    charged: float
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    untimed: int
    """Requests whose time with the engine is not known: seconds, FLOPs, energy and dollars are then lower bounds."""


@dataclass(frozen=True)
class Line:
    """One kind of work under one key. Training is all of a run but its evaluations; of served requests `entries` is
    the number, and `seconds` what the engine was busy with them."""

    kind: LineKind
    total: Total
    answers: Answers | None = None


# ---------------------------------------------------------------------- lines


def ledger_lines(ledger: Ledger, by: Grouping, run: str | None = None, span: Span | None = None) -> list[Line]:
    """The ledger's entries by run, stage or UTC day, of all runs or of one. Raises TaelError for a run it lacks."""
    entries = ledger.entries(run)
    if run is not None and not entries:
        names = {entry.run for entry in ledger.entries()}
        hint = did_you_mean(run, names) if names else "; the ledger is empty"
        raise TaelError(f"{ledger.path}: no costs for run '{run}'{hint}")
    groups: dict[tuple[LineKind, str], list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.started):
        if span is None or span.has(entry.started):
            key = entry.started[:10] if by == "day" else getattr(entry, by)
            kind = "evaluation" if entry.kind == EVALUATION else "training"
            groups.setdefault((kind, key), []).append(entry)
    lines = [Line(kind, sum_entries(key, group)) for (kind, key), group in groups.items()]
    return sorted(lines, key=lambda line: KINDS.index(line.kind))


def line_rows(lines: Sequence[Line], by: str) -> list[dict[str, Any]]:
    """The lines as numbers in SI units, without the sum; the key is named as `by`."""
    nothing = dict.fromkeys(Answers.__dataclass_fields__)
    return [
        {by: line.total.key, "kind": line.kind}
        | line.total.model_dump(exclude={"key"})
        | (asdict(line.answers) if line.answers else nothing)
        for line in lines
    ]


def line_csv(lines: Sequence[Line], by: str) -> str:
    """The same as CSV with a heading; what is not known is empty."""
    names = [by, "kind", *(name for name in Total.model_fields if name != "key"), *Answers.__dataclass_fields__]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(line_rows(lines, by))
    return text.getvalue()


# ---------------------------------------------------------------------- table


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


_COLUMNS: tuple[str, ...] = ("Tokens", "FLOPs", "Util", "Time", "Memory", "Energy", "Cost", "Charged")
_ALWAYS = ("Tokens", "Time", "Cost")
_SPARED = ("Memory", "Energy", "Util", "FLOPs")
"""What a narrow terminal goes without, in this order; --json has all."""
_BOUNDED: tuple[str, ...] = ("FLOPs", "Time", "Cost")


def line_table(lines: Sequence[Line], by: str, title: str, width: int = 80, empty: str = "nothing yet") -> Table:
    """The lines with their sum, a section for each kind; fits `width` columns from 80 on."""
    rows = [_cells(line) for line in lines]
    sums = _sums(lines)
    shown = _fitting([sums, *rows], [by, *(line.total.key for line in lines), *(line.kind for line in lines)], width)
    table = Table(
        title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_footer=len(lines) > 1
    )
    table.add_column(by.capitalize(), footer="Total", overflow="fold")
    for name in shown:
        table.add_column(name, footer=sums[name], justify="right", no_wrap=True)
    apart = len({line.kind for line in lines}) > 1
    for place, (line, row) in enumerate(zip(lines, rows, strict=True)):
        if apart and (not place or lines[place - 1].kind != line.kind):
            table.add_section()
            table.add_row(Text(line.kind.capitalize(), style="bold"))
        # Text, not str: rich would read [brackets] in a name as markup.
        table.add_row(Text(line.total.key), *(row[name] for name in shown))
    table.caption, table.caption_justify = Text(_caption(lines, shown) if lines else empty), "left"
    return table


def _fitting(rows: Sequence[dict[str, str]], keys: Sequence[str], width: int) -> list[str]:
    """The columns that have anything to say, and go into `width` beside the keys."""
    wide = {name: max(len(name), *(len(row[name]) for row in rows)) for name in _COLUMNS}
    shown = [name for name in _COLUMNS if name in _ALWAYS or any(row[name] != units.MISSING for row in rows)]
    for name in _SPARED:
        taken = min(KEY, max(map(len, keys))) + sum(wide[each] for each in shown) + 3 * len(shown) + 4
        if taken > width and name in shown:
            shown.remove(name)
    return shown


def _cells(line: Line) -> dict[str, str]:
    cells = dict(zip(_COLUMNS, (*cost_cells(line.total), units.MISSING), strict=True))
    if line.answers is None:
        return cells
    cells["Charged"] = units.money(line.answers.charged)
    if line.answers.untimed == line.total.entries:
        return cells | dict.fromkeys(_BOUNDED, units.MISSING)
    return cells | ({name: f"≥{cells[name]}" for name in _BOUNDED} if line.answers.untimed else {})


def _sums(lines: Sequence[Line]) -> dict[str, str]:
    answers = [line.answers for line in lines if line.answers is not None]
    charged = units.money(sum(each.charged for each in answers)) if answers else units.MISSING
    return dict(zip(_COLUMNS, (*cost_cells(sum_totals([line.total for line in lines])), charged), strict=True))


def _caption(lines: Sequence[Line], shown: Sequence[str]) -> str:
    whole = sum_totals([line.total for line in lines])
    served = [line.answers for line in lines if line.answers is not None]
    known = whole.price_per_hour is not None and not served
    notes = [f"at {units.money(whole.price_per_hour)} an hour" if known else "at the prices of their time"]
    if whole.joules_estimated and "Energy" in shown:
        notes.append("~ energy is estimated from average watts")
    if "Memory" in shown:
        notes.append("memory is the largest of its entries")
    if served:
        notes.append("serving: what the engine was busy, beside what was charged")
    if any(each.untimed for each in served):
        notes.append("≥ or –: requests that were not timed")
    return "; ".join(notes)


# ------------------------------------------------------------------- one ledger


def cost_rows(ledger: Ledger, run: str | None = None) -> list[dict[str, Any]]:
    """What `cost_table` shows, as numbers; the key is named `run` or `stage`."""
    by = "run" if run is None else "stage"
    return line_rows(ledger_lines(ledger, by, run), by)


def cost_table(ledger: Ledger, run: str | None = None, width: int = 80) -> Table:
    """Costs by run, or by stage of `run`, with their sum. Raises TaelError when `run` has no entry."""
    by, title = ("run", "Costs by run") if run is None else ("stage", f"Costs of {run} by stage")
    return line_table(ledger_lines(ledger, by, run), by, title, width, "nothing in the ledger yet")
