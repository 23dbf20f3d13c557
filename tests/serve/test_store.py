"""Keys and requests served: secrets are not kept, rows only come, sums are right, bad files say so in one line."""

from __future__ import annotations

import math
import os
import sqlite3
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from requests_served import served

from tael.cost.ledger import Entry, Ledger
from tael.errors import TaelError
from tael.serve.limits import KeyLimits
from tael.serve.prices import DEFAULT_PRICE, Cost, Price
from tael.serve.store import ServedTotal, Store, default_state

LIMITS = KeyLimits(5.0, 60, 10_000, 2)


def rows(path: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT * FROM served ORDER BY id").fetchall()


# ------------------------------------------------------------------------------ keys


def test_a_key_is_found_by_its_secret_alone(store: Store) -> None:
    assert not store.any_keys() and store.keys() == []
    key, secret = store.add_key("anna", LIMITS)
    other, _ = store.add_key("bert")
    assert len(secret) == 48 and secret.startswith("tael-")
    assert key.shown == secret[:9] + "…" and key.revoked is None
    assert datetime.now(UTC) - datetime.fromisoformat(key.created) < timedelta(minutes=5)
    assert store.find(secret) == key and key.limits == LIMITS and other.limits == KeyLimits()
    for wrong in ("", secret[:-1], secret + "x", secret.lower(), key.shown, "anna", "\udcff", "%", "x" * 100_000):
        assert store.find(wrong) is None
    assert store.keys() == [key, other] and store.any_keys()


def test_the_secret_is_nowhere_in_the_files(store: Store) -> None:
    _, secret = store.add_key("anna")
    store.record(served())
    for file in store.path.parent.iterdir():
        assert secret[10:].encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_names_are_unique_among_keys_that_hold(store: Store) -> None:
    first, secret = store.add_key("anna")
    with pytest.raises(TaelError, match="a key 'anna' already"):
        store.add_key("anna")
    revoked = store.revoke("anna")
    assert revoked.id == first.id and revoked.revoked is not None
    assert store.find(secret) is None and store.keys() == [] and not store.any_keys()
    second, _ = store.add_key("anna")
    assert [key.id for key in store.keys(revoked=True)] == [first.id, second.id]
    assert store.named("anna") == second


@pytest.mark.parametrize("part", ["name", "shown", "start"])
def test_revoked_by_name_or_by_how_the_secret_begins(store: Store, part: str) -> None:
    key, secret = store.add_key("anna")
    store.add_key("bert")
    store.revoke({"name": "anna", "shown": key.shown, "start": secret[:9]}[part])
    [left] = store.keys()
    assert left.name == "bert"


def test_a_key_that_is_not_there(store: Store) -> None:
    with pytest.raises(TaelError, match="no key 'anna' holds; there are no keys"):
        store.revoke("anna")
    store.add_key("anna")
    store.revoke("anna")
    store.add_key("bertha")
    for change in (store.revoke, store.named, lambda name: store.set_limits(name, LIMITS)):
        with pytest.raises(TaelError, match="valid are: bertha"):
            change("anna")
        with pytest.raises(TaelError, match="did you mean 'bertha'"):
            change("berta")


def test_keys_whose_secrets_begin_alike(store: Store) -> None:
    key, _ = store.add_key("anna")
    store.add_key("bert")
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE keys SET shown = ?", (key.shown,))
    with pytest.raises(TaelError, match=r"2 keys begin with .*anna, bert"):
        store.revoke(key.shown)


@pytest.mark.parametrize(
    "name", ["", " anna", "anna\n", "a\x1b[31m", "x" * 65, "local", "tael-anna", "\udcff", "a\u202eb"]
)
def test_names_that_are_none(store: Store, name: str) -> None:
    with pytest.raises(TaelError, match="key name") as caught:
        store.add_key(name)
    assert str(caught.value).isprintable()
    assert store.keys() == []


def test_limits_are_replaced(store: Store) -> None:
    key, secret = store.add_key("o'anna; DROP TABLE keys --", LIMITS)
    changed = store.set_limits(key.name, KeyLimits(budget_dollars=0.0))
    assert changed.limits == KeyLimits(budget_dollars=0.0) and changed.id == key.id
    assert store.find(secret) == changed
    assert store.set_limits(key.shown, KeyLimits()).limits == KeyLimits()


def test_another_process_revokes(store: Store) -> None:
    _, secret = store.add_key("anna")
    other = Store(store.path)
    other.revoke("anna")
    assert store.find(secret) is None
    other.close()
    assert not store.any_keys()


# ------------------------------------------------------------------- requests served


def test_a_row_is_kept_as_it_was(store: Store) -> None:
    key, _ = store.add_key("anna")
    first = served(key_id=key.id, started="2025-03-01T12:00:00+02:00")
    second = served(request_id="x'; --", first_token_seconds=None, finish_reason=None, status=499)
    store.record(first)
    store.record(second)
    assert first.started == "2025-03-01T10:00:00+00:00"
    assert rows(store.path) == [(n, *each.model_dump().values()) for n, each in ((1, first), (2, second))]


def test_what_clients_write_never_stops_a_record(store: Store) -> None:
    store.record(served(model="\udcff\0" + "x" * 10_000, request_id="'\n<b>", endpoint="\ud800"))
    [row] = rows(store.path)
    assert row[3] == "?\0" + "x" * 198 and row[1] == "'\n<b>" and row[4] == "?"
    assert store.totals("model")[0].group == row[3]


@pytest.mark.parametrize(
    "wrong",
    [
        {"dollars": -1.0},
        {"dollars": math.nan},
        {"seconds": math.inf},
        {"prompt_tokens": -1},
        {"completion_tokens": 2**63},
        {"cached_tokens": 101},
        {"reasoning_tokens": 21},
        {"started": "noon"},
        {"status": 7},
        {"surplus": 1},
    ],
)
def test_a_row_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        served(**wrong)


def test_a_key_that_never_was_pays_for_nothing(store: Store) -> None:
    with pytest.raises(TaelError, match="FOREIGN KEY"):
        store.record(served(key_id=7))
    store.record(served())  # and the connection is still good
    assert store.spent(None) == 0.125 and store.spent(7) == 0.0


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE served SET dollars = 0",
        "DELETE FROM served WHERE id = 1",
        "INSERT OR REPLACE INTO served SELECT * FROM served",
        "DELETE FROM keys",
    ],
)
def test_the_file_refuses_changes(store: Store, statement: str) -> None:
    store.add_key("anna")
    store.record(served())
    before = rows(store.path)
    with (
        sqlite3.connect(store.path) as connection,
        pytest.raises(sqlite3.IntegrityError, match=r"append-only|revoked"),
    ):
        connection.execute(statement)
    assert rows(store.path) == before and len(store.keys()) == 1


