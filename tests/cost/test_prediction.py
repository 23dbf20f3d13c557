"""Predictions kept for a run and beside it: for the very recipe on the very machine, and never believed blindly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.cost.charts import prediction_figure
from tael.cost.compared import compare, summary_line
from tael.cost.here import StagePlan
from tael.cost.kept import find_kept, keep, kept_at, settle
from tael.cost.ledger import Ledger
from tael.cost.prediction import FILE, Machine, Prediction, parse_prediction, read_prediction, recipe_digest
from tael.cost.report import write_report
from tael.cost.rundata import read_run
from tael.recipe import Recipe, load_recipe

DEMO = Path(__file__).parents[2] / "recipes" / "demo.toml"
HERE = Machine("a processor", 2)
ENVIRONMENT = {
    "device": "cpu", "processor": HERE.processor, "threads": HERE.threads,
    "matrix_peak_flops": {"fp32": 1e11, "bf16": 2e11},
}  # fmt: skip


def demo(*overrides: str) -> Recipe:
    return load_recipe(DEMO, list(overrides))


def plans(seconds: float = 100.0) -> list[StagePlan]:
    return [StagePlan(name, name, 10, 1000, 1e12, seconds, 1e9) for name in ("pretrain", "sft", "rl")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path / "cache"))


def test_a_plan_is_found_for_the_same_recipe_alone() -> None:
    assert keep(demo(), plans(), True, HERE)
    found = find_kept(demo(), HERE)
    assert found is not None and found.measured and [stage.seconds for stage in found.stages] == [100.0] * 3
    assert find_kept(demo("seed=1"), HERE) is None
    assert find_kept(demo("stages.rl.steps=33"), HERE) is None
    assert find_kept(demo(), replace(HERE, threads=1)) is None
    assert find_kept(demo(), replace(HERE, processor="another")) is None


def test_price_and_description_change_no_plan_but_its_dollars() -> None:
    keep(demo(), plans(), True, HERE)
    dearer = demo("price.dollars_per_hour=3.6", "description=another")
    found = find_kept(dearer, HERE)
    assert found is not None and found.dollars(1000.0) == pytest.approx(1.0)


def test_a_rough_plan_does_not_replace_a_measured_one() -> None:
    assert keep(demo(), plans(1.0), False, HERE) and keep(demo(), plans(2.0), False, HERE)
    assert keep(demo(), plans(3.0), True, HERE) and not keep(demo(), plans(4.0), False, HERE)
    found = find_kept(demo(), HERE)
    assert found is not None and found.stages[0].seconds == 3.0
    assert keep(demo(), plans(5.0), False, replace(HERE, threads=1))  # another machine's does not count


def test_a_plan_put_under_anothers_name_is_not_believed() -> None:
    keep(demo(), plans(), True, HERE)
    kept_at(demo("seed=1")).write_bytes(kept_at(demo()).read_bytes())
    assert find_kept(demo("seed=1"), HERE) is None


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path / "file"))
    assert not keep(demo(), plans(), True, HERE)


def test_a_run_takes_over_the_plan_kept_for_it(tmp_path: Path) -> None:
    keep(demo(), plans(7.0), True, HERE)
    settle(demo(), tmp_path, ENVIRONMENT)
    found, note = read_prediction(tmp_path)
    assert found is not None and found.measured and found.stages[0].seconds == 7.0 and note == ""
    keep(demo(), plans(8.0), True, HERE)
    settle(demo(), tmp_path, ENVIRONMENT)  # a resumed run keeps its own
    again, _ = read_prediction(tmp_path)
    assert again == found


def test_a_run_without_a_plan_gets_a_rough_one(tmp_path: Path) -> None:
    settle(demo(), tmp_path, ENVIRONMENT)
    found, _ = read_prediction(tmp_path)
    assert found is not None and not found.measured
    assert [stage.name for stage in found.stages] == ["pretrain", "sft", "rl"]
    assert found.stages[0].tokens == 300 * 32 * 256


def test_no_plan_after_the_fact_and_none_for_what_cannot_be_planned(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    settle(demo(), tmp_path / "none", ENVIRONMENT | {"device": "cuda"})
    settle(demo().model_copy(update={"base": "somewhere"}), tmp_path / "none", ENVIRONMENT)
    assert not (tmp_path / "none" / FILE).exists()
    (tmp_path / "begun" / "pretrain").mkdir(parents=True)
    (tmp_path / "begun" / "pretrain" / "metrics.jsonl").write_text("")
    settle(demo(), tmp_path / "begun", ENVIRONMENT)
    assert not (tmp_path / "begun" / FILE).exists()


# -------------------------------------------------------------- what a file may hold


def good() -> dict[str, Any]:
    return json.loads(Prediction.of(demo(), plans(), True, HERE, 0.08).to_json())


def test_it_is_read_as_it_was_written() -> None:
    made = Prediction.of(demo(), plans(), True, HERE, 0.08)
    assert parse_prediction(json.loads(made.to_json())) == made
    assert made.recipe == recipe_digest(demo()) != recipe_digest(demo("seed=9"))


@pytest.mark.parametrize(
    "change",
    [
        {"stages": []}, {"stages": "many"}, {"stages": [1]}, {"stages": [{"name": "x"}]}, {"machine": None},
        {"machine": {"processor": 3, "threads": 2}}, {"machine": {"processor": "x", "threads": True}}, {"when": 3},
        {"when": "yesterday"}, {"when": "<script>"}, {"measured": "yes"}, {"price_per_hour": -1}, {"recipe": 7},
        {"price_per_hour": float("inf")}, {"price_per_hour": "0.08"}, {"stages": [{}] * 200},
    ],
)  # fmt: skip
def test_what_is_no_prediction_is_left_out(change: dict[str, Any]) -> None:
    assert parse_prediction(good()) is not None
    assert parse_prediction(good() | change) is None


@pytest.mark.parametrize("key", ["steps", "tokens", "flops", "seconds", "memory_bytes"])
@pytest.mark.parametrize("value", [None, "1", -1, True, float("nan"), 1e300, 10**400])
def test_no_amount_of_a_stage_is_believed_blindly(key: str, value: Any) -> None:
    table = good()
    table["stages"][1][key] = value
    assert parse_prediction(table) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_json_breaks_it(value: Any) -> None:
    for key in good():
        found = parse_prediction(good() | {key: value})
        assert found is None or parse_prediction(json.loads(found.to_json())) == found  # what is read is whole


# -------------------------------------------------------------------- beside the run


def write_plan(directory: Path, name: str = "pretrain", **more: Any) -> None:
    stages = [replace(each, name=name) if each.name == "pretrain" else each for each in
              Prediction.of(demo(), plans(156.0), True, HERE, 0.08).stages]  # fmt: skip
    table = json.loads(replace(Prediction.of(demo(), plans(), True, HERE, 0.08), stages=tuple(stages)).to_json())
    (directory / FILE).write_text(json.dumps(table | more), encoding="utf-8")


def rows_of(directory: Path, ledger: Ledger | None) -> dict[str, Any]:
    run = read_run(directory)
    prediction, _ = read_prediction(directory)
    assert prediction is not None
    return {stage.name: stage for stage in compare(run, ledger, prediction)}


def test_a_finished_run_is_compared(finished_run: Path, ledger: Ledger) -> None:
    write_plan(finished_run)
    found = rows_of(finished_run, ledger)
    assert list(found) == ["pretrain", "sft", "rl", "all stages"]
    time = found["pretrain"].rows[0]
    assert (time.name, time.predicted, time.measured, time.ratio) == ("time", "2.6 min", "5.2 min", "2.00")
    whole = found["all stages"]
    assert whole.measured is not None
    assert whole.measured.seconds == pytest.approx(312 + 120 + 126) and whole.predicted.seconds == 3 * 156
    assert whole.predicted.memory_bytes == 1e9  # the largest, not the sum
    assert whole.predicted.dollars == pytest.approx(3 * 156 / 3600 * 0.08)
    run, (prediction, _) = read_run(finished_run), read_prediction(finished_run)
    assert prediction is not None
    line = summary_line(list(found.values()), prediction)
    assert line.startswith("all stages: predicted 7.8 min (steps timed here, 20") and line.endswith(
        "took 9.3 min: 1.19 times"
    )
    assert compare(run, None, prediction)[0].rows[0].measured == "30.0 s"  # without a ledger, the run's own files


def test_the_chart_is_valid_plotly_and_there_is_none_of_nothing() -> None:
    figure = prediction_figure([("a<b", 60.0, 90.0), ("rl", 30.0, 10.0)])
    assert figure is not None
    plotly.graph_objects.Figure(figure["data"], figure["layout"])  # raises for an unknown property
    assert [trace["x"] for trace in figure["data"]] == [[60.0, 30.0], [90.0, 10.0]]
    assert figure["data"][0]["y"][0] == "a&lt;b" and prediction_figure([]) is None
    long = prediction_figure([("run", 7200.0, 36000.0)])
    assert long is not None and long["data"][1]["x"] == [10.0]  # hours


def test_half_a_run_shows_what_there_is(pretrain_only: Path) -> None:
    write_plan(pretrain_only)
    found = rows_of(pretrain_only, None)
    assert list(found) == ["pretrain", "sft", "rl"]
    assert found["pretrain"].rows[0].measured == "78.0 s" and found["pretrain"].rows[0].ratio == "–"
    assert found["rl"].measured is None and found["rl"].status == "waiting"
    prediction, _ = read_prediction(pretrain_only)
    assert prediction is not None and summary_line(list(found.values()), prediction) == ""
    page = write_report(pretrain_only, None).read_text(encoding="utf-8")
    assert "Predicted and measured" in page and "figure-predicted-data" in page


def test_the_report_escapes_and_forgives(finished_run: Path, ledger: Ledger, hostile: str) -> None:
    write_plan(finished_run, name=hostile)
    page = write_report(finished_run, ledger).read_text(encoding="utf-8")
    assert "Predicted and measured" in page and "<script>window.pwned" not in page and "<img" not in page
    for text in ("{", "[]", '{"stages": 3}', "\x00\xff", "9" * 5000):
        (finished_run / FILE).write_text(text, encoding="utf-8")
        page = write_report(finished_run, ledger).read_text(encoding="utf-8")
        assert "<h2>Predicted and measured" not in page and "plan.json is there but is no prediction" in page
    (finished_run / FILE).unlink()
    assert "plan.json" not in write_report(finished_run, ledger).read_text(encoding="utf-8")
