"""The ledger: append-only, exact sums, whole after kill -9 and under several writers, clear about bad files."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from tael.cost.ledger import Ledger
from tael.cost.prices import dollars
from tael.errors import TaelError

WRITER = """
import sys
from tael.cost.ledger import Entry, Ledger
path, run, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
ledger = Ledger(path)
for step in range(count):
    ledger.add(Entry(run=run, stage="s", kind="rl", started="2025-01-01T00:00:00Z", tokens=step, flops=1.0,
                     seconds=1.0, peak_memory_bytes=1, price_per_hour=1.0, dollars=0.5, steps=1))
    print(step, flush=True)
"""


def write_elsewhere(path: Path, run: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), run, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def integrity(path: Path) -> str:
    with sqlite3.connect(path) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]


def test_entries_come_back_as_they_went_in(tmp_path, make_entry):
    ledger = Ledger(tmp_path / "deep" / "ledger.sqlite")
    assert ledger.entries() == [] and ledger.totals("run") == []
    assert not ledger.path.exists()
    first = make_entry(detail={"note": "ünï", "list": [1, 2.5, None]}, joules=None, utilisation=None, flops=3e24)
    second = make_entry(run="other'; DROP TABLE entries; --", started="2025-11-23T14:00:00+02:00")
    ledger.add(first)
    ledger.add(second)
    assert ledger.entries() == [first, second]
    assert Ledger(ledger.path).entries(second.run) == [second]
    assert second.started == "2025-11-23T12:00:00+00:00"
    assert ledger.entries("absent") == []


def test_schema_version_and_wal_are_in_the_file(ledger):
    with sqlite3.connect(ledger.path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 1
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


@pytest.mark.parametrize(
    "wrong", [{"seconds": -1.0}, {"flops": float("nan")}, {"tokens": 2**63}, {"started": "noon"}]
)
def test_entry_refuses_what_cannot_be(make_entry, wrong):
    with pytest.raises(ValidationError):
        make_entry(**wrong)


def test_detail_must_be_json(tmp_path, make_entry):
    with pytest.raises(TaelError, match="detail"):
        Ledger(tmp_path / "l.sqlite").add(make_entry(detail={"x": float("inf")}))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET dollars = 0",
        "DELETE FROM entries",
        "DELETE FROM entries WHERE id = 1",
        "INSERT OR REPLACE INTO entries SELECT * FROM entries WHERE id = 1",
        "REPLACE INTO entries SELECT * FROM entries",
    ],
)
def test_append_only_is_enforced_by_the_file(ledger, statement):
    before = ledger.entries()
    with sqlite3.connect(ledger.path) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    assert ledger.entries() == before


def test_totals_sum_the_sittings_of_a_resumed_stage(ledger):
    totals = {total.key: total for total in ledger.totals("stage", run="demo")}
    assert list(totals) == ["pretrain", "sft", "rl"]
    sft = totals["sft"]
    assert (sft.entries, sft.steps, sft.tokens, sft.seconds, sft.joules) == (2, 200, 1_638_400, 120.0, 3600.0)
    assert sft.dollars == pytest.approx(dollars(120, 0.08)) and sft.price_per_hour == 0.08
    (whole,) = ledger.totals("run")
    assert whole.key == "demo" and whole.entries == 4
    assert whole.utilisation == pytest.approx((0.21 * (312 + 120) + 0.09 * 126) / 558)
    assert whole.dollars == pytest.approx(sum(total.dollars for total in totals.values()))


def test_totals_by_utc_day_and_with_unknowns(tmp_path, make_entry):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add(make_entry(started="2025-01-02T00:30:00+02:00", joules=None, utilisation=None, price_per_hour=1.0))
    ledger.add(make_entry(started="2025-01-02T00:30:00Z", peak_memory_bytes=7))
    ledger.add(make_entry(started="2025-01-01T10:00:00", joules=5.0, joules_estimated=False))
    first, second = ledger.totals("day")
    assert (first.key, second.key) == ("2025-01-01", "2025-01-02")
    assert first.joules == 5.0 and first.joules_partial and not first.joules_estimated
    assert first.price_per_hour is None and first.utilisation == 0.21
    assert second.peak_memory_bytes == 7 and second.joules_estimated
    with pytest.raises(TaelError, match="did you mean 'stage'"):
        ledger.totals("stages")  # type: ignore[arg-type]


def test_entries_written_before_kill_9_survive(tmp_path):
    path = tmp_path / "l.sqlite"
    for round_ in range(3):
        writer = write_elsewhere(path, f"run{round_}", 100_000)
        assert writer.stdout is not None
        said = [writer.stdout.readline() for _ in range(20 + 7 * round_)]
        os.kill(writer.pid, signal.SIGKILL)
        said += writer.stdout.read().splitlines()
        writer.wait()
        kept = [entry.tokens for entry in Ledger(path).entries(f"run{round_}")]
        assert len(kept) >= len([line for line in said if line.strip()])
        assert kept == list(range(len(kept)))
    assert integrity(path) == "ok"


def test_a_writer_that_is_killed_leaves_the_others_writing(tmp_path):
    """kill -9 of one of four, at a moment of chance: what any of them reported is there, whole and in order."""
    generator = random.Random(3)
    for round_ in range(3):
        path = tmp_path / f"{round_}.sqlite"
        writers = [write_elsewhere(path, f"run{i}", 100_000 if i == 0 else 25) for i in range(4)]
        dying = writers[0].stdout
        assert dying is not None
        said = [[dying.readline() for _ in range(1 + generator.randrange(15))]]
        writers[0].kill()
        said[0] += dying.read().splitlines()
        said += [writer.communicate(timeout=120)[0].splitlines() for writer in writers[1:]]
        assert [writer.wait() for writer in writers] == [-signal.SIGKILL, 0, 0, 0]
        for number, lines in enumerate(said):
            kept = [entry.tokens for entry in Ledger(path).entries(f"run{number}")]
            assert kept == list(range(len(kept))) and len([line for line in lines if line.strip()]) <= len(kept)
            assert number == 0 or len(kept) == 25
        assert integrity(path) == "ok"


def test_four_processes_write_at_once_into_a_new_file(tmp_path):
    path = tmp_path / "l.sqlite"
    writers = [write_elsewhere(path, f"run{i}", 40) for i in range(4)]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    ledger = Ledger(path)
    assert [[entry.tokens for entry in ledger.entries(f"run{i}")] for i in range(4)] == [list(range(40))] * 4
    assert integrity(path) == "ok"


def test_foreign_newer_and_damaged_files_are_one_line_errors(tmp_path, ledger):
    text = tmp_path / "text.sqlite"
    text.write_text("this is no database, whatever its name says\n" * 50)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE entries (x)")
    newer = tmp_path / "newer.sqlite"
    newer.write_bytes(ledger.path.read_bytes())
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 9")
    damaged = tmp_path / "damaged.sqlite"
    content = bytearray(ledger.path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    damaged.write_bytes(content)
    words = {
        text: "not a file of Tael's costs",
        other: "not a file of Tael's costs",
        newer: "schema 9",
        damaged: "damaged",
    }
    for path, word in words.items():
        with pytest.raises(TaelError, match=word) as caught:
            Ledger(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(TaelError):
        Ledger(tmp_path)


OLD = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    run TEXT NOT NULL, stage TEXT NOT NULL, kind TEXT NOT NULL, started TEXT NOT NULL,
    tokens INTEGER NOT NULL, flops REAL NOT NULL, utilisation REAL, seconds REAL NOT NULL,
    peak_memory_bytes INTEGER NOT NULL, joules REAL, joules_estimated INTEGER NOT NULL,
    price_per_hour REAL NOT NULL, dollars REAL NOT NULL, steps INTEGER NOT NULL, detail TEXT NOT NULL);
CREATE INDEX entries_by_run ON entries (run);
CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
INSERT INTO entries VALUES (
    1, 'old', 'sft', 'sft', '2025-01-01T00:00:00+00:00', 5, 2.0, NULL, 3.0, 4, NULL, 0, 1.0, 0.5, 6,
    '{"a": 1}');
PRAGMA application_id = 1413563724;
PRAGMA user_version = 1;
"""


