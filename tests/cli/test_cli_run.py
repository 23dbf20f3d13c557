"""`tael run`, `costs` and `report` on a run of a few steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tael import pipeline
from tael.errors import TaelError


def test_a_run_tells_its_way_and_ends_with_the_price(finished):
    text = (finished / "first-output.txt").read_text(encoding="utf-8")
    for expected in ("pretrain: 4 steps", "sft: 3 steps", "rl: 2 steps", "bits per byte", "right: free", "tok/s"):
        assert expected in text
    tail = text[text.index("Costs of tiny by stage") :]
    assert "Total" in tail and "text: " in tail and "; reasoning: " in tail
    assert "report: runs/tiny/report.html" in tail and "talk to it: tael chat runs/tiny" in tail
    assert all(len(line) <= 80 for line in tail.splitlines())
    assert (finished / "runs/tiny/report.html").stat().st_size > 1000


def test_a_finished_run_is_not_run_again(call, run_folder):
    before = (run_folder / "rl" / "metrics.jsonl").read_bytes()
    result = call("run", "tiny.toml", "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told["summary"]["finished"] is True and told["directory"] == "runs/tiny"
    assert {"pretrain", "sft", "rl"} <= {row["stage"] for row in told["costs"]}
    assert "prepare: done" in result.stderr and "pretrain" not in result.stderr
    assert (run_folder / "rl" / "metrics.jsonl").read_bytes() == before


def test_set_run_dir_and_fresh(call, recipe, tmp_path):
    arguments = ("run", "tiny.toml", "--run-dir", "elsewhere/one", "--set", "stages.rl.steps=1")
    assert call(*arguments).exit_code == 0
    saved = tomllib.loads((tmp_path / "elsewhere/one/recipe.toml").read_text(encoding="utf-8"))
    assert saved["stages"]["rl"]["steps"] == 1
    assert call(*arguments, "--fresh").exit_code == 0
    assert (tmp_path / "elsewhere/one.previous-1/summary.json").is_file()
    assert call("costs", "elsewhere/one").exit_code == 0


def test_text_of_ones_own_replaces_the_recipes_sources(call, recipe, monkeypatch):
    recipe.write_text(recipe.read_text().replace('path = "book.txt"', 'sources = ["chitchat"]'))
    seen = []

    def stop(recipe, directory, reporter, *, fresh):
        seen.append(recipe.data)
        raise TaelError("enough")

    monkeypatch.setattr(pipeline, "run_recipe", stop)
    call("run", "tiny.toml", "--set", "data.path=book.txt")
    assert seen[0].path == "book.txt" and seen[0].sources == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("run", "nope.toml"), "nope.toml: no such recipe"),
        (("run", "."), "is a folder, not a recipe"),
        (("run", "book.txt"), "book.txt: not a TOML file"),
        (("run", "tiny.toml", "--set", "stages.pretrain.stps=3"), "'stages.pretrain.stps'; did you mean 'steps'?"),
        (("run", "tiny.toml", "--set", "steps"), "write it as key.path=value"),
        (("run", "tiny.toml", "--set", "name.x=1"), "'name' is a value, not a table"),
        (("run", "tiny.toml", "--set", "stages.rl.steps=0"), "stages.rl.steps: "),
        (("run", "tiny.toml", "--set", "model.num_attention_heads=0"), "num_attention_heads"),
        (("run", "tiny.toml", "--set", "data.path=missing.txt"), "missing.txt: no such file"),
        (("run", "tiny.toml", "--set", "data.path=junk.txt"), "junk.txt: is "),
        (("run", "tiny.toml", "--set", "data.path=empty.txt"), "empty.txt: is empty"),
        (
            ("run", "tiny.toml", "--set", 'data.sources=["chitchat"]', "--set", "data.path=book.txt"),
            "give one of sources, path and dataset",
        ),
        (("run", "named.toml"), "unknown source 'chitchta'; did you mean 'chitchat'?"),
        (("run", "tiny.toml", "--set", "device=gpu9"), "device 'gpu9'"),
        (("run", "tiny.toml", "--run-dir", "book.txt"), "book.txt"),
    ],
)
def test_wrong_recipes_are_one_line(fails, bad_files, arguments, line):
    assert line in fails(*arguments)


@pytest.fixture
def bad_files(recipe, tmp_path):
    (tmp_path / "junk.txt").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "named.toml").write_text(recipe.read_text().replace('path = "book.txt"', 'sources = ["chitchta"]'))


def test_another_recipe_does_not_take_over_a_run(fails, run_folder):
    assert "'seed' differs" in fails("run", "tiny.toml", "--set", "seed=7")


def test_costs(call, fails, run_folder):
    assert "tiny" in call("costs").stdout
    by_name, by_path = call("costs", "tiny").stdout, call("costs", "runs/tiny").stdout
    assert by_name == by_path and "pretrain" in by_name
    rows = json.loads(call("costs", "tiny", "--json").stdout)
    assert {"pretrain", "sft", "rl"} <= {row["stage"] for row in rows} and all(row["dollars"] >= 0 for row in rows)
    assert json.loads(call("costs", "--ledger", "runs/ledger.sqlite", "--json").stdout)[0]["run"] == "tiny"
    assert "did you mean 'tiny'" in fails("costs", "tinny")
    assert "no such ledger" in fails("costs", "--ledger", "no.sqlite")
    assert "not a file of Tael's costs" in fails("costs", "--ledger", "book.txt")


def test_costs_before_any_run(call, fails):
    assert "nothing in the ledger yet" in call("costs").stdout
    assert json.loads(call("costs", "--json").stdout) == []


def test_report(call, fails, run_folder):
    (run_folder / "report.html").unlink()
    for name in ("tiny", "runs/tiny"):
        assert call("report", name).stdout == "runs/tiny/report.html\n"
    assert (run_folder / "report.html").is_file()
    assert fails("report", "tyni").endswith("tyni: no such run; runs under runs/: tiny")


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tael", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, which a child inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_ctrl_c_while_training_then_the_same_command_goes_on(recipe, tmp_path):
    arguments = ("run", "tiny.toml", "--set", "stages.pretrain.steps=400", "--set", "stages.pretrain.eval_every=400")
    process = _start(tmp_path, *arguments)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("pretrain 1/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1
    assert errors.startswith("tael: stopped at step ") and "the same command goes on from there" in errors

    again = _start(tmp_path, *arguments)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "going on after step" in output


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5])
def test_ctrl_c_while_starting_is_one_line(recipe, tmp_path, seconds):
    process = _start(tmp_path, "run", "tiny.toml", "--set", "stages.pretrain.steps=100000")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1 and "stopped" in errors, errors
