"""The planner against runs that others published: predicted and reported device-hours, with leave-one-out errors.

    python bench/planner_vs_published.py        a minute on one core; measures nothing, so any machine will do

One constant (tael.cost.timing.Constants.sustained) is fitted on the runs reported in hours, by the least mean
|ln(predicted / reported)|. Leave-one-out: each run is predicted with the constant fitted on the others alone. The
throughputs are never fitted on. `hidden` stays at its first guess: these runs hardly tell it apart (a note under the
table says what fitting both would give). The planner gets model, tokens, chips and batch, and finds the
layout by itself. Also printed: V3's cost table, and DeepSeek's day of serving.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from typing import Any

from common import machine, print_table, write_results

from tael.cost.planner import Plan, plan_training
from tael.cost.published import RUNS, THROUGHPUTS, PublishedRun
from tael.cost.serving_day import DAY, day_of_serving, sensitivities
from tael.cost.timing import Constants, StepModel
from tael.cost.v3_table import v3_cost_table

SUSTAINED = [round(0.40 + 0.01 * i, 2) for i in range(56)]
HIDDEN = [0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def grid() -> dict[tuple[float, float], list[float]]:
    """ln(predicted / reported) of every run at every pair of constants.

    Layouts are searched once for each value of `hidden`: `sustained` slows all layouts' compute alike.
    """
    errors: dict[tuple[float, float], list[float]] = {}
    for hidden in HIDDEN:
        plans = [plan_training(run.run(), Constants(hidden=hidden)) for run in RUNS]
        for sustained in SUSTAINED:
            constants = Constants(sustained=sustained, hidden=hidden)
            errors[sustained, hidden] = [
                math.log(retimed(run, plan, constants) / run.reported) for run, plan in zip(RUNS, plans, strict=True)
            ]
    return errors


def retimed(run: PublishedRun, plan: Plan, constants: Constants) -> float:
    """The prediction with other constants in the same layout."""
    given = plan.run
    model = StepModel(given.shape, given.chip, given.sequence, given.precision, constants)
    return run.predicted(replace(plan, step=model.step(plan.layout, plan.sequences)))


Errors = dict[tuple[float, float], list[float]]


def at_default(errors: Errors) -> Errors:
    """Only the pairs whose `hidden` is the one of Constants."""
    return {key: value for key, value in errors.items() if key[1] == Constants().hidden}


def best(errors: Errors, without: int | None = None) -> Constants:
    """Constants with the least mean absolute error over all runs but one."""

    def loss(key: tuple[float, float]) -> float:
        return statistics.fmean(abs(error) for i, error in enumerate(errors[key]) if i != without)

    sustained, hidden = min(errors, key=loss)
    return Constants(sustained=sustained, hidden=hidden)


def row(run: PublishedRun, predicted: float, constants: Constants) -> dict[str, Any]:
    plan = plan_training(run.run(), constants)
    error = predicted / run.reported - 1
    ideal = 6 * plan.run.shape.parameters(active=True, mtp=False)
    seconds = run.reported * 3600 / plan.run.tokens
    return {
        "run": run.name,
        "chip": f"{run.devices} {run.chip}",
        "reported": run.reported,
        "predicted": predicted,
        "error": error,
        "utilisation_at_6nd": ideal / seconds / run.hardware().peaks["bf16"],
        "layout": str(plan.layout),
        "source": run.source,
        "checked": run.checked,
        "assumed": run.assumed,
        "why": run.why if abs(error) > 0.25 else "",
    }


def robustness(constants: Constants) -> list[str]:
    """What the numbers of chips that stand in for unknown ones do to the errors."""

    def median(factor: float, runs: list[PublishedRun]) -> float:
        moved = [replace(r, devices=round(r.devices * factor)) if "chips" in r.assumed else r for r in runs]
        return statistics.median(abs(r.predict(constants) / r.reported - 1) for r in moved)

    stated = [run for run in RUNS if "chips" not in run.assumed]
    return [
        f"{len(RUNS) - len(stated)} reports do not say how many chips they used. Median error of the {len(stated)} "
        f"that do: {median(1, stated):.1%}; of all, with the numbers that stand in halved "
        f"{median(0.5, list(RUNS)):.1%}, doubled {median(2, list(RUNS)):.1%}."
    ]


Table = dict[str, Any]


def runs_table(fitted: Constants, both: Errors) -> tuple[Table, list[dict[str, Any]], float]:
    """Every run, left out of its own fit, and throughputs never fitted on; (table, rows, median absolute error)."""
    errors = at_default(both)
    held_out = [best(errors, index) for index in range(len(RUNS))]
    pair = best(both)
    pair_loo = [abs(run.predict(best(both, i)) / run.reported - 1) for i, run in enumerate(RUNS)]
    rows = []
    for run, constants in zip(RUNS, held_out, strict=True):
        loo = row(run, run.predict(constants), constants)
        loo["in_sample"] = run.predict(fitted) / run.reported - 1
        loo["constants"] = {"sustained": constants.sustained, "hidden": constants.hidden}
        rows.append(loo)
    pair_v3 = RUNS[0].predict(pair) / RUNS[0].reported - 1
    others = [row(run, run.predict(fitted), fitted) for run in THROUGHPUTS]
    columns = ["run", "chips", "reported h", "predicted h", "left out", "fitted", "6ND of peak"]
    cells = [
        [
            r["run"], r["chip"], f"{r['reported'] / 1e3:,.1f}K", f"{r['predicted'] / 1e3:,.1f}K",
            f"{r['error']:+.1%}",
            f"{r['in_sample']:+.1%}" if "in_sample" in r else "not used",
            f"{r['utilisation_at_6nd']:.0%}",
        ]
        for r in [*rows, *others]
    ]  # fmt: skip
    absolute = [abs(r["error"]) for r in rows]
    median, everything = statistics.median(absolute), [abs(r["error"]) for r in others] + absolute
    notes = [
        f"Fitted: sustained {fitted.sustained}; {min(c.sustained for c in held_out)} to "
        f"{max(c.sustained for c in held_out)} with one run left out. Median absolute leave-one-out error "
        f"over {len(rows)} runs: {median:.1%}; mean {statistics.fmean(absolute):.1%}; with the {len(others)} "
        f"throughputs, never fitted on: median {statistics.median(everything):.1%}.",
        f"With `hidden` fitted too: sustained {pair.sustained}, hidden {pair.hidden}; V3 {pair_v3:+.1%}, median "
        f"leave-one-out error {statistics.median(pair_loo):.1%}, mean {statistics.fmean(pair_loo):.1%}; "
        "out of sample that is worse.",
        *robustness(fitted),
        *(f"{r['run']} ({r['error']:+.0%}): {r['why']}." for r in [*rows, *others] if r["why"]),
        "A throughput's hours are those of a trillion tokens. Reports give neither layout nor chips to the planner "
        "beyond what the table says.",
    ]
    return {"columns": columns, "rows": cells, "notes": notes}, [*rows, *others], median


def v3_table(fitted: Constants) -> Table:
    """V3's own table of costs, stage by stage."""
    stages = v3_cost_table(fitted)
    rows = [
        [stage.name, f"{stage.reported_hours / 1e3:,.0f}K", f"{stage.hours / 1e3:,.0f}K",
         f"{stage.hours / stage.reported_hours - 1:+.1%}", f"${stage.reported_hours * 2 / 1e6:.3f}M",
         f"${stage.dollars / 1e6:.3f}M"]
        for stage in stages
    ]  # fmt: skip
    hours, dollars = sum(stage.hours for stage in stages), sum(stage.dollars for stage in stages)
    rows.append(["total", "2,788K", f"{hours / 1e3:,.0f}K", f"{hours / 2_788_000 - 1:+.1%}", "$5.576M",
                 f"${dollars / 1e6:.3f}M"])  # fmt: skip
    return {"columns": ["stage", "reported h", "predicted h", "error", "reported", "predicted"], "rows": rows}


