"""Finding a model: folder, run directory, run name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tael.errors import TaelError
from tael.weights import available, resolve

RECIPE = """
name = "one"
[stages.pretrain]
kind = "pretrain"
[stages.sft]
kind = "sft"
[stages.rl]
kind = "rl"
tasks = [{name = "sum"}]
"""


def add_stage(run: Path, stage: str, *, finished: bool = True, age: int = 0) -> Path:
    model = run / stage / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    os.utime(model / "config.json", ns=(10**18 - age, 10**18 - age))
    if finished:
        (run / stage / "result.json").write_text("{}")
    return model


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "recipe.toml").write_text(RECIPE)
    return tmp_path / "runs"


def test_a_model_folder_is_itself(runs: Path) -> None:
    model = add_stage(runs / "one", "pretrain")
    assert resolve(model) == model
    assert resolve(str(model)) == model


def test_the_last_finished_stage_in_recipe_order(runs: Path) -> None:
    pretrain = add_stage(runs / "one", "pretrain", age=0)
    assert resolve("one", runs) == pretrain
    sft = add_stage(runs / "one", "sft", age=1000)  # older file, later stage
    add_stage(runs / "one", "rl", finished=False)
    assert resolve("one", runs) == sft
    assert resolve(runs / "one") == sft
    assert available(runs) == ["one"]


def test_without_a_recipe_the_newest(runs: Path) -> None:
    (runs / "one" / "recipe.toml").write_text("not toml [")
    add_stage(runs / "one", "a", age=5)
    newest = add_stage(runs / "one", "b", age=1)
    add_stage(runs / "one", "c", age=9)
    assert resolve("one", runs) == newest


def test_names_are_looked_up_under_the_working_directory(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_stage(runs / "one", "pretrain")
    monkeypatch.chdir(runs.parent)
    assert resolve("one") == Path("runs/one/pretrain/model")
    assert resolve("runs/one") == Path("runs/one/pretrain/model")


def test_what_cannot_be_found_is_said_in_one_line(runs: Path) -> None:
    with pytest.raises(TaelError, match="no finished model yet"):
        resolve("one", runs)
    add_stage(runs / "one", "pretrain")
    with pytest.raises(TaelError, match=r"two: no such model folder or run.*: one; `tael models`"):
        resolve("two", runs)
    with pytest.raises(TaelError, match="is a file"):
        resolve(runs / "one" / "recipe.toml", runs)
    with pytest.raises(TaelError, match="none"):
        resolve("two", runs / "nowhere")
