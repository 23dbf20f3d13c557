"""Keys and what was served with them, in one SQLite file: who may ask, what each request cost, what is left.

Of a key's secret only the SHA-256 is kept: 256 random bits need no slow hash. Requests served are append-only, held
so by triggers in the file, as in tael.cost.ledger; so are WAL mode and full synchronisation: a request that
`record` has returned for is there after kill -9 or a power cut. Other processes (`tael keys`) may use the file at the
same time, and what they change holds at once. Keep it on a local disk, not on a network file system.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tael.cost.ledger import Count, Moment, Quantity
from tael.database import Database, Kind, append_only
from tael.errors import TaelError, did_you_mean
from tael.serve.caller import LOCAL
from tael.serve.limits import KeyLimits

FILE = "serve.sqlite"
SECRET_START = "tael-"
_MOST_TEXT = 200

Grouping = Literal["key", "day", "model"]


@dataclass(frozen=True)
class Key:
    """A key as it may be shown; its secret is known to its holder alone."""

    id: int
    name: str
    shown: str
    """How the secret begins."""
    created: str
    revoked: str | None
    """When, if it was."""
    limits: KeyLimits


class Served(BaseModel):
    """One request and its answer, whole or failed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: str
    key_id: int | None
    """None: from this machine, without a key."""
    model: str
    endpoint: str
    started: Moment
    seconds: Quantity
    first_token_seconds: Quantity | None = None
    prompt_tokens: Count
    cached_tokens: Count = 0
    """Of the prompt's: those that were in the cache."""
    completion_tokens: Count
    reasoning_tokens: Count = 0
    """Of the answer's."""
    dollars: Quantity
    status: int = Field(ge=100, le=999)
    finish_reason: str | None = None
    engine_seconds: Quantity | None = None
    """What the engine was busy with it: of each step, its share by tokens. None: served before that was measured."""
    flops: Quantity | None = None
    joules: Quantity | None = None
    """Estimated, from average watts."""
    machine_dollars: Quantity | None = None
    """What those seconds of the machine cost; `dollars` is what was charged."""

    @field_validator("request_id", "model", "endpoint", "finish_reason", mode="before")
    @classmethod
    def _clean(cls, value: Any) -> Any:
        """Clients choose some of these: keep what can be kept of any text, so that recording never fails for it."""
        return value.encode("utf-8", "replace").decode()[:_MOST_TEXT] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _parts(self) -> Served:
        if self.cached_tokens > self.prompt_tokens or self.reasoning_tokens > self.completion_tokens:
            raise ValueError("a part of the tokens is more than all of them")
        return self


@dataclass(frozen=True)
class ServedTotal:
    """The sum of all requests of one key, UTC day or model."""

    group: str
    """The key's name ("local": no key), the day, or the model."""
    key_id: int | None
    """Keys may share a name once the older is revoked; None for other groupings, and for "local"."""
    requests: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    dollars: float


@dataclass(frozen=True)
class Spending:
    """What the requests of one key, UTC day or model took and cost. Sums are of the requests that were timed."""

    group: str
    key_id: int | None
    requests: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    charged: float
    engine_seconds: float
    flops: float
    joules: float | None
    machine_dollars: float
    untimed: int
    """Requests whose seconds are not known."""
    unweighed: int
    """Requests whose joules are not known."""


_KEY = "id, name, shown, created, revoked, budget_dollars, requests_per_minute, tokens_per_minute, concurrent"
_SET_LIMITS = "budget_dollars = ?, requests_per_minute = ?, tokens_per_minute = ?, concurrent = ?"
_SERVED = tuple(Served.model_fields)
_RECORD = f"INSERT INTO served ({', '.join(_SERVED)}) VALUES ({', '.join('?' * len(_SERVED))})"
_GROUPS = {
    "key": (f"coalesce(keys.name, '{LOCAL.name}')", "served.key_id"),
    "day": ("substr(served.started, 1, 10)", "NULL"),
    "model": ("served.model", "NULL"),
}
_SCHEMA: tuple[str, ...] = (
    """CREATE TABLE keys (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL, shown TEXT NOT NULL, hash BLOB NOT NULL UNIQUE, created TEXT NOT NULL, revoked TEXT,
        budget_dollars REAL, requests_per_minute INTEGER, tokens_per_minute INTEGER, concurrent INTEGER)""",
    "CREATE UNIQUE INDEX keys_by_name ON keys (name) WHERE revoked IS NULL",
    """CREATE TABLE served (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        request_id TEXT NOT NULL, key_id INTEGER REFERENCES keys (id), model TEXT NOT NULL, endpoint TEXT NOT NULL,
        started TEXT NOT NULL, seconds REAL NOT NULL, first_token_seconds REAL,
        prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL,
        dollars REAL NOT NULL, status INTEGER NOT NULL, finish_reason TEXT,
        engine_seconds REAL, flops REAL, joules REAL, machine_dollars REAL)""",
    *append_only("served", "requests served"),
    """CREATE TRIGGER keys_no_delete BEFORE DELETE ON keys
        BEGIN SELECT RAISE(ABORT, 'keys are revoked, not deleted'); END""",
)
_MEASURED = ("engine_seconds", "flops", "joules", "machine_dollars")
_UPGRADES = (tuple(f"ALTER TABLE served ADD COLUMN {name} REAL" for name in _MEASURED),)
KIND = Kind("keys and requests", 0x54415356, 2, "keys", _SCHEMA, _UPGRADES)  # "TASV"


