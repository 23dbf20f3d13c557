"""The ledger: what every stage and every evaluation of every run cost, in one append-only SQLite file.

The file is in WAL mode with full synchronisation, and an entry is one transaction: after a kill -9 it is
there whole or not at all, and several processes may write at once. Triggers in the file itself abort
UPDATE, DELETE and INSERT OR REPLACE, so no program changes an entry by mistake. WAL needs shared memory
between its users: keep the ledger on a local disk, not on a network file system.

A connection lives for one call only; a Ledger may therefore be used from threads and across fork.
"""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tael.database import Database, Kind, append_only
from tael.errors import TaelError, did_you_mean

EVALUATION = "evaluation"
"""The `kind` of an entry for an evaluation; `stage` says of which stage."""


def _utc(value: str) -> str:
    moment = datetime.fromisoformat(value)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.isoformat()


Moment = Annotated[str, AfterValidator(_utc)]
"""ISO 8601, kept in UTC; a time without a zone is taken as UTC."""
Quantity = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Grouping = Literal["run", "stage", "day"]


class Entry(BaseModel):
    """One uninterrupted piece of work on one stage, or one evaluation, and what it cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    stage: str
    kind: str
    started: Moment
    """When the work began."""
    tokens: Count
    flops: Quantity
    utilisation: Quantity | None = None
    """Achieved FLOP/s over the measured matrix peak (a fraction)."""
    seconds: Quantity
    peak_memory_bytes: Count
    joules: Quantity | None = None
    joules_estimated: bool = False
    price_per_hour: Quantity
    dollars: Quantity
    steps: Count
    detail: dict[str, Any] = {}
    """Anything else worth keeping; must be JSON."""


class Total(BaseModel):
    """The sum of all entries under one key (a run, a stage or a UTC day)."""

    model_config = ConfigDict(frozen=True)

    key: str
    entries: int
    """How many pieces of work the sum holds: more than one where a stage was interrupted and resumed."""
    steps: int
    tokens: int
    flops: float
    utilisation: float | None
    """Mean over time, of the entries that know theirs."""
    seconds: float
    peak_memory_bytes: int
    """The largest of any entry."""
    joules: float | None
    joules_estimated: bool
    joules_partial: bool
    """Some entries know their energy and some do not: `joules` is then a lower bound."""
    price_per_hour: float | None
    """None when entries were priced differently."""
    dollars: float


_COLUMNS = tuple(Entry.model_fields)
_INSERT = f"INSERT INTO entries ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM entries"
_SCHEMA = (
    """CREATE TABLE entries (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run TEXT NOT NULL, stage TEXT NOT NULL, kind TEXT NOT NULL, started TEXT NOT NULL,
        tokens INTEGER NOT NULL, flops REAL NOT NULL, utilisation REAL, seconds REAL NOT NULL,
        peak_memory_bytes INTEGER NOT NULL, joules REAL, joules_estimated INTEGER NOT NULL,
        price_per_hour REAL NOT NULL, dollars REAL NOT NULL, steps INTEGER NOT NULL, detail TEXT NOT NULL)""",
    "CREATE INDEX entries_by_run ON entries (run)",
    *append_only("entries", "costs"),
)
KIND = Kind("costs", 0x5441454C, 1, "entries", _SCHEMA)  # "TAEL"


class Ledger:
    """All costs of all runs, in the SQLite file at `path`; the file is made by the first `add`.

    Raises TaelError when `path` is there but is damaged, foreign, or written by a newer Tael.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists():
            self._open().close()

    def add(self, entry: Entry) -> None:
        """Append `entry`; it is on the disk when this returns. Raises TaelError when it cannot be."""
        values = entry.model_dump()
        try:
            values["detail"] = json.dumps(values["detail"], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TaelError(f"ledger entry {entry.run}/{entry.stage}: detail is no JSON: {error}") from None
        row = tuple(values[name] for name in _COLUMNS)
        self._make_file()
        with contextlib.closing(self._open()) as database, database.writing() as connection:
            connection.execute(_INSERT, row)

    def entries(self, run: str | None = None) -> list[Entry]:
        """Every entry, or those of `run`, oldest first; none when there is no ledger yet."""
        if not self.path.exists():
            return []
        where, values = ("", ()) if run is None else ("WHERE run = ?", (run,))
        with contextlib.closing(self._open()) as database:
            with database.reading() as connection:
                rows = connection.execute(f"{_SELECT} {where} ORDER BY id", values).fetchall()
            damaged = database.damaged()
        try:
            return [self._entry(row) for row in rows]
        except (ValidationError, ValueError, TypeError):
            raise damaged from None

    def totals(self, by: Grouping, run: str | None = None) -> list[Total]:
        """Sums by run, stage or UTC day (of all runs, or of `run`), in the order their first entry began."""
        if by not in ("run", "stage", "day"):
            raise TaelError(f"cannot total costs by {by!r}{did_you_mean(str(by), ('run', 'stage', 'day'))}")
        groups: dict[str, list[Entry]] = {}
        for entry in sorted(self.entries(run), key=lambda entry: entry.started):
            key = entry.started[:10] if by == "day" else getattr(entry, by)
            groups.setdefault(key, []).append(entry)
        return [sum_entries(key, group) for key, group in groups.items()]

    def _open(self) -> Database:
        return Database(self.path, KIND)

    def _make_file(self) -> None:
        """Where there is none yet; unlike keys, costs may be read by whoever may read the runs."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self.path.touch()
        except OSError as error:
            raise TaelError(f"{self.path}: cannot be made: {error.strerror}") from None

    @staticmethod
    def _entry(row: tuple[Any, ...]) -> Entry:
        values = dict(zip(_COLUMNS, row, strict=True))
        return Entry(**values | {"detail": json.loads(values["detail"])})


def sum_entries(key: str, entries: list[Entry]) -> Total:
    """Add up `entries` under the name `key`; time, tokens, FLOPs, energy and money add, memory is the maximum."""
    known = [entry.joules for entry in entries if entry.joules is not None]
    timed = [(entry.utilisation, entry.seconds) for entry in entries if entry.utilisation is not None]
    weight = sum(seconds for _, seconds in timed)
    prices = {entry.price_per_hour for entry in entries}
    return Total(
        key=key,
        entries=len(entries),
        steps=sum(entry.steps for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        flops=sum(entry.flops for entry in entries),
        utilisation=sum(part * seconds for part, seconds in timed) / weight if weight else None,
        seconds=sum(entry.seconds for entry in entries),
        peak_memory_bytes=max((entry.peak_memory_bytes for entry in entries), default=0),
        joules=sum(known) if known else None,
        joules_estimated=any(entry.joules_estimated for entry in entries if entry.joules is not None),
        joules_partial=0 < len(known) < len(entries),
        price_per_hour=prices.pop() if len(prices) == 1 else None,
        dollars=sum(entry.dollars for entry in entries),
    )
