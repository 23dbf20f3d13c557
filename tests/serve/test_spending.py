"""What serving took and cost: old files brought up to date, sums with gaps, prices that follow the clock."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from requests_served import served

from tael.database import Database, Kind
from tael.errors import TaelError
from tael.serve.pricebook import PriceBook
from tael.serve.prices import DEFAULT_PRICE, Price
from tael.serve.settings import ModelSpec, ServeSettings, load_settings
from tael.serve.store import Served, Store

FIRST_VERSION = """
CREATE TABLE keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL, shown TEXT NOT NULL, hash BLOB NOT NULL UNIQUE, created TEXT NOT NULL, revoked TEXT,
    budget_dollars REAL, requests_per_minute INTEGER, tokens_per_minute INTEGER, concurrent INTEGER);
CREATE UNIQUE INDEX keys_by_name ON keys (name) WHERE revoked IS NULL;
CREATE TABLE served (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id TEXT NOT NULL, key_id INTEGER REFERENCES keys (id), model TEXT NOT NULL, endpoint TEXT NOT NULL,
    started TEXT NOT NULL, seconds REAL NOT NULL, first_token_seconds REAL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL,
    dollars REAL NOT NULL, status INTEGER NOT NULL, finish_reason TEXT);
CREATE TRIGGER served_no_update BEFORE UPDATE ON served
    BEGIN SELECT RAISE(ABORT, 'requests served are append-only'); END;
CREATE TRIGGER keys_no_delete BEFORE DELETE ON keys BEGIN SELECT RAISE(ABORT, 'keys are revoked, not deleted'); END;
INSERT INTO keys VALUES (1, 'anna', 'tael-abcd…', x'00', '2025-01-01T00:00:00+00:00', NULL, 1.0, NULL, NULL, NULL);
INSERT INTO served VALUES (
    1, 'r', 1, 'tiny', 'chat', '2025-01-01T00:00:00+00:00', 2.0, 0.5, 100, 40, 20, 0, 0.25, 200, 'stop');
PRAGMA application_id = 1413567318;
PRAGMA user_version = 1;
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "serve.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(FIRST_VERSION)
    return path


def timed(**changes: Any) -> Served:
    """A request whose time with the engine is known."""
    values = {"cached_tokens": 60, "completion_tokens": 10, "dollars": 0.5}
    return served(**values | {"engine_seconds": 2.0, "flops": 1e6, "machine_dollars": 0.01} | changes)


# -------------------------------------------------------------------- the file


def test_a_file_of_the_first_version_is_brought_up_to_date(old: Path) -> None:
    store = Store(old)
    store.record(timed(key_id=1, dollars=0.5))
    assert store.spent(1) == 0.75 and store.balance(store.named("anna")) == 0.25
    [found] = store.spending("key")
    assert (found.group, found.requests, found.untimed) == ("anna", 2, 1)
    assert (found.hit_tokens, found.miss_tokens, found.output_tokens, found.charged) == (100, 100, 30, 0.75)
    assert (found.engine_seconds, found.flops, found.machine_dollars) == (2.0, 1e6, 0.01)
    store.close()
    with sqlite3.connect(old) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 2
        rows = connection.execute("SELECT engine_seconds FROM served ORDER BY id").fetchall()
        assert rows == [(None,), (2.0,)]
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute("UPDATE served SET engine_seconds = 1")
    again = Store(old)
    assert again.spent(1) == 0.75
    again.close()


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    first = Kind("things", 0x54535431, 1, "things", ("CREATE TABLE things (a)", "INSERT INTO things VALUES (1)"))
    Database(tmp_path / "t.sqlite", first).close()
    broken = ("ALTER TABLE things ADD COLUMN b", "ALTER TABLE missing ADD COLUMN c")
    with pytest.raises(TaelError, match="no such table"):
        Database(tmp_path / "t.sqlite", Kind("things", 0x54535431, 2, "things", (), (broken,)))
    same = Database(tmp_path / "t.sqlite", first)
    with same.reading() as connection:
        assert connection.execute("SELECT * FROM things").fetchall() == [(1,)]
    same.close()
    third = (broken[:1], ("ALTER TABLE things ADD COLUMN c DEFAULT 7",))
    up = Database(tmp_path / "t.sqlite", Kind("things", 0x54535431, 3, "things", (), third))
    with up.reading() as connection:
        assert connection.execute("SELECT * FROM things").fetchall() == [(1, None, 7)]
    up.close()
    with pytest.raises(TaelError, match="schema 3, this Tael reads 2"):
        Database(tmp_path / "t.sqlite", Kind("things", 0x54535431, 2, "things", (), third[:1]))
    with pytest.raises(TaelError, match="schema 3, this Tael reads 5"):
        Database(tmp_path / "t.sqlite", Kind("things", 0x54535431, 5, "things", (), third[:1]))


# ------------------------------------------------------------------------ sums


