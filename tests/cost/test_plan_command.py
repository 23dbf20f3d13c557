"""`tael plan`: its JSON, its tables, a config.json, a recipe, and clear lines for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tael.cli import app
from tael.cost.here import plan_recipe
from tael.cost.plan_request import Request, parse_layout, parse_prices
from tael.errors import TaelError
from tael.model import ModelConfig
from tael.recipe import load_recipe

DEMO = Path(__file__).parents[2] / "recipes" / "demo.toml"
KEYS = {
    "gpu_hours", "days", "dollars", "parameters_total", "parameters_active", "flops_per_token",
    "memory_bytes_per_device", "layout", "step_seconds", "serving",
}  # fmt: skip


def plan(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_claim() -> None:
    arguments = ["deepseek-v3", "--chip", "H800", "--chips", "2048", "--tokens", "14.8e12", "--price", "2", "--json"]
    table = json.loads(plan(*arguments).stdout)
    assert set(table) >= KEYS
    assert table["gpu_hours"] == pytest.approx(2.664e6, rel=0.1)
    assert table["dollars"] == pytest.approx(2 * table["gpu_hours"])
    assert table["parameters_total"] == 671026404352


def test_tables_fit_a_terminal() -> None:
    for arguments in (["deepseek-v2-lite"], ["--list"], ["deepseek-v3", "--chips", "2048", "--limits"]):
        result = plan(*arguments)
        assert result.exit_code == 0, result.output
        assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_list_names_models_and_chips() -> None:
    table = json.loads(plan("--list", "--json").stdout)
    assert {"deepseek-v3", "deepseek-v4-flash", "kimi-k2"} <= {row["name"] for row in table["models"]}
    assert all(row["source"] and row["date"] for row in table["chips"])


def test_a_config_is_planned(tmp_path: Path) -> None:
    config = ModelConfig(hidden_size=1024, num_hidden_layers=12, vocab_size=32000, n_routed_experts=16)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    for target in (tmp_path, tmp_path / "config.json"):
        table = json.loads(plan(str(target), "--chips", "8", "--json").stdout)
        assert table["parameters_total"] == config.parameters(mtp=False)
        assert table["tokens"] == pytest.approx(20 * config.parameters(active=True, mtp=False))


def test_a_layout_of_ones_own() -> None:
    text = "pipeline=16,expert=64,recompute=selective"
    arguments = ["deepseek-v3", "--chips", "2048", "--layout", text, "--json"]
    layout = json.loads(plan(*arguments).stdout)["layout"]
    assert (layout["data"], layout["pipeline"], layout["expert"]) == (128, 16, 64)
    assert parse_layout("tensor=8,data=2", 64).data == 2


def test_switches_move_hours() -> None:
    base = Request("deepseek-v3", chips=2048).answer()["gpu_hours"]
    for change in ({"cut_link": 50.0}, {"cap_tpp": 4800.0}, {"without": "fp8"}):
        assert Request("deepseek-v3", chips=2048, **change).answer()["gpu_hours"] > base  # type: ignore[arg-type]


def test_margins_at_a_price_list() -> None:
    serving = Request("deepseek-v3", chips=2048, price=2.0, price_list="0.55/2.19").answer()["serving"]
    assert serving["margin_output"] == pytest.approx(1 - serving["dollars_per_million_output"] / 2.19)
    assert parse_prices("0.55/2.19") == (0.55, 2.19)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "plan what?"),
        (["deepsek-v3"], "did you mean 'deepseek-v3'"),
        (["deepseek-v3", "--chip", "H80"], "did you mean 'H800'"),
        (["deepseek-v3", "--tokens", "0"], "--tokens must be above 0"),
        (["deepseek-v3", "--tokens", "nan"], "--tokens must be above 0"),
        (["deepseek-v3", "--chips", "-4"], "--chips must be 1 or more"),
        (["deepseek-v3", "--chips", "8"], "does not fit"),
        (["deepseek-v3", "--precision", "fp9"], "unknown precision"),
        (["deepseek-v3", "--price", "-1"], "--price must be 0 or more"),
        (["deepseek-v3", "--layout", "tensr=8"], "did you mean 'tensor'"),
        (["deepseek-v3", "--layout", "tensor=x"], "whole number"),
        (["deepseek-v3", "--layout", "shard=9"], "shard is 1, 2 or 3"),
        (["deepseek-v3", "--layout", "recompute=some"], "none, selective or full"),
        (["deepseek-v3", "--chips", "64", "--layout", "data=3"], "not the 64"),
        (["deepseek-v3", "--cut-link", "0"], "more than 0 GB/s"),
        (["deepseek-v3", "--cap-tpp", "0"], "must be above 0"),
        (["deepseek-v3", "--without", "fp32"], "trains nothing"),
        (["deepseek-v3", "--price-list", "1"], "INPUT/OUTPUT"),
        (["deepseek-v3", "--serving-chips", "-1"], "--serving-chips must be 1 or more"),
        (["deepseek-v3", "--measure-here"], "go with a recipe"),
        (["nothing.toml"], "nothing.toml"),
        ([str(DEMO), "--chips", "8"], "a recipe says itself"),
        (["missing/config.json"], "no such file"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    result = plan(*arguments)
    assert result.exit_code == 1
    assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_a_recipe_is_planned_here_by_measuring() -> None:
    small = ["model.hidden_size=64", "model.num_hidden_layers=2", "stages.pretrain.batch_size=2",
             "stages.sft.batch_size=2", "stages.rl.problems=1", "stages.rl.group=2"]  # fmt: skip
    recipe = load_recipe(DEMO, small)
    stages = plan_recipe(recipe, measured=True)
    assert [stage.name for stage in stages] == ["pretrain", "sft", "rl"]
    assert stages[0].tokens == 300 * 2 * 256
    assert all(stage.seconds > 0 and stage.flops > 0 for stage in stages)


def test_a_recipe_from_the_command_line() -> None:
    table = json.loads(plan(str(DEMO), "--json", "--set", "stages.pretrain.steps=10").stdout)
    assert [stage["steps"] for stage in table["stages"]] == [10, 350, 32]
    assert table["dollars"] == pytest.approx(table["seconds"] / 3600 * 0.08)
    assert "rough" in plan(str(DEMO)).stdout


def test_a_recipe_on_a_checkpoint_is_refused() -> None:
    recipe = load_recipe(DEMO, []).model_copy(update={"base": "somewhere"})
    with pytest.raises(TaelError, match="starts from a base"):
        plan_recipe(recipe, measured=False)
