"""`tael costs`: training, evaluations and serving in one table; by run, stage, day, key and model; CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tael.cost.ledger import Entry, Ledger
from tael.serve.store import FILE, Served, Store

NUMBERS = {"tokens": 100, "flops": 1e9, "peak_memory_bytes": 10**9, "price_per_hour": 3.6, "steps": 5}


def entry(run: str, stage: str, kind: str, day: str, seconds: float, **more: Any) -> Entry:
    values: dict[str, Any] = NUMBERS | {
        "run": run,
        "stage": stage,
        "kind": kind,
        "started": f"{day}T12:00:00",
        "seconds": seconds,
    }
    return Entry(**values | {"dollars": seconds / 1000} | more)


def served(key: int | None, day: str, **more: Any) -> Served:
    values = {
        "request_id": "r",
        "key_id": key,
        "model": "assistant",
        "endpoint": "chat",
        "started": f"{day}T12:00:00",
    }
    values |= {"seconds": 9.0, "prompt_tokens": 100, "cached_tokens": 60, "completion_tokens": 50, "status": 200}
    return Served(**values | {"dollars": 0.25, "engine_seconds": 4.0, "flops": 2e9, "machine_dollars": 0.125} | more)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """runs/ledger.sqlite with two runs, and state/ with what two keys were served; the working directory."""
    ledger = Ledger(tmp_path / "runs" / "ledger.sqlite")
    ledger.add(entry("a", "pretrain", "pretrain", "2025-03-01", 60.0, utilisation=0.5))
    ledger.add(entry("a", "pretrain", "evaluation", "2025-03-01", 20.0))
    ledger.add(entry("b", "pretrain", "pretrain", "2025-03-02", 40.0))
    store = Store(tmp_path / "state" / FILE)
    anna = store.add_key("anna")[0]
    store.record(served(anna.id, "2025-03-02"))
    store.record(served(None, "2025-03-03", model="old [bold]one[/]"))
    store.close()
    return tmp_path


@pytest.fixture
def rows(call: Callable, books: Path) -> Callable[..., list[dict[str, Any]]]:
    def ask(*arguments: str) -> list[dict[str, Any]]:
        result = call("costs", *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return ask


def brief(rows: list[dict[str, Any]], by: str) -> list[tuple[Any, ...]]:
    return [(row["kind"], row[by], row["seconds"], row["dollars"], row["charged"]) for row in rows]


def test_by_run_all_kinds_stand_in_one_table(rows) -> None:
    assert brief(rows("--state", "state"), "run") == [
        ("training", "a", 60.0, 0.06, None),
        ("training", "b", 40.0, 0.04, None),
        ("evaluation", "a", 20.0, 0.02, None),
        ("serving", "assistant", 4.0, 0.125, 0.25),
        ("serving", "old [bold]one[/]", 4.0, 0.125, 0.25),
    ]


def test_by_stage_day_key_and_model(rows) -> None:
    assert [line[:3] for line in brief(rows("a"), "stage")] == [
        ("training", "pretrain", 60.0),
        ("evaluation", "pretrain", 20.0),
    ]
    assert [line[:3] for line in brief(rows("--by", "day", "--state", "state"), "day")] == [
        ("training", "2025-03-01", 60.0),
        ("training", "2025-03-02", 40.0),
        ("evaluation", "2025-03-01", 20.0),
        ("serving", "2025-03-02", 4.0),
        ("serving", "2025-03-03", 4.0),
    ]
    keys = rows("--by", "key", "--state", "state")
    assert [(row["key"], row["hit_tokens"], row["miss_tokens"], row["output_tokens"]) for row in keys] == [
        ("anna", 60, 40, 50),
        ("local", 60, 40, 50),
    ]
    assert [row["model"] for row in rows("--by", "model", "--state", "state")] == ["assistant", "old [bold]one[/]"]
    assert [row["stage"] for row in rows("--by", "stage")] == ["pretrain", "pretrain"]


def test_days_from_and_to_both_included(rows) -> None:
    options = ("--state", "state", "--by", "day")
    assert {row["day"] for row in rows(*options, "--since", "2025-03-02")} == {"2025-03-02", "2025-03-03"}
    assert {row["day"] for row in rows(*options, "--until", "2025-03-01")} == {"2025-03-01"}
    only = rows(*options, "--since", "2025-03-02", "--until", "2025-03-02")
    assert [(row["kind"], row["day"]) for row in only] == [("training", "2025-03-02"), ("serving", "2025-03-02")]
    assert rows(*options, "--since", "2025-04-01") == []


@pytest.mark.parametrize("by", ["run", "stage", "day", "key", "model"])
def test_no_day_is_lost_or_counted_twice(rows, by: str) -> None:
    """However it is cut, kinds and days add up to the whole."""
    options = ("--state", "state", "--by", by)
    whole = sum(row["dollars"] for row in rows(*options))
    parts = [rows(*options, "--since", f"2025-03-0{day}", "--until", f"2025-03-0{day}") for day in (1, 2, 3)]
    assert sum(row["dollars"] for part in parts for row in part) == pytest.approx(whole)
    assert whole == pytest.approx(0.25 if by in ("key", "model") else 0.37)


def test_csv_is_the_same_as_json(call, rows) -> None:
    result = call("costs", "--state", "state", "--csv")
    found = list(csv.DictReader(io.StringIO(result.stdout)))
    wanted = rows("--state", "state")
    assert [list(row) for row in found] == [list(row) for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in other.items()}
    assert call("costs", "--csv", "--since", "2030-01-01").stdout.startswith("run,kind,entries,")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_says_what_it_shows(
    call, books: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = call("costs", "--state", "state").stdout
    assert max(map(len, text.splitlines())) <= width
    for word in (
        "Costs by run",
        "Training",
        "Evaluation",
        "Serving",
        "assistant",
        "[bold]",
        "Charged",
        "$0.50",
        "$0.37",
    ):
        assert word in text.replace("\n", " "), text
    assert "…" not in text and ("Memory" in text) == (width >= 100)
    assert "\n  Evaluation " in text  # no heading is broken over lines
    assert "Energy" not in text  # nobody knows it
    assert "Costs of a by stage" in call("costs", "a").stdout
    assert "since 2025-03-02" in call("costs", "--since", "2025-03-02").stdout


def test_requests_that_were_never_timed_are_said_to_be(call, books: Path) -> None:
    store = Store(books / "state" / FILE)
    unknown = {"engine_seconds": None, "flops": None, "machine_dollars": None}
    store.record(served(None, "2025-03-03", model="assistant", **unknown))
    store.record(served(None, "2025-03-03", model="older", **unknown))
    store.close()
    text = call("costs", "--by", "model", "--state", "state").stdout
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "≥4.0 s" in lines["assistant"] and "–" in lines["older"] and "$0.25" in lines["older"]
    assert "not timed" in text


def test_the_servers_own_place_is_looked_at_unless_named(call, books: Path) -> None:
    """XDG_DATA_HOME is the test's own; a ledger that was named is looked at alone."""
    assert "Serving" not in call("costs").stdout
    (books / "state").rename(books / "share-tael")
    (books / "share").mkdir()
    (books / "share-tael").rename(books / "share" / "tael")
    assert "Serving" in call("costs").stdout
    assert "Serving" not in call("costs", "--ledger", "runs/ledger.sqlite").stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("c",), "no costs for run 'c'; valid are: a, b"),
        (("a", "--by", "key"), "--by key: a run has no keys; leave out 'a'"),
        (("a", "--by", "model"), "--by model: a run has no models"),
        (("--csv", "--json"), "give --csv or --json, not both"),
        (("--since", "yesterday"), "--since yesterday: must be a day, such as 2025-02-26"),
        (("--until", "2025-02-30"), "--until 2025-02-30: must be a day"),
        (("--state", "nowhere"), "nothing was served with this --state"),
        (("--ledger", "nowhere.sqlite"), "no such ledger"),
        (("--ledger", "state/serve.sqlite"), "not a file of Tael's costs"),
        (("--state", "runs/", "--by", "key"), "serve.sqlite: no such file"),
    ],
)
def test_what_is_wrong_is_one_line(fails, books: Path, arguments: tuple[str, ...], line: str) -> None:
    assert line in fails("costs", *arguments)