def test_sums_by_key_day_and_model(store: Store) -> None:
    anna, _ = store.add_key("anna")
    store.record(timed(key_id=anna.id, joules=8.0))
    store.record(timed(started="2025-03-02T01:00:00+02:00", model="b", cached_tokens=0))
    store.record(timed(started="2025-03-03", engine_seconds=None, flops=None, machine_dollars=None))
    by_key = {each.group: each for each in store.spending("key")}
    assert (by_key["anna"].joules, by_key["anna"].unweighed) == (8.0, 0)
    local = by_key["local"]
    assert (local.requests, local.untimed, local.engine_seconds, local.joules, local.unweighed) == (
        2,
        1,
        2.0,
        None,
        2,
    )
    assert [(each.group, each.requests) for each in store.spending("day")] == [("2025-03-01", 2), ("2025-03-03", 1)]
    assert {each.group: each.miss_tokens for each in store.spending("model")} == {"tiny": 80, "b": 100}
    assert [each.group for each in store.spending("day", since="2025-03-02")] == ["2025-03-03"]
    assert [each.group for each in store.spending("day", until="2025-03-01")] == ["2025-03-01"]
    assert store.spending("key", since="2025-03-01", until="2025-03-01")[0].charged == 0.5
    assert store.spending("key", since="2026-01-01") == []


# ---------------------------------------------------------------------- prices

LIST = """
[[hour]]
name = "gpu"
from = 2025-01-01
dollars_per_hour = 3.6
[[hour]]
name = "gpu"
from = 2025-06-01
dollars_per_hour = 7.2
[[tokens]]
name = "tiny"
from = 2025-01-01
hit = 1
miss = 2
output = 4
[[tariff]]
name = "tiny"
from = 2025-01-01
window = "16:30-00:30"
factor = 0.5
"""


class Clock:
    now = datetime(2025, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(LIST)
    return path


def test_prices_follow_the_clock(prices: Path) -> None:
    specs = tuple(
        ModelSpec(name=name, model="m", **more)
        for name, more in {
            "tiny": {},
            "own": {"price": "9/9/9"},
            "other": {},
            "as": {"priced_as": "tiny"},
        }.items()
    )
    clock = Clock()
    book = PriceBook(ServeSettings(models=specs, prices=prices, machine="gpu", watts=100), clock)
    assert [str(book.price(spec)) for spec in specs] == [
        "1.0/2.0/4.0",
        "9.0/9.0/9.0",
        str(DEFAULT_PRICE),
        "1.0/2.0/4.0",
    ]
    assert book.machine_dollars(10) == pytest.approx(0.01) and book.joules(10) == 1000
    clock.now = datetime(2025, 7, 1, 17, tzinfo=UTC)
    assert book.price(specs[0]) == Price(0.5, 1.0, 2.0) == book.price(specs[3])
    assert book.price(specs[1]) == Price(9, 9, 9) and book.machine_dollars(10) == pytest.approx(0.02)
    assert PriceBook(ServeSettings(), clock).joules(10) is None


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"machine": "gpus"}, "named 'gpus'; did you mean 'gpu'?"),
        ({"models": ({"name": "a", "model": "m", "priced_as": "tny"},)}, "named 'tny'; did you mean 'tiny'?"),
    ],
)
def test_names_that_the_list_lacks(prices: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(TaelError) as caught:
        PriceBook(load_settings(None, prices=prices, **options), Clock())
    assert line in str(caught.value)


def test_a_price_that_is_yet_to_come_is_said_at_the_start(prices: Path) -> None:
    clock = Clock()
    clock.now = datetime(2024, 12, 31, tzinfo=UTC)
    with pytest.raises(TaelError, match="has no price of 'tiny' for 2024-12-31"):
        PriceBook(ServeSettings(models=(ModelSpec(name="tiny", model="m"),), prices=prices), clock)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"machine": "gpu"}, "machine is a name in a price list, and no list is given"),
        ({"machine": "gpu", "prices": Path("p.toml"), "dollars_per_hour": 1.0}, "give machine or dollars_per_hour"),
        ({"dollars_per_hour": -1.0}, "dollars_per_hour"),
        ({"watts": 0.0}, "watts"),
        ({"models": ({"name": "a", "model": "m", "price": "1/2/3", "priced_as": "b"},)}, "give price or priced_as"),
    ],
)
def test_settings_say_one_thing(options: dict[str, Any], line: str) -> None:
    with pytest.raises(TaelError) as caught:
        load_settings(None, **options)
    assert line in str(caught.value) and "Value error" not in str(caught.value)


def test_priced_as_needs_a_list() -> None:
    spec = ModelSpec(name="a", model="m", priced_as="tiny")
    with pytest.raises(TaelError, match="priced_as is a name in a price list, and no list is given"):
        PriceBook(ServeSettings(models=(spec,)), Clock())
