"""`tael plan RECIPE`, then `tael run RECIPE`: what was predicted stands in the run and beside what was measured."""

from __future__ import annotations

import json

import pytest


def test_a_run_writes_what_it_was_predicted_to_take(finished):
    plan = json.loads((finished / "runs/tiny/plan.json").read_text(encoding="utf-8"))
    assert plan["measured"] is False and [stage["name"] for stage in plan["stages"]] == ["pretrain", "sft", "rl"]
    text = (finished / "first-output.txt").read_text(encoding="utf-8")
    assert "all stages: predicted " in text and " (rough, 20" in text and ", took " in text
    page = (finished / "runs/tiny/report.html").read_text(encoding="utf-8")
    assert "Predicted and measured" in page and "Predicted before the run (rough, " in page


def test_the_plan_made_before_is_the_runs(call, recipe, tmp_path):
    told = call("plan", "tiny.toml", "--measure-here", "--set", "stages.rl.steps=1")
    assert told.exit_code == 0 and "kept: the run's report will show it" in told.stdout
    made = call("run", "tiny.toml", "--set", "stages.rl.steps=1")
    assert made.exit_code == 0 and "(steps timed here, 20" in made.stdout
    plan = json.loads((tmp_path / "runs/tiny/plan.json").read_text(encoding="utf-8"))
    assert plan["measured"] is True and plan["stages"][2]["steps"] == 1
    steps = {stage["name"]: stage["tokens"] for stage in plan["stages"]}
    result = json.loads((tmp_path / "runs/tiny/pretrain/result.json").read_text(encoding="utf-8"))
    assert steps["pretrain"] == result["tokens"]
    flops = plan["stages"][0]["flops"] / result["flops"]
    assert flops == pytest.approx(1.0, rel=0.05)


def test_a_changed_recipe_does_not_get_anothers_plan(call, recipe, tmp_path):
    assert call("plan", "tiny.toml", "--measure-here").exit_code == 0
    assert call("run", "tiny.toml", "--set", "stages.pretrain.steps=3").exit_code == 0
    plan = json.loads((tmp_path / "runs/tiny/plan.json").read_text(encoding="utf-8"))
    assert plan["measured"] is False and plan["stages"][0]["steps"] == 3
    assert json.loads(call("plan", "tiny.toml", "--json").stdout)["kept"] is False  # a measured one is there
