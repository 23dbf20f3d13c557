"""History: every owner's conversations and votes, in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from tael.errors import TaelError, did_you_mean
from tael.serve.history.database import Database
from tael.serve.history.tree import Head, Node, Role, State, Tree
from tael.serve.history.votes import Vote

MAX_WORDS = 16
"""Words of a search that are looked for."""
MAX_DEPTH = 64
"""Of lists and objects within one another, far below what Python's JSON reader refuses."""

_HEAD = "id, owner, title, folder, model, system, settings, created, updated, leaf"
_NODE = "id, conversation, parent, role, content, reasoning, tool_calls, model, created, state, figures, error"
_VOTE = "id, owner, created, prompt, chosen, rejected, chosen_model, rejected_model, tie, note"
_IN_MESSAGES = "id IN (SELECT conversation FROM nodes WHERE holds(content, ?))"
_IN_INDEX = "id IN (SELECT conversation FROM nodes WHERE id IN (SELECT rowid FROM words WHERE words MATCH ?))"
_NOT_INDEXED = "id IN (SELECT conversation FROM nodes WHERE indexed = 0 AND holds(content, ?))"
_INDEX_SOME = """UPDATE nodes SET indexed = 1 WHERE id IN
    (SELECT id FROM nodes WHERE indexed = 0 AND state <> 'running' LIMIT 50)"""


