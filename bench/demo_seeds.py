"""Does reinforcement learning lift held-out accuracy, on every seed? And is it the reinforcement?

    python bench/demo_seeds.py [--recipe recipes/demo.toml] [--seeds 0 1 2] [--base runs/demo/pretrain/model]

For each seed the demo's SFT and RL stages are run from one pretrained model, and beside them the control: from the
same SFT model, more SFT for as long as RL took. Accuracy is exact and greedy on the same held-out problems in three
ways of answering: free (the model chooses whether to think), forced thinking, direct. Writes results/demo_seeds.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import machine, print_table, write_results

from tael.cost.prices import dollars
from tael.pipeline import Silent, run_recipe
from tael.recipe import Recipe, load_recipe, parse_recipe


def reasoning_recipe(recipe: Recipe, base: Path, seed: int) -> Recipe:
    """The recipe's SFT and RL stages on `base`, with `seed`."""
    table = recipe.model_dump(exclude_none=True)
    stages = {name: stage for name, stage in table["stages"].items() if stage["kind"] != "pretrain"}
    return parse_recipe(
        {**table, "name": f"seed-{seed}", "seed": seed, "base": str(base), "model": {}, "stages": stages}
    )


def control_recipe(recipe: Recipe, sft: str, base: Path, seed: int, steps: int) -> Recipe:
    """More SFT: the same stage once more with other examples, `steps` long, from the SFT model."""
    table = recipe.model_dump(exclude_none=True)
    stage = {
        **table["stages"][sft],
        "steps": steps,
        "eval_every": steps,
        "checkpoint_every": steps,
        "seed": seed + 1000,
    }
    control = {"name": f"control-{seed}", "seed": seed, "base": str(base), "model": {}, "stages": {"more_sft": stage}}
    return parse_recipe({**table, **control})


def result(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "result.json").read_text(encoding="utf-8"))


def shares(accuracy: dict[str, Any]) -> dict[str, float]:
    return {mode: round(a["correct"] / a["total"], 4) for mode, a in accuracy.items()}


def run_seed(recipe: Recipe, base: Path, seed: int, runs: Path) -> dict[str, Any]:
    """One row of the table."""
    sft = next(name for name, s in recipe.stages.items() if getattr(s, "kind", "") == "sft")
    rl = next(name for name, s in recipe.stages.items() if getattr(s, "kind", "") == "rl")
    directory = runs / f"seed-{seed}"
    run_recipe(reasoning_recipe(recipe, base, seed), directory, Silent())
    before, after = result(directory / sft), result(directory / rl)
    steps = max(1, round(after["seconds"] / (before["step_seconds"] / before["steps"])))
    control = runs / f"control-{seed}"
    run_recipe(control_recipe(recipe, sft, directory / sft / "model", seed, steps), control, Silent())
    more = result(control / "more_sft")
    seconds = before["seconds"] + after["seconds"]
    return {
        "seed": seed,
        "before": shares(before["metrics"]["accuracy"]),
        "after": shares(after["metrics"]["accuracy"]),
        "more_sft": shares(more["metrics"]["accuracy"]),
        "tokens_before": before["metrics"]["accuracy"]["free"]["completion_tokens"],
        "tokens_after": after["metrics"]["accuracy"]["free"]["completion_tokens"],
        "think_rate_before": before["metrics"]["accuracy"]["free"]["think_rate"],
        "think_rate_after": after["metrics"]["accuracy"]["free"]["think_rate"],
        "problems": after["metrics"]["accuracy"]["free"]["total"],
        "sft_seconds": round(before["seconds"], 1),
        "rl_seconds": round(after["seconds"], 1),
        "more_sft_seconds": round(more["seconds"], 1),
        "more_sft_steps": steps,
        "dollars": round(dollars(seconds, recipe.price.dollars_per_hour), 5),
    }


def percent(value: float) -> str:
    return f"{value:.1%}"


def tables(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy and cost by seed, and the control in every way of answering."""
    count = rows[0]["problems"]
    main_table = {
        "columns": [
            "seed",
            "free, after SFT",
            "free, after RL",
            "lift",
            "tokens an answer",
            "thinks",
            "SFT + RL minutes",
            "dollars",
        ],
        "rows": [
            [
                row["seed"],
                percent(row["before"]["free"]),
                percent(row["after"]["free"]),
                f"{100 * (row['after']['free'] - row['before']['free']):+.1f} points",
                f"{row['tokens_before']:.1f} -> {row['tokens_after']:.1f}",
                f"{row['think_rate_before']:.0%} -> {row['think_rate_after']:.0%}",
                f"{(row['sft_seconds'] + row['rl_seconds']) / 60:.1f}",
                f"{row['dollars']:.4f}",
            ]
            for row in rows
        ],
        "notes": [
            f"Exact greedy accuracy on the same {count} held-out problems; free: the model chooses whether to think."
        ],
    }
    labels = {
        "before": "after SFT",
        "after": "after RL",
        "more_sft": "after more SFT instead, for as long as RL took",
    }
    control = {
        "columns": ["seed", "model", "free", "forced thinking", "direct"],
        "rows": [
            [row["seed"], label, *(percent(row[key][mode]) for mode in ("free", "think", "direct"))]
            for row in rows
            for key, label in labels.items()
        ],
        "notes": [
            "How to read it: what RL changes most is the choice to think; "
            "what the model can do when it is made to think was there after SFT."
        ],
    }
    return [main_table, control]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="recipes/demo.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", type=Path, default=Path("runs/demo/pretrain/model"))
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/demo-seeds"), help="where the runs go; finished ones are kept"
    )
    arguments = parser.parse_args()
    if not (arguments.base / "config.json").is_file():
        raise SystemExit(
            f"{arguments.base}: no pretrained model there; run `make demo` first, or name one with --base"
        )
    described, recipe, rows = machine(), load_recipe(arguments.recipe), []
    for seed in arguments.seeds:
        rows.append(run_seed(recipe, arguments.base, seed, arguments.runs))
        row = rows[-1]
        print(
            f"seed {seed}: free {row['before']['free']:.1%} -> {row['after']['free']:.1%} by RL, "
            f"-> {row['more_sft']['free']:.1%} by {row['more_sft_seconds']:.0f} s more SFT",
            flush=True,
        )
    result = {
        "title": "Reinforcement learning on the demo's reasoning stage, three seeds",
        "command": "python bench/demo_seeds.py",
        "machine": described,
        "tables": tables(rows),
        "seeds": rows,
    }
    for table in result["tables"]:
        print_table(result["title"], table["columns"], table["rows"])
    write_results("demo_seeds", result)


if __name__ == "__main__":
    main()
