"""The SQLite file behind History: WAL, full synchronisation, one connection that threads take in turn.

What a transaction wrote is on the disk when it returns: after a kill -9 it is there whole or not at all. WAL needs
shared memory between its users: keep the file on a local disk, not on a network file system. Only the file's owner
may read it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tael.errors import TaelError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x5441454C  # "TAEL"
BUSY_SECONDS = 10.0

_SCHEMA = (
    """CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, title TEXT NOT NULL, folder TEXT NOT NULL,
        model TEXT NOT NULL, system TEXT NOT NULL, settings TEXT NOT NULL, created TEXT NOT NULL,
        updated TEXT NOT NULL, leaf INTEGER)""",
    "CREATE INDEX conversations_by_owner ON conversations (owner, updated)",
    # No cascade from parent to child: SQLite would recurse along it, and gives up at 1000 messages.
    """CREATE TABLE nodes (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversations (id) DEFERRABLE INITIALLY DEFERRED,
        parent INTEGER REFERENCES nodes (id) DEFERRABLE INITIALLY DEFERRED,
        role TEXT NOT NULL, content TEXT NOT NULL, reasoning TEXT, tool_calls TEXT NOT NULL, model TEXT NOT NULL,
        created TEXT NOT NULL, state TEXT NOT NULL, figures TEXT NOT NULL, error TEXT, indexed INTEGER NOT NULL)""",
    "CREATE INDEX nodes_by_conversation ON nodes (conversation)",
    "CREATE INDEX nodes_by_parent ON nodes (parent)",  # what the foreign key asks for at every deletion
    "CREATE INDEX nodes_running ON nodes (state) WHERE state = 'running'",
    "CREATE INDEX nodes_not_indexed ON nodes (indexed) WHERE indexed = 0",
    """CREATE TABLE votes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, created TEXT NOT NULL, prompt TEXT NOT NULL,
        chosen TEXT NOT NULL, rejected TEXT NOT NULL, chosen_model TEXT NOT NULL, rejected_model TEXT NOT NULL,
        tie INTEGER NOT NULL, note TEXT NOT NULL)""",
    "CREATE INDEX votes_by_owner ON votes (owner)",
    """CREATE TRIGGER votes_no_update BEFORE UPDATE ON votes
        BEGIN SELECT RAISE(ABORT, 'votes are append-only'); END""",
    """CREATE TRIGGER votes_no_delete BEFORE DELETE ON votes
        BEGIN SELECT RAISE(ABORT, 'votes are append-only'); END""",
    # INSERT OR REPLACE deletes the old row without firing delete triggers unless recursive_triggers is on.
    """CREATE TRIGGER votes_no_replace BEFORE INSERT ON votes WHEN EXISTS (SELECT 1 FROM votes WHERE id = NEW.id)
        BEGIN SELECT RAISE(ABORT, 'votes are append-only'); END""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
# The index holds the messages that say so (`indexed`), the others are read at every search: one that streams would be
# indexed anew some times a second, and an import is indexed bit by bit (a megabyte takes about a second). Trigrams,
# not words: Chinese has no spaces, and part of a word is found as it is typed.
_INDEX = (
    "CREATE VIEW IF NOT EXISTS searched AS SELECT id, content FROM nodes WHERE indexed",
    """CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5
        (content, content = 'searched', content_rowid = 'id', tokenize = 'trigram')""",
    """CREATE TRIGGER words_insert AFTER INSERT ON nodes WHEN NEW.indexed
        BEGIN INSERT INTO words (rowid, content) VALUES (NEW.id, NEW.content); END""",
    """CREATE TRIGGER words_update AFTER UPDATE OF content, indexed ON nodes BEGIN
        INSERT INTO words (words, rowid, content) SELECT 'delete', OLD.id, OLD.content WHERE OLD.indexed;
        INSERT INTO words (rowid, content) SELECT NEW.id, NEW.content WHERE NEW.indexed; END""",
    """CREATE TRIGGER words_delete AFTER DELETE ON nodes WHEN OLD.indexed
        BEGIN INSERT INTO words (words, rowid, content) VALUES ('delete', OLD.id, OLD.content); END""",
    "INSERT INTO words (words) VALUES ('rebuild')",
)
_INDEX_TRIGGERS = ("words_insert", "words_update", "words_delete")
_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full, nothing was written; free some space and try again",
    sqlite3.SQLITE_NOTADB: "not a file of Tael's conversations; move it away or name another",
    sqlite3.SQLITE_CORRUPT: "the conversations are damaged; move the file away, or bring back a copy of it",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; is it a file you may read and write, in such a folder?",
    sqlite3.SQLITE_READONLY: "cannot be written; check its permissions and those of its folder",
    sqlite3.SQLITE_IOERR: "reading or writing failed; check the disk and its free space",
    sqlite3.SQLITE_BUSY: f"was locked by another process for {BUSY_SECONDS:.0f} s; try again",
    sqlite3.SQLITE_TOOBIG: "a text of over a gigabyte cannot be kept",
}


class Database:
    """The file at `path`, made with its folder if it is not there.

    Raises TaelError when it is damaged, foreign, or written by a newer Tael; so does every use, in one line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = threading.RLock()
        with self._one_line():
            self._connection = self._open()
        self.indexed = _has(self._connection, _INDEX_TRIGGERS[0])

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
        return TaelError(f"{self.path}: {_ADVICE[sqlite3.SQLITE_CORRUPT]}")

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            raise TaelError(f"{self.path}: cannot be made: {error.strerror}") from None

    def _set_up(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.create_function("holds", 2, _holds, deterministic=True)
        if self._is_ours(connection):
            if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise self.damaged()
        else:
            connection.execute("PRAGMA journal_mode = WAL")
        with _transaction(connection):
            if not self._is_ours(connection):  # asked again: another process may have been faster
                for statement in _SCHEMA:
                    connection.execute(statement)
            _keep_index(connection)

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """True: a file this version reads; False: an empty one. Anything else raises TaelError."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application == 0 and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            return False
        if application != APPLICATION_ID or not _has(connection, "conversations"):  # the ledger has that id too
            raise TaelError(f"{self.path}: {_ADVICE[sqlite3.SQLITE_NOTADB]}")
        if version != SCHEMA_VERSION:
            raise TaelError(
                f"{self.path}: schema {version}, this Tael reads {SCHEMA_VERSION}; use the Tael that wrote it"
            )
        return True

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise TaelError(f"{self.path}: {_ADVICE.get(_code(error), error)}") from None


def has_fts5(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'").fetchone() is not None


def _keep_index(connection: sqlite3.Connection) -> None:
    """Make the search index, or stop keeping it where this SQLite cannot; a later one builds it anew."""
    kept = _has(connection, _INDEX_TRIGGERS[0])
    if has_fts5(connection) and not kept:
        for statement in _INDEX:
            connection.execute(statement)
    if kept and not has_fts5(connection):
        for name in _INDEX_TRIGGERS:
            connection.execute(f"DROP TRIGGER {name}")


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


def _has(connection: sqlite3.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is not None


def _holds(text: str, word: str) -> bool:
    """`word`, folded already, stands in `text`."""
    return word in text.casefold()


def _code(error: sqlite3.Error) -> int:
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF if isinstance(code, int) else sqlite3.SQLITE_ERROR