class History:
    """Conversations as trees of messages, in the SQLite file at `path` (made if it is not there). Thread safe.

    An owner sees only what is theirs: another's conversation is answered like one that does not exist. Every method
    raises TaelError, having changed nothing, when it cannot do what it says; what it did is on the disk.
    """

    def __init__(self, path: str | Path):
        self._database = Database(path)

    def close(self) -> None:
        self._database.close()

    def recover(self) -> int:
        """At start: what was running when the process ended is marked interrupted, its text kept; how many.

        Only one process may serve a file: the running answers of another would be marked as well.
        """
        with self._database.writing() as connection:
            found = connection.execute("UPDATE nodes SET state = 'interrupted' WHERE state = 'running'").rowcount
        self._index()
        return found

    # ------------------------------------------------------------- conversations

    def create(
        self,
        owner: str,
        model: str,
        title: str = "",
        folder: str = "",
        system: str = "",
        settings: dict[str, Any] | None = None,
    ) -> Head:
        """A new conversation, without messages."""
        now = _now()
        head = Head(0, owner, title, folder, model, system, settings or {}, created=now, updated=now)
        with self._database.writing() as connection:
            return self._head(connection, owner, _insert_head(connection, head))

    def heads(self, owner: str, search: str = "", folder: str | None = None) -> list[Head]:
        """Conversations, the last used first: in which every word of `search` stands somewhere (in the title or in
        any message, as part of a word too, upper or lower case), and that are in `folder` (None: in any or none)."""
        conditions, values = ["owner = ?"], [owner]
        if folder is not None:
            conditions.append("folder = ?")
            values.append(clean(folder))
        for word in clean(search).replace("\0", " ").split()[:MAX_WORDS]:
            condition, arguments = self._word(word)
            conditions.append(condition)
            values += arguments
        sql = f"SELECT {_HEAD} FROM conversations WHERE {' AND '.join(conditions)} ORDER BY updated DESC, id DESC"
        with self._database.reading() as connection:
            return [self._as_head(row) for row in connection.execute(sql, values)]

    def folders(self, owner: str) -> list[str]:
        """Names of the folders that hold conversations, sorted."""
        sql = "SELECT DISTINCT folder FROM conversations WHERE owner = ? AND folder <> ''"
        with self._database.reading() as connection:
            return sorted((name for (name,) in connection.execute(sql, (owner,))), key=str.casefold)

    def head(self, owner: str, id: int) -> Head:
        """Raises TaelError when there is no such conversation, or it is another's."""
        with self._database.reading() as connection:
            return self._head(connection, owner, id)

    def change(
        self,
        owner: str,
        id: int,
        *,
        title: str | None = None,
        folder: str | None = None,
        model: str | None = None,
        system: str | None = None,
        settings: dict[str, Any] | None = None,
        leaf: int | None = None,
    ) -> Head:
        """Change what is given; `leaf` is any message of the conversation."""
        texts = {"title": title, "folder": folder, "model": model, "system": system}
        changes: dict[str, Any] = {name: clean(text) for name, text in texts.items() if text is not None}
        if settings is not None:
            changes["settings"] = _json(settings, "settings")
        with self._database.writing() as connection:
            self._head(connection, owner, id)
            if leaf is not None:
                changes["leaf"] = self._node(connection, owner, leaf, conversation=id).id
            _set(connection, "conversations", id, changes)
            return self._head(connection, owner, id)

    def delete(self, owner: str, id: int) -> None:
        """The conversation and all its messages."""
        with self._database.writing() as connection:
            self._head(connection, owner, id)
            connection.execute("DELETE FROM nodes WHERE conversation = ?", (id,))
            connection.execute("DELETE FROM conversations WHERE id = ?", (id,))

    # ------------------------------------------------------------------ messages

    def nodes(self, owner: str, id: int) -> list[Node]:
        """All messages of a conversation, of every branch, oldest first."""
        with self._database.reading() as connection:
            self._head(connection, owner, id)
            rows = connection.execute(f"SELECT {_NODE} FROM nodes WHERE conversation = ? ORDER BY id", (id,))
            return [self._as_node(row) for row in rows]

    def node(self, owner: str, id: int) -> Node:
        """Raises TaelError when there is no such message, or it is another's."""
        with self._database.reading() as connection:
            return self._node(connection, owner, id)

    def add(
        self,
        owner: str,
        conversation: int,
        parent: int | None,
        role: Role,
        content: str = "",
        *,
        reasoning: str | None = None,
        tool_calls: Sequence[dict[str, Any]] = (),
        model: str = "",
        state: State = "done",
    ) -> Node:
        """A message after `parent` (None: a first one), which the branch on show then ends with."""
        node = Node(
            0, conversation, parent, role, content, reasoning, list(tool_calls), model, created=_now(), state=state
        )
        with self._database.writing() as connection:
            self._head(connection, owner, conversation)
            if parent is not None:
                self._node(connection, owner, parent, conversation)
            id = _insert_node(connection, node, indexed=state != "running")
            _set(connection, "conversations", conversation, {"leaf": id, "updated": node.created})
            return self._node(connection, owner, id)

    def update(
        self,
        owner: str,
        node_id: int,
        *,
        content: str | None = None,
        reasoning: str | None = None,
        tool_calls: Sequence[dict[str, Any]] | None = None,
        state: State | None = None,
        figures: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """Put what is given in place of what the message held; an `error` of "" takes it back."""
        texts = {"content": content, "reasoning": reasoning}
        changes: dict[str, Any] = {name: clean(text) for name, text in texts.items() if text is not None}
        if tool_calls is not None:
            changes["tool_calls"] = _json(list(tool_calls), "tool calls")
        if figures is not None:
            changes["figures"] = _json(figures, "figures")
        if state is not None:
            changes["state"] = _one_of(state, State, "state")
        if error is not None:
            changes["error"] = clean(error) or None
        with self._database.writing() as connection:
            node = self._node(connection, owner, node_id)
            if state is not None:
                changes["indexed"] = state != "running"
            _set(connection, "nodes", node_id, changes)
            _set(connection, "conversations", node.conversation, {"updated": _now()})

    # ---------------------------------------------------------- import and votes

    def insert(self, owner: str, trees: Iterable[Tree]) -> list[Head]:
        """Keep imported conversations (of `from_json`, ..) as `owner`'s, all or none, under ids of their own.

        Many megabytes take a while; other threads get their turn in between.
        """
        with self._database.writing() as connection:
            heads = [self._head(connection, owner, _insert_tree(connection, owner, tree)) for tree in trees]
        self._index()
        return heads

    def vote(
        self,
        owner: str,
        prompt: list[dict[str, Any]],
        chosen: str,
        rejected: str,
        chosen_model: str,
        rejected_model: str,
        tie: bool = False,
        note: str = "",
    ) -> int:
        """Keep a judgement for good: no vote is ever changed or deleted. Returns its id."""
        texts = [clean(text) for text in (chosen, rejected, chosen_model, rejected_model)]
        values = [clean(owner), _now(), _json(prompt, "prompt"), *texts, tie, clean(note)]
        with self._database.writing() as connection:
            return _insert(connection, "votes", _VOTE, values)

    def votes(self, owner: str) -> list[Vote]:
        """Oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(f"SELECT {_VOTE} FROM votes WHERE owner = ? ORDER BY id", (owner,))
            return [self._as_vote(row) for row in rows]

    # -------------------------------------------------------------------- helpers

    def _index(self) -> None:
        """Take into the index what is not yet, a little at a time."""
        found = 1
        while found:
            with self._database.writing() as connection:
                found = connection.execute(_INDEX_SOME).rowcount

    def _head(self, connection: sqlite3.Connection, owner: str, id: int) -> Head:
        sql = f"SELECT {_HEAD} FROM conversations WHERE id = ? AND owner = ?"
        row = connection.execute(sql, (id, owner)).fetchone() if _is_id(id) else None
        if row is None:
            raise TaelError(f"there is no conversation {id}")
        return self._as_head(row)

    def _node(self, connection: sqlite3.Connection, owner: str, id: int, conversation: int | None = None) -> Node:
        owned = "conversation IN (SELECT id FROM conversations WHERE owner = ?)"
        sql = f"SELECT {_NODE} FROM nodes WHERE id = ? AND {owned}"
        row = connection.execute(sql, (id, owner)).fetchone() if _is_id(id) else None
        if row is None or conversation not in (None, row[1]):
            raise TaelError(f"there is no message {id}" + ("" if conversation is None else " in this conversation"))
        return self._as_node(row)

    def _word(self, word: str) -> tuple[str, list[str]]:
        """The SQL condition that a conversation holds `word`, and its values."""
        folded = word.casefold()
        if self._database.indexed and len(word) >= 3:  # fewer characters make no trigram
            phrase = '"' + word.replace('"', '""') + '"'
            return f"(holds(title, ?) OR {_IN_INDEX} OR {_NOT_INDEXED})", [folded, phrase, folded]
        return f"(holds(title, ?) OR {_IN_MESSAGES})", [folded, folded]

    def _as_head(self, row: Sequence[Any]) -> Head:
        head = Head(*row)
        return replace(head, settings=self._parsed(head.settings))

    def _as_node(self, row: Sequence[Any]) -> Node:
        node = Node(*row)
        return replace(node, tool_calls=self._parsed(node.tool_calls), figures=self._parsed(node.figures))

    def _as_vote(self, row: Sequence[Any]) -> Vote:
        vote = Vote(*row)
        return replace(vote, prompt=self._parsed(vote.prompt), tie=bool(vote.tie))

    def _parsed(self, text: Any) -> Any:
        try:
            return json.loads(text)
        except (ValueError, TypeError, RecursionError):
            raise self._database.damaged() from None


def _insert_tree(connection: sqlite3.Connection, owner: str, tree: Tree) -> int:
    id = _insert_head(connection, replace(tree.head, owner=owner))
    ids: dict[int | None, int | None] = {None: None}
    for node in tree.nodes:  # parents first
        state = "interrupted" if node.state == "running" else node.state
        placed = replace(node, conversation=id, parent=ids[node.parent], state=state)
        ids[node.id] = _insert_node(connection, placed, indexed=False)
    _set(connection, "conversations", id, {"leaf": ids[tree.head.leaf]})
    return id


def _insert_head(connection: sqlite3.Connection, head: Head) -> int:
    texts = [clean(text) for text in (head.owner, head.title, head.folder, head.model, head.system)]
    values = [*texts, _json(head.settings, "settings"), head.created or _now(), head.updated or _now(), None]
    return _insert(connection, "conversations", _HEAD, values)


def _insert_node(connection: sqlite3.Connection, node: Node, indexed: bool) -> int:
    values = [
        node.conversation,
        node.parent,
        _one_of(node.role, Role, "role"),
        clean(node.content),
        None if node.reasoning is None else clean(node.reasoning),
        _json(node.tool_calls, "tool calls"),
        clean(node.model),
        node.created or _now(),
        _one_of(node.state, State, "state"),
        _json(node.figures, "figures"),
        None if node.error is None else clean(node.error),
        indexed,
    ]
    return _insert(connection, "nodes", f"{_NODE}, indexed", values)


def _insert(connection: sqlite3.Connection, table: str, columns: str, values: Sequence[Any]) -> int:
    """A row of `values`, which leave out the first column, the id; returns the id."""
    names = columns.removeprefix("id, ")
    sql = f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(values))})"
    return connection.execute(sql, values).lastrowid or 0


def _set(connection: sqlite3.Connection, table: str, id: int, changes: dict[str, Any]) -> None:
    if changes:
        columns = ", ".join(f"{name} = ?" for name in changes)
        connection.execute(f"UPDATE {table} SET {columns} WHERE id = ?", [*changes.values(), id])


def clean(text: str) -> str:
    """`text` as it can be kept: a lone surrogate (from a model that was cut off) has no UTF-8 and becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _json(value: Any, name: str) -> str:
    try:
        if _depth(value) <= MAX_DEPTH:
            return clean(json.dumps(value, allow_nan=False, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise TaelError(f"the {name} cannot be kept as JSON: {error}") from None
    except RecursionError:
        pass
    raise TaelError(f"the {name} cannot be kept: more than {MAX_DEPTH} levels of lists and objects")


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return 1 + max(map(_depth, inner), default=0)


def _one_of(value: str, kind: Any, name: str) -> str:
    if value not in get_args(kind):
        raise TaelError(f"no {name} {value!r}{did_you_mean(str(value), get_args(kind))}")
    return value


def _is_id(id: object) -> bool:
    return isinstance(id, int) and abs(id) < 2**63


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
