"""kill -9 while requests are recorded: every one that was reported is there, the file opens, balances are right."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tael.serve.limits import KeyLimits
from tael.serve.store import Served, Store

WRITER = """
import sys
from tael.serve.store import Served, Store
path, key_id, run = sys.argv[1], int(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
store = Store(path)
for number in range(1_000_000):
    request_id = f"{run}-{number}"
    store.record(Served(request_id=request_id, key_id=key_id, model="tiny", endpoint="/chat/completions",
                        started="2025-01-01", seconds=1.0, prompt_tokens=number, completion_tokens=1,
                        dollars=number / 1024, status=200))
    print(request_id, flush=True)
"""


def start(path: Path, key_id: int, run: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(key_id), run]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> list[str]:
    """kill -9; returns the whole lines that were written up to then and not read yet."""
    assert process.stdout is not None
    process.kill()
    output = process.stdout.read()  # communicate() would miss what readline() has taken in beyond its line
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    return output.split("\n")[:-1]


def recorded(path: Path) -> dict[str, float]:
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        found = connection.execute("SELECT request_id, dollars FROM served").fetchall()
    assert len(dict(found)) == len(found)
    return dict(found)


def check(path: Path, key_id: int, run: str, reported: list[str]) -> None:
    """All that was reported is there, and at most the one after it; sums are those of the rows."""
    there = [request_id for request_id in recorded(path) if request_id.startswith(run)]
    assert there == [f"{run}-{number}" for number in range(len(there))]
    assert reported == there[: len(reported)] and len(there) <= len(reported) + 1
    store = Store(path)
    spent = sum(recorded(path).values())
    [key] = store.keys()
    assert store.spent(key_id) == spent and store.balance(key) == 1000.0 - spent
    assert sum(total.dollars for total in store.totals("day")) == spent
    store.record(
        Served(
            request_id=f"after {run}",
            key_id=key_id,
            model="tiny",
            endpoint="/chat/completions",
            started="2025-01-02",
            seconds=1.0,
            prompt_tokens=1,
            completion_tokens=1,
            dollars=0.5,
            status=200,
        )
    )
    assert store.spent(key_id) == spent + 0.5
    store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store = Store(tmp_path / "serve.sqlite")
    store.add_key("anna", KeyLimits(budget_dollars=1000.0))
    store.close()
    return store.path


def test_killed_while_recording(path: Path) -> None:
    """Again and again into the same file, with a few rows and with hundreds, so that the log is written back too."""
    generator = random.Random(11)
    for run, lines in enumerate((1, 2, 30, 400)):
        process = start(path, 1, f"run{run}")
        assert process.stdout is not None
        reported = [process.stdout.readline().strip() for _ in range(lines + 1)]
        time.sleep(generator.random() * 0.01)  # to be hit anywhere in a row, not only just after a report
        check(path, 1, f"run{run}", reported[1:] + kill(process))
    assert len(recorded(path)) >= 433 + 4


def test_killed_while_another_records(path: Path) -> None:
    """The one that goes on is not held up by what the dead one left, and loses nothing."""
    processes = [start(path, 1, run) for run in ("dies", "lives")]
    reported: list[list[str]] = [[], []]
    for process, lines in zip(processes, reported, strict=True):
        assert process.stdout is not None
        lines += [process.stdout.readline().strip() for _ in range(21)]
    dead = reported[0][1:] + kill(processes[0])
    assert processes[1].stdout is not None
    reported[1] += [processes[1].stdout.readline().strip() for _ in range(20)]
    alive = reported[1][1:] + kill(processes[1])
    assert len(alive) >= 40 and set(dead) | set(alive) <= set(recorded(path))
    check(path, 1, "dies", dead)
    check(path, 1, "lives", alive)


def test_killed_while_the_file_is_made(tmp_path: Path) -> None:
    """What is left is no file, an empty one or a whole one; each can be gone on with."""
    generator = random.Random(5)
    for number in range(6):
        path = tmp_path / f"{number}.sqlite"
        process = start(path, 1, "run")
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(generator.random() * 0.01)
        process.kill()
        process.communicate(timeout=60)
        store = Store(path)
        key, secret = store.add_key("anna")
        assert store.find(secret) == key and store.spent(key.id) == 0.0
        store.close()