def default_state() -> Path:
    """Where the assistant keeps what it knows: `$XDG_DATA_HOME/tael`, or `~/.local/share/tael`."""
    given = Path(os.environ.get("XDG_DATA_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (given if given.is_absolute() else Path.home() / ".local" / "share") / "tael"


class Store:
    """Keys and requests served, in the SQLite file at `path`, which is made where there is none.

    May be used from several threads. One connection reads, one writes: who asks for a key (the event loop) never
    waits for the disk that `record` waits for. Every method raises TaelError, in one line, when the file is damaged,
    foreign, locked or full.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._writer, self._reader = Database(path, KIND), Database(path, KIND)
        self._spent: dict[int | None, float] = {}
        self._summed = 0
        """The last row of `served` that is in `_spent`."""

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    # ------------------------------------------------------------------------ keys

    def add_key(self, name: str, limits: KeyLimits | None = None) -> tuple[Key, str]:
        """Make a key and its secret, which cannot be had again. Raises TaelError for a name that is taken."""
        _check_name(name)
        limits = limits or KeyLimits()
        secret = SECRET_START + secrets.token_urlsafe(32)
        row = (name, secret[: len(SECRET_START) + 4] + "…", _hash(secret), _now(), *astuple(limits))
        columns = "name, shown, hash, created, budget_dollars, requests_per_minute, tokens_per_minute, concurrent"
        with self._writer.writing() as connection:
            taken = connection.execute("SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL", (name,)).fetchone()
            if taken:
                raise TaelError(f"there is a key '{name}' already; revoke it first, or take another name")
            made = connection.execute(
                f"INSERT INTO keys ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_KEY}", row
            ).fetchone()
        return self._key(made), secret

    def keys(self, revoked: bool = False) -> list[Key]:
        """The keys that hold, oldest first; with `revoked` those that held once too."""
        where = "" if revoked else "WHERE revoked IS NULL"
        with self._reader.reading() as connection:
            rows = connection.execute(f"SELECT {_KEY} FROM keys {where} ORDER BY id").fetchall()
        return [self._key(row) for row in rows]

    def any_keys(self) -> bool:
        """Whether a key holds: without one, only this machine is served."""
        with self._reader.reading() as connection:
            return connection.execute("SELECT 1 FROM keys WHERE revoked IS NULL").fetchone() is not None

    def find(self, secret: str) -> Key | None:
        """The key with this secret; None when there is none, or it is revoked."""
        with self._reader.reading() as connection:
            row = connection.execute(
                f"SELECT {_KEY} FROM keys WHERE hash = ? AND revoked IS NULL", (_hash(secret),)
            ).fetchone()
        return None if row is None else self._key(row)

    def revoke(self, name_or_shown: str) -> Key:
        """Let a key hold no longer. Raises TaelError where there is no such key."""
        with self._writer.writing() as connection:
            key = self._named(connection, name_or_shown)
            return self._change(connection, key, "revoked = ?", (_now(),))

    def set_limits(self, name_or_shown: str, limits: KeyLimits) -> Key:
        """Put `limits` in the place of all of a key's limits. Raises TaelError where there is no such key."""
        with self._writer.writing() as connection:
            key = self._named(connection, name_or_shown)
            return self._change(connection, key, _SET_LIMITS, astuple(limits))

    def named(self, name_or_shown: str) -> Key:
        """The key that holds under this name, or whose secret begins so. Raises TaelError where there is none."""
        with self._reader.reading() as connection:
            return self._named(connection, name_or_shown)

    # ------------------------------------------------------------ requests served

    def record(self, served: Served) -> None:
        """Append one request; it is on the disk when this returns, so call it in a thread of its own."""
        row = tuple(getattr(served, name) for name in _SERVED)
        with self._writer.writing() as connection:
            connection.execute(_RECORD, row)

    def spent(self, key_id: int | None) -> float:
        """Dollars that a key (None: this machine, without a key) has spent so far."""
        with self._reader.reading() as connection:
            # Rows are only ever appended, one writer at a time: what is new has a higher id than all that was summed.
            new = "SELECT key_id, total(dollars), max(id) FROM served WHERE id > ? GROUP BY key_id"
            for key, dollars, last in connection.execute(new, (self._summed,)).fetchall():
                self._spent[key] = self._spent.get(key, 0.0) + dollars
                self._summed = max(self._summed, last)
            return self._spent.get(key_id, 0.0)

    def balance(self, key: Key) -> float | None:
        """Dollars left of a key's budget, below 0 once it is overdrawn; None: it has no budget."""
        budget = key.limits.budget_dollars
        return None if budget is None else budget - self.spent(key.id)

    def totals(self, by: Grouping) -> list[ServedTotal]:
        """Sums by key, UTC day or model, in the order their first request began."""
        if by not in _GROUPS:
            raise TaelError(f"cannot total requests by {by!r}{did_you_mean(str(by), _GROUPS)}")
        label, key_id = _GROUPS[by]
        query = f"""SELECT {label} AS label, {key_id} AS key, count(*), sum(cached_tokens),
            sum(prompt_tokens - cached_tokens), sum(completion_tokens), total(dollars)
            FROM served LEFT JOIN keys ON keys.id = served.key_id
            GROUP BY label, key ORDER BY min(started), min(served.id)"""
        with self._reader.reading() as connection:
            return [ServedTotal(*row) for row in connection.execute(query).fetchall()]

    def spending(self, by: Grouping, since: str = "", until: str = "9999-12-31") -> list[Spending]:
        """What serving took and cost by key, UTC day or model, of days `since` to `until` (ISO), both included."""
        label, key_id = _GROUPS[by]
        query = f"""SELECT {label} AS label, {key_id} AS key, count(*), sum(cached_tokens),
            sum(prompt_tokens - cached_tokens), sum(completion_tokens), total(dollars), total(engine_seconds),
            total(flops), sum(joules), total(machine_dollars), sum(engine_seconds IS NULL), sum(joules IS NULL)
            FROM served LEFT JOIN keys ON keys.id = served.key_id
            WHERE substr(started, 1, 10) BETWEEN ? AND ?
            GROUP BY label, key ORDER BY min(started), min(served.id)"""
        with self._reader.reading() as connection:
            return [Spending(*row) for row in connection.execute(query, (since, until)).fetchall()]

    # -------------------------------------------------------------------- helpers

    def _named(self, connection: sqlite3.Connection, name: str) -> Key:
        rows = connection.execute(f"SELECT {_KEY} FROM keys WHERE revoked IS NULL").fetchall()
        keys = [self._key(row) for row in rows]
        found = [key for key in keys if name in (key.name, key.shown, key.shown.removesuffix("…"))]
        if len(found) == 1:
            return found[0]
        if found:
            raise TaelError(f"{len(found)} keys begin with {name}; give the name: {', '.join(k.name for k in found)}")
        hint = did_you_mean(name, [key.name for key in keys]) if keys else "; there are no keys"
        raise TaelError(f"no key '{name}' holds{hint}")

    def _change(self, connection: sqlite3.Connection, key: Key, what: str, values: tuple[Any, ...]) -> Key:
        query = f"UPDATE keys SET {what} WHERE id = ? RETURNING {_KEY}"
        return self._key(connection.execute(query, (*values, key.id)).fetchone())

    def _key(self, row: tuple[Any, ...]) -> Key:
        number, name, shown, created, revoked, *limits = row
        try:
            return Key(number, name, shown, created, revoked, KeyLimits(*limits))
        except (TaelError, TypeError):
            raise self._reader.damaged() from None


def _check_name(name: str) -> None:
    if not (0 < len(name) <= 64 and name.isprintable() and name == name.strip()):
        raise TaelError(f"key name {name!r}: must be 1 to 64 printable characters, with no space around them")
    if name == LOCAL.name or name.startswith(SECRET_START):
        raise TaelError(f"key name '{name}': '{LOCAL.name}' and '{SECRET_START}…' mean something else; take another")


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
