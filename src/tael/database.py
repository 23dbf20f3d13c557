"""SQLite files of Tael's own: write-ahead log, full synchronisation, a schema by version, errors in one line.

    KIND = Kind("conversations", 0x5441454C, 1, "nodes", ("CREATE TABLE nodes (..)", ..))
    database = Database(path, KIND)
    with database.writing() as connection: connection.execute("INSERT ..")

What a transaction wrote is on the disk when it returns: after a kill -9 it is there whole or not at all. WAL needs
shared memory between its users: keep such a file on a local disk, not on a network file system. Only the file's owner
may read it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tael.errors import TaelError

BUSY_SECONDS = 30.0

_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full, nothing was written; free some space and try again",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; is it a file you may read and write, in such a folder?",
    sqlite3.SQLITE_READONLY: "cannot be written; check its permissions and those of its folder",
    sqlite3.SQLITE_IOERR: "reading or writing failed; check the disk and its free space",
    sqlite3.SQLITE_BUSY: f"was locked by another process for {BUSY_SECONDS:.0f} s; try again",
    sqlite3.SQLITE_TOOBIG: "a text of over a gigabyte cannot be kept",
}

Tuning = Callable[[sqlite3.Connection], None]


@dataclass(frozen=True)
class Kind:
    """What a file holds, and what to say of one that is none or damaged."""

    holds: str
    application_id: int
    version: int
    table: str
    """One that every such file has: ids may be alike."""
    schema: tuple[str, ...]
    upgrades: tuple[tuple[str, ...], ...] = ()
    """What brings a file of each earlier version to the one after it, the oldest first; of `version` in the end."""

    @property
    def oldest(self) -> int:
        """The oldest version that is still read."""
        return self.version - len(self.upgrades)

    def advice(self, code: int) -> str | None:
        """What to do about an error of SQLite's."""
        if code == sqlite3.SQLITE_NOTADB:
            return f"not a file of Tael's {self.holds}; move it away or name another"
        if code == sqlite3.SQLITE_CORRUPT:
            return f"the {self.holds} in it are damaged; move the file away, or bring back a copy of it"
        return _ADVICE.get(code)


class Database:
    """One connection to the file at `path`, for threads to take in turn; the file is made if it is not there.

    `tune` is done to the connection, `prepare` to the file, within the transaction that makes or finds its tables. A
    file of an earlier version is brought up to this one, by the same transaction.
    Raises TaelError when the file is damaged, foreign, or written by a newer Tael; so does every use, in one line.
    """

    def __init__(
        self,
        path: str | Path,
        kind: Kind,
        tune: Tuning = lambda connection: None,
        prepare: Tuning | None = None,
    ) -> None:
        self.path, self._kind = Path(path), kind
        self._tune, self._prepare = tune, prepare
        self._lock = threading.RLock()
        with self._one_line():
            self._connection = self._open()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread."""
        with self._lock, self._one_line():
            yield self._connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one transaction: all of it is on the disk at the end, or nothing."""
        with self.reading() as connection, _transaction(connection):
            yield connection

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def damaged(self) -> TaelError:
        return TaelError(f"{self.path}: {self._kind.advice(sqlite3.SQLITE_CORRUPT)}")

    def _open(self) -> sqlite3.Connection:
        self._make_file()
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up(connection)
                return connection
            except sqlite3.Error as error:
                connection.close()
                # Switching a new file to WAL reports "locked" at once, without the busy timeout.
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            except BaseException:
                connection.close()
                raise

    def _make_file(self) -> None:
        """For its owner alone; SQLite gives its -wal and -shm files the same mode."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            raise TaelError(f"{self.path}: cannot be made: {error.strerror}") from None

    def _set_up(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        self._tune(connection)
        found = self._version(connection)
        if not found:
            connection.execute("PRAGMA journal_mode = WAL")
        elif connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise self.damaged()
        if found == self._kind.version and self._prepare is None:
            return
        with _transaction(connection):
            self._bring_up(connection, self._version(connection))  # asked again: another process may have been faster
            if self._prepare is not None:
                self._prepare(connection)

    def _bring_up(self, connection: sqlite3.Connection, found: int) -> None:
        """Make the tables, or what they lack, of a file of version `found` (0: empty)."""
        kind = self._kind
        if found == kind.version:
            return
        steps = kind.upgrades[found - kind.oldest :] if found else (kind.schema,)
        for statement in (each for step in steps for each in step):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {kind.application_id}")
        connection.execute(f"PRAGMA user_version = {kind.version}")

    def _version(self, connection: sqlite3.Connection) -> int:
        """That of the file, if it can be read; 0: an empty one. Anything else raises TaelError."""
        # In this order: another process may write all three at once in between.
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application == 0 and tables == 0:
            return 0
        if application != self._kind.application_id or not has(connection, self._kind.table):
            raise TaelError(f"{self.path}: {self._kind.advice(sqlite3.SQLITE_NOTADB)}")
        if not self._kind.oldest <= version <= self._kind.version:
            raise TaelError(
                f"{self.path}: schema {version}, this Tael reads {self._kind.version}; use the Tael that wrote it"
            )
        return version

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TaelError(f"{self.path}: {self._kind.advice(_code(error)) or error}") from None


def append_only(table: str, what: str) -> tuple[str, ...]:
    """Triggers that abort every change of a row, so that no program makes one by mistake."""
    refuse = f"BEGIN SELECT RAISE(ABORT, '{what} are append-only'); END"
    return (
        f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table} {refuse}",
        f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} {refuse}",
        # INSERT OR REPLACE deletes the old row without firing delete triggers (recursive_triggers is off).
        f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "
        f"WHEN EXISTS (SELECT 1 FROM {table} WHERE id = NEW.id) {refuse}",
    )


def has(connection: sqlite3.Connection, name: str) -> bool:
    """Whether there is a table, index or trigger of that name."""
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors, a full disk among them, have rolled back already
            connection.execute("ROLLBACK")
        raise


def _code(error: sqlite3.Error) -> int:
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else sqlite3.SQLITE_ERROR