def test_spent_and_balance(store: Store) -> None:
    key, _ = store.add_key("anna", KeyLimits(budget_dollars=1.0))
    free, _ = store.add_key("bert")
    assert store.spent(key.id) == 0.0 and store.balance(key) == 1.0 and store.balance(free) is None
    for dollars in (0.25, 0.5):
        store.record(served(key_id=key.id, dollars=dollars))
    store.record(served(key_id=None, dollars=8.0))
    assert store.spent(key.id) == 0.75 and store.balance(key) == 0.25
    assert store.spent(key.id) == 0.75  # asking twice adds nothing
    store.record(served(key_id=key.id, dollars=0.5))
    assert store.balance(key) == -0.25 and store.spent(None) == 8.0 and store.spent(free.id) == 0.0
    again = Store(store.path)
    assert [again.spent(each) for each in (key.id, free.id, None)] == [1.25, 0.0, 8.0]
    again.record(served(key_id=key.id, dollars=2.0))
    assert store.spent(key.id) == 3.25  # another process's row
    again.close()


def test_totals(store: Store) -> None:
    anna, _ = store.add_key("anna")
    store.record(served(key_id=anna.id, started="2025-03-02T00:30:00+02:00", model="b"))
    store.revoke("anna")
    again, _ = store.add_key("anna")
    store.record(served(key_id=again.id, started="2025-03-02T01:00:00", model="a", cached_tokens=0))
    store.record(served(started="2025-03-02T02:00:00", model="b", status=500, completion_tokens=6, dollars=0.0))
    assert store.totals("key") == [
        ServedTotal("anna", anna.id, 1, 64, 36, 20, 0.125),
        ServedTotal("anna", again.id, 1, 0, 100, 20, 0.125),
        ServedTotal("local", None, 1, 64, 36, 6, 0.0),
    ]
    assert store.totals("day") == [
        ServedTotal("2025-03-01", None, 1, 64, 36, 20, 0.125),
        ServedTotal("2025-03-02", None, 2, 64, 136, 26, 0.125),
    ]
    assert [(total.group, total.requests) for total in store.totals("model")] == [("b", 2), ("a", 1)]
    with pytest.raises(TaelError, match="did you mean 'model'"):
        store.totals("modell")  # type: ignore[arg-type]


def test_threads_write_and_read_at_once(store: Store) -> None:
    key, secret = store.add_key("anna")
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                store.record(served(key_id=key.id))
                assert store.find(secret) == key and store.spent(key.id) >= 0.125
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert store.spent(key.id) == 10.0 and len(rows(store.path)) == 80


def test_a_reader_does_not_wait_for_a_writer(store: Store) -> None:
    key, secret = store.add_key("anna")
    with ThreadPoolExecutor(1) as pool, store._writer.writing():
        found = pool.submit(lambda: (store.find(secret), store.spent(None)))
        assert found.result(timeout=30) == (key, 0.0)