def test_a_ledger_of_the_first_version_is_read_and_gone_on_with(tmp_path, make_entry):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(OLD)
    ledger = Ledger(path)
    (old,) = ledger.entries()
    assert (old.run, old.tokens, old.joules, old.detail, old.steps) == ("old", 5, None, {"a": 1}, 6)
    ledger.add(make_entry(kind="evaluation"))
    assert Ledger(path).entries() == [old, make_entry(kind="evaluation")]
    assert integrity(path) == "ok"


def test_costs_may_be_read_by_whoever_may_read_the_runs(tmp_path, make_entry):
    """Unlike keys and conversations, whose files are their owner's alone."""
    before = os.umask(0o022)
    try:
        Ledger(tmp_path / "runs" / "ledger.sqlite").add(make_entry())
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "runs", tmp_path / "runs" / "ledger.sqlite")]
    assert modes == [0o755, 0o644]


def test_an_empty_file_becomes_a_ledger(tmp_path, make_entry):
    path = tmp_path / "l.sqlite"
    path.touch()
    ledger = Ledger(path)
    assert ledger.entries() == []
    ledger.add(make_entry())
    assert len(ledger.entries()) == 1


def test_disk_full_is_said_and_loses_nothing(ledger, make_entry, monkeypatch):
    connect = sqlite3.connect

    def small(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA max_page_count = 1")  # clamps to the present size: no page can be added
        return connection

    before = ledger.entries()
    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", small)
        with pytest.raises(TaelError, match="disk is full"):
            ledger.add(make_entry(detail={"long": "x" * 100_000}))
    assert Ledger(ledger.path).entries() == before
    ledger.add(make_entry())
    assert len(ledger.entries()) == len(before) + 1


def test_a_writer_that_holds_the_lock_is_waited_for(ledger, make_entry, monkeypatch):
    monkeypatch.setattr("tael.database.BUSY_SECONDS", 0.2)
    holder = sqlite3.connect(ledger.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    with pytest.raises(TaelError, match="locked"):
        ledger.add(make_entry())
    assert time.monotonic() - started >= 0.2
    holder.execute("ROLLBACK")
    holder.close()
    ledger.add(make_entry())
