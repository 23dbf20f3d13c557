"""`tael keys`: the secret alone on standard output, tables and JSON, one line when wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tael.cli import app
from tael.serve.limits import KeyLimits
from tael.serve.store import FILE, Served, Store


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    def run(*arguments: str, fails: int = 0):
        result = CliRunner().invoke(app, ["keys", *arguments], prog_name="tael")
        assert result.exit_code == fails, result.output
        if fails == 1:
            assert result.stdout == "" and result.stderr.startswith("tael: ") and result.stderr.count("\n") == 1
        return result

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tael" / FILE


def spend(file: Path, key_id: int, dollars: float) -> None:
    values: dict[str, Any] = {"request_id": "r", "model": "m", "endpoint": "/", "started": "2025-01-01", "seconds": 1}
    values |= {"prompt_tokens": 1000, "cached_tokens": 400, "completion_tokens": 50, "status": 200}
    store = Store(file)
    store.record(Served(**values, key_id=key_id, dollars=dollars))
    store.close()


def test_add_prints_the_secret_alone(call: Callable, file: Path) -> None:
    result = call("add", "anna", "--budget", "5", "--requests-per-minute", "60", "--concurrent", "2")
    secret = result.stdout.removesuffix("\n")
    key = Store(file).find(secret)
    assert key is not None and key.name == "anna"
    assert key.limits == KeyLimits(budget_dollars=5.0, requests_per_minute=60, concurrent=2)
    assert secret not in result.stderr
    assert "not shown again" in result.stderr and "$5.00 budget, 60 requests/min, 2 at once" in result.stderr


def test_list(call: Callable, file: Path) -> None:
    call("add", "anna", "--budget", "5", "--tokens-per-minute", "100000")
    call("add", "[bold]bert")
    call("add", "clara", "--budget", "0.25")
    call("add", "dora")
    call("revoke", "dora")
    spend(file, 1, 1.25)
    spend(file, 3, 1.0)
    text = call("list").stdout
    assert max(map(len, text.splitlines())) <= 80
    lines = {line.split()[0]: line for line in text.splitlines() if "tael-" in line}
    assert list(lines) == ["anna", "[bold]bert", "clara"]
    assert lines["anna"].split()[2:5] == ["1", "$1.25", "$3.75"] and lines["clara"].split()[4] == "-$0.75"
    assert lines["[bold]bert"].split()[4:] == ["–", "no", "limits"]
    assert "revoked 20" in call("list", "--revoked").stdout


def test_list_as_json(call: Callable, file: Path) -> None:
    secret = call("add", "anna", "--budget", "5").stdout.strip()
    call("add", "bert")
    call("revoke", "bert")
    spend(file, 1, 1.25)
    [row] = json.loads(call("list", "--json").stdout)
    assert row.pop("created") and row == {
        "id": 1,
        "name": "anna",
        "shown": secret[:9] + "…",
        "revoked": None,
        "limits": {
            "budget_dollars": 5.0,
            "requests_per_minute": None,
            "tokens_per_minute": None,
            "concurrent": None,
        },
        "requests": 1,
        "hit_tokens": 400,
        "miss_tokens": 600,
        "output_tokens": 50,
        "spent": 1.25,
        "left": 3.75,
    }
    both = json.loads(call("list", "--revoked", "--json").stdout)
    assert [bool(each["revoked"]) for each in both] == [False, True]


def test_list_makes_nothing(call: Callable, file: Path) -> None:
    assert call("list").stdout == "no keys; make one: tael keys add NAME\n"
    assert json.loads(call("list", "--json").stdout) == []
    assert not file.parent.exists()


def test_limit_changes_what_is_given(call: Callable, file: Path) -> None:
    secret = call("add", "anna", "--budget", "5", "--requests-per-minute", "60").stdout.strip()
    result = call("limit", "anna", "--budget", "none", "--concurrent", "3")
    assert result.stdout == f"'anna' ({secret[:9]}…): 60 requests/min, 3 at once\n"
    key = Store(file).find(secret)
    assert key is not None and key.limits == KeyLimits(requests_per_minute=60, concurrent=3)
    assert "60 requests/min, 3 at once" in call("limit", secret[:9]).stdout
    assert "$0 budget" in call("limit", "anna", "--budget", "0").stdout


def test_revoke(call: Callable, file: Path) -> None:
    secret = call("add", "anna").stdout.strip()
    assert call("revoke", secret[:9]).stdout == f"revoked 'anna' ({secret[:9]}…)\n"
    assert Store(file).find(secret) is None
    assert "there are no keys" in call("revoke", "anna", fails=1).stderr


def test_state_is_where_it_is_told(call: Callable, file: Path, tmp_path: Path) -> None:
    call("add", "anna", "--state", str(tmp_path / "other"))
    assert (tmp_path / "other" / FILE).exists() and not file.exists()
    call("revoke", "anna", "--state", str(tmp_path / "other"))
    for command in ("revoke", "limit"):
        assert "there are no keys yet" in call(command, "anna", fails=1).stderr
    assert not file.exists()


def test_what_is_wrong_is_one_line(call: Callable, file: Path) -> None:
    call("add", "anna")
    assert "a key 'anna' already" in call("add", "anna", fails=1).stderr
    assert "did you mean 'anna'" in call("limit", "ana", fails=1).stderr
    assert "key name" in call("add", "two\nlines", fails=1).stderr
    file.write_bytes(b"something else" * 1000)
    for extra in ("-wal", "-shm"):
        file.with_name(FILE + extra).unlink(missing_ok=True)
    assert "not a file of Tael's keys" in call("list", fails=1).stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--budget", "-1"),
        ("--budget", "nan"),
        ("--budget", "much"),
        ("--budget", "inf"),
        ("--requests-per-minute", "0"),
        ("--tokens-per-minute", "1.5"),
        ("--concurrent", ""),
    ],
)
def test_wrong_usage(call: Callable, file: Path, wrong: tuple[str, str]) -> None:
    assert wrong[0] in call("add", "anna", *wrong, fails=2).stderr
    assert not file.exists()
