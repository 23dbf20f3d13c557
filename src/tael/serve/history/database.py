"""The SQLite file behind History: its tables, and the index that searches messages."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from tael import database
from tael.database import Kind, append_only, has

_SCHEMA: tuple[str, ...] = (
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
    *append_only("votes", "votes"),
)
KIND = Kind("conversations", 0x5441484E, 1, "conversations", _SCHEMA)  # "TAHN"
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


class Database(database.Database):
    """The file at `path`. `indexed`: messages are found through the index, else by reading all of them."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, KIND, _tune, _keep_index)
        with self.reading() as connection:
            self.indexed = has(connection, _INDEX_TRIGGERS[0])


def has_fts5(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'").fetchone() is not None


def _tune(connection: sqlite3.Connection) -> None:
    connection.create_function("holds", 2, _holds, deterministic=True)


def _keep_index(connection: sqlite3.Connection) -> None:
    """Make the search index, or stop keeping it where this SQLite cannot; a later one builds it anew."""
    kept = has(connection, _INDEX_TRIGGERS[0])
    if has_fts5(connection) and not kept:
        for statement in _INDEX:
            connection.execute(statement)
    if kept and not has_fts5(connection):
        for name in _INDEX_TRIGGERS:
            connection.execute(f"DROP TRIGGER {name}")


def _holds(text: str, word: str) -> bool:
    """`word`, folded already, stands in `text`."""
    return word in text.casefold()