def test_wrong_usage(call, books: Path) -> None:
    assert call("costs", "--by", "week").exit_code == 2


def test_nothing_yet(call) -> None:
    assert "nothing in the ledger yet, and nothing served" in call("costs").stdout
    assert "nothing since 2025-01-01" in call("costs", "--since", "2025-01-01").stdout
    assert json.loads(call("costs", "--by", "key", "--json").stdout) == []
    assert not Path("runs").exists() and not Path("share").exists()


# ------------------------------------------------------------------- a real run


def test_a_runs_stages_and_evaluations_add_up_to_its_time(call, run_folder: Path) -> None:
    found = json.loads(call("costs", "tiny", "--json").stdout)
    ledger = Ledger(run_folder.parent / "ledger.sqlite").entries("tiny")
    evaluations = [each for each in ledger if each.kind == "evaluation"]
    # every 2 of 4 steps; after the last of 3; before the first and after the last of 2
    assert [each.stage for each in evaluations] == ["pretrain"] * 2 + ["sft"] + ["rl"] * 2
    assert all(each.tokens > 0 and each.flops > 0 and each.seconds > 0 and each.steps == 0 for each in evaluations)
    for stage in ("pretrain", "sft", "rl"):
        result = json.loads((run_folder / stage / "result.json").read_text())
        mine = [row for row in found if row["stage"] == stage]
        assert [row["kind"] for row in mine] == ["training", "evaluation"]
        assert sum(row["seconds"] for row in mine) == pytest.approx(result["seconds"])
        assert mine[0]["tokens"] == result["tokens"] and mine[0]["flops"] == pytest.approx(result["flops"])
        assert mine[0]["seconds"] >= result["step_seconds"] * 0.99


def test_a_run_priced_by_a_list(call, fails, recipe: Path, tmp_path: Path) -> None:
    entry = '[[hour]]\nname = "box"\nfrom = {}\ndollars_per_hour = 36\n'
    (tmp_path / "prices.toml").write_text(entry.format("2020-01-01"))
    (tmp_path / "later.toml").write_text(entry.format("2999-01-01"))
    recipe.write_text(recipe.read_text().split("[stages.sft]")[0].replace("steps = 4", "steps = 1"))
    price = ("--set", "price.prices=prices.toml", "--set")
    assert "did you mean 'box'" in fails("run", "tiny.toml", *price, "price.entry=bax")
    later = ("--set", "price.prices=later.toml", "--set", "price.entry=box")
    assert "has no price of 'box'" in fails("run", "tiny.toml", *later)
    assert "prices and entry go together" in fails("run", "tiny.toml", "--set", "price.entry=box")
    assert not (tmp_path / "runs").exists()  # refused before there was anything to pay
    assert call("run", "tiny.toml", *price, "price.entry=box").exit_code == 0
    for row in json.loads(call("costs", "tiny", "--json").stdout):
        assert row["price_per_hour"] == 36 and row["dollars"] == pytest.approx(row["seconds"] / 100)
    assert call("run", "tiny.toml", *price, "price.entry=box").exit_code == 0  # what was saved can be read again
    assert "another recipe" not in call("report", "tiny").output
