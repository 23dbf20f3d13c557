"""The ledger: what every stage of every run cost, in one append-only SQLite file.

The file is in WAL mode with full synchronisation, and an entry is one transaction: after a kill -9 it is
there whole or not at all, and several processes may write at once. Triggers in the file itself abort
UPDATE, DELETE and INSERT OR REPLACE, so no program changes an entry by mistake. WAL needs shared memory
between its users: keep the ledger on a local disk, not on a network file system.

A connection lives for one call only; a Ledger may therefore be used from threads and across fork.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tael.errors import TaelError, did_you_mean

SCHEMA_VERSION = 1
APPLICATION_ID = 0x5441454C  # "TAEL"
BUSY_SECONDS = 30.0


def _utc(value: str) -> str:
    moment = datetime.fromisoformat(value)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.isoformat()


Moment = Annotated[str, AfterValidator(_utc)]
"""ISO 8601, kept in UTC; a time without a zone is taken as UTC."""
Quantity = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Grouping = Literal["run", "stage", "day"]
Result = TypeVar("Result")


class Entry(BaseModel):
    """One uninterrupted piece of work on one stage, and what it cost."""

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
    """CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    """CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    # INSERT OR REPLACE deletes the old row without firing delete triggers (recursive_triggers is off).
    """CREATE TRIGGER entries_no_replace BEFORE INSERT ON entries
        WHEN EXISTS (SELECT 1 FROM entries WHERE id = NEW.id)
        BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full, the entry is not written; free some space and run the command again",
    sqlite3.SQLITE_NOTADB: "not a Tael ledger; move the file away or name another",
    sqlite3.SQLITE_CORRUPT: "the ledger is damaged; move it away (run folders keep their own result.json) and go on",
    sqlite3.SQLITE_CANTOPEN: "the ledger cannot be opened; is it a file you may read and write, in such a folder?",
    sqlite3.SQLITE_READONLY: "the ledger cannot be written; check its permissions and those of its folder",
    sqlite3.SQLITE_IOERR: "reading or writing the ledger failed; check the disk and its free space",
    sqlite3.SQLITE_BUSY: f"the ledger was locked by another process for {BUSY_SECONDS:.0f} s; try again",
}


class Ledger:
    """All costs of all runs, in the SQLite file at `path`; the file is made by the first `add`.

    Raises TaelError when `path` is there but is damaged, foreign, or written by a newer Tael.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists():
            self._guarded(self._check)

    def add(self, entry: Entry) -> None:
        """Append `entry`; it is on the disk when this returns. Raises TaelError when it cannot be."""
        values = entry.model_dump()
        try:
            values["detail"] = json.dumps(values["detail"], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TaelError(f"ledger entry {entry.run}/{entry.stage}: detail is no JSON: {error}") from None
        row = tuple(values[name] for name in _COLUMNS)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TaelError(f"{self.path}: its folder cannot be made: {error.strerror}") from None
        self._guarded(lambda: self._append(row))

    def entries(self, run: str | None = None) -> list[Entry]:
        """Every entry, or those of `run`, oldest first; none when there is no ledger yet."""
        if not self.path.exists():
            return []
        rows = self._guarded(lambda: self._read(run))
        try:
            return [self._entry(row) for row in rows]
        except (ValidationError, ValueError, TypeError):
            raise TaelError(f"{self.path}: {_ADVICE[sqlite3.SQLITE_CORRUPT]}") from None

    def totals(self, by: Grouping, run: str | None = None) -> list[Total]:
        """Sums by run, stage or UTC day (of all runs, or of `run`), in the order their first entry began."""
        if by not in ("run", "stage", "day"):
            raise TaelError(f"cannot total costs by {by!r}{did_you_mean(str(by), ('run', 'stage', 'day'))}")
        groups: dict[str, list[Entry]] = {}
        for entry in sorted(self.entries(run), key=lambda entry: entry.started):
            key = entry.started[:10] if by == "day" else getattr(entry, by)
            groups.setdefault(key, []).append(entry)
        return [sum_entries(key, group) for key, group in groups.items()]

    def _append(self, row: tuple[Any, ...]) -> None:
        with self._connect("rwc") as connection:
            if not _is_ledger(connection, self.path):
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            if not _is_ledger(connection, self.path):  # asked again: another process may have been faster
                for statement in _SCHEMA:
                    connection.execute(statement)
            connection.execute(_INSERT, row)
            connection.execute("COMMIT")

    def _read(self, run: str | None) -> list[tuple[Any, ...]]:
        with self._connect("rw") as connection:
            if not _is_ledger(connection, self.path):
                return []
            if run is None:
                return connection.execute(f"{_SELECT} ORDER BY id").fetchall()
            return connection.execute(f"{_SELECT} WHERE run = ? ORDER BY id", (run,)).fetchall()

    def _check(self) -> None:
        with self._connect("rw") as connection:
            if _is_ledger(connection, self.path):
                verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if verdict != "ok":
                    raise TaelError(f"{self.path}: {_ADVICE[sqlite3.SQLITE_CORRUPT]}")

    @contextlib.contextmanager
    def _connect(self, mode: str) -> Iterator[sqlite3.Connection]:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        with contextlib.closing(
            sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        ) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            yield connection

    def _guarded(self, action: Callable[[], Result]) -> Result:
        """Run `action`; wait for locks SQLite does not wait for itself, turn its errors into one line."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return action()
            except sqlite3.Error as error:
                code = getattr(error, "sqlite_errorcode", None)
                primary = code & 0xFF if isinstance(code, int) else sqlite3.SQLITE_ERROR
                # Switching a new file to WAL reports "locked" at once, without the busy timeout.
                if primary == sqlite3.SQLITE_BUSY and time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                raise TaelError(f"{self.path}: {_ADVICE.get(primary, error)}") from None

    @staticmethod
    def _entry(row: tuple[Any, ...]) -> Entry:
        values = dict(zip(_COLUMNS, row, strict=True))
        return Entry(**values | {"detail": json.loads(values["detail"])})


def _is_ledger(connection: sqlite3.Connection, path: Path) -> bool:
    """True: a ledger this version reads; False: an empty file. Anything else raises TaelError."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application == APPLICATION_ID and version == SCHEMA_VERSION:
        return True
    if application == APPLICATION_ID:
        raise TaelError(
            f"{path}: ledger schema {version}, this Tael reads {SCHEMA_VERSION}; use the Tael that wrote it"
        )
    if application == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        return False
    raise TaelError(f"{path}: {_ADVICE[sqlite3.SQLITE_NOTADB]}")


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