def test_many_make_the_file_at_once(tmp_path: Path) -> None:
    made: list[Store | BaseException] = []

    def work() -> None:
        try:
            made.append(Store(tmp_path / "serve.sqlite"))
        except BaseException as error:
            made.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in made:
        assert isinstance(store, Store), store
        store.record(served())
    assert len(rows(tmp_path / "serve.sqlite")) == 8


# -------------------------------------------------------------------------- the file


def test_the_file_is_in_wal_mode_and_flushed(store: Store) -> None:
    store.record(served())
    with store._writer.writing() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def truncate(path: Path) -> None:
    Store(path).close()
    path.write_bytes(path.read_bytes()[:9000])


def newer(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 3")


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE keys (id)")


def ledger(path: Path) -> None:
    entry = {"run": "r", "stage": "s", "kind": "rl", "started": "2025-01-01", "tokens": 0, "flops": 0, "seconds": 0}
    Ledger(path).add(Entry(**entry, peak_memory_bytes=0, price_per_hour=0, dollars=0, steps=0))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda path: path.write_bytes(b"not a database, by no means" * 300), "not a file of Tael's keys"),
        (truncate, "damaged"),
        (newer, "schema 3, this Tael reads 2"),
        (foreign, "not a file of Tael's keys"),
        (ledger, "not a file of Tael's keys"),
        (Path.mkdir, "cannot be opened"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, make: Callable[[Path], Any], line: str) -> None:
    path = tmp_path / "serve.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(TaelError, match=line) as caught:
        Store(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert before is None or path.read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(TaelError, match=r"serve\.sqlite: "):
        Store(tmp_path / "state" / "serve.sqlite")


def test_values_that_cannot_be_are_damage(store: Store) -> None:
    store.add_key("anna")
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE keys SET concurrent = 'many'")
    with pytest.raises(TaelError, match="damaged"):
        store.keys()


def test_a_full_disk_loses_nothing_that_was_there(store: Store) -> None:
    store.record(served())
    with store._writer.reading() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    recorded = 1
    with pytest.raises(TaelError, match="disk is full"):
        for _ in range(200):
            store.record(served(endpoint="x" * 200))
            recorded += 1
    with store._writer.reading() as connection:
        connection.execute("PRAGMA max_page_count = 100000")
    store.record(served())
    assert len(rows(store.path)) == recorded + 1 and store.spent(None) == 0.125 * (recorded + 1)


@pytest.mark.parametrize(("given_home", "under"), [("/data", "/data/tael"), ("", None), ("data", None)])
def test_where_state_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given_home: str, under: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", given_home)
    assert default_state() == Path(under or tmp_path / ".local" / "share" / "tael")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_state() == tmp_path / ".local" / "share" / "tael"


# ---------------------------------------------------------------------------- prices


def test_what_tokens_cost() -> None:
    assert Price(0.028, 0.28, 0.42) == DEFAULT_PRICE
    cost = DEFAULT_PRICE.cost(1_000_000, 500_000, 2_000_000)
    assert cost == Cost(0.028, 0.14, 0.84) and cost.total == pytest.approx(1.008)
    assert DEFAULT_PRICE.cost(0, 0, 0).total == 0


PRICES = st.floats(0, 1e15)
repeatable = settings(deadline=None, derandomize=True, database=None)


@repeatable
@given(PRICES, PRICES, PRICES)
def test_a_price_is_read_as_it_is_written(hit: float, miss: float, output: float) -> None:
    price = Price(hit, miss, output)
    assert Price.parse(str(price)) == price


@repeatable
@given(st.lists(st.tuples(*[st.integers(0, 10**9)] * 3), max_size=20))
def test_costs_add_up(requests: list[tuple[int, int, int]]) -> None:
    whole = (
        DEFAULT_PRICE.cost(*(sum(counts) for counts in zip(*requests, strict=True))) if requests else Cost(0, 0, 0)
    )
    assert math.fsum(DEFAULT_PRICE.cost(*each).total for each in requests) == pytest.approx(whole.total)


@pytest.mark.parametrize(
    "text", ["", "1", "1/2", "1/2/3/4", "a/b/c", "-1/2/3", "1/nan/3", "1/2/inf", "1/2/1e400", "1//3"]
)
def test_a_price_that_is_none(text: str) -> None:
    with pytest.raises(TaelError, match="price"):
        Price.parse(text)


@pytest.mark.parametrize("counts", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (10**400, 0, 0)])
def test_counts_that_are_none(counts: tuple[int, int, int]) -> None:
    with pytest.raises(TaelError, match="number of"):
        DEFAULT_PRICE.cost(*counts)


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Store(tmp_path / "state" / "serve.sqlite").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state" / "serve.sqlite").stat().st_mode) == 0o600