def serving_tables(fitted: Constants) -> list[Table]:
    """DeepSeek's day of serving, and what moves its margin."""
    day = day_of_serving(constants=fitted)
    serving = [
        [name, f"{reported:,.5g}", f"{value:,.5g}", f"{value / reported - 1:+.1%}"]
        for name, reported, value in day.compared(DAY)
    ]
    moves = [[name, f"{low:.1%}", f"{high:.1%}"] for name, low, high in sensitivities(constants=fitted)]
    return [
        {"columns": ["a day of serving", "reported", "predicted", "error"], "rows": serving},
        {"columns": ["margin if so much", "20% lower", "20% higher"], "rows": moves},
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    where, both = machine(), grid()
    fitted = best(at_default(both))
    runs, rows, median = runs_table(fitted, both)
    tables = [runs, v3_table(fitted), *serving_tables(fitted)]
    for table in tables:
        print_table("", table["columns"], table["rows"])
        for note in table.get("notes", []):
            print(note)
    write_results(
        "planner_vs_published",
        {
            "title": "The planner against published runs",
            "command": "python bench/planner_vs_published.py",
            "machine": where,
            "tables": tables,
            "constants": {"sustained": fitted.sustained, "hidden": fitted.hidden},
            "median_absolute_error": median,
            "runs": rows,
        },
    )


if __name__ == "__main__":
    main()
