"""Does reinforcement learning lift held-out accuracy, on every seed? And is it the reinforcement?

    python bench/demo_seeds.py [--recipe recipes/demo.toml] [--seeds 0 1 2] [--base runs/demo/pretrain/model]

For each seed the demo's SFT and RL stages are run from one pretrained model, and beside them the control: from the same
SFT model, more SFT for as long as RL took. Accuracy is exact and greedy on the same held-out problems in three ways of
answering: free (the model chooses whether to think), forced thinking, direct. Writes results/demo_seeds.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import progress_line, write_results

from tael.cost.prices import dollars
from tael.pipeline import Silent, run_recipe
from tael.recipe import Recipe, load_recipe, parse_recipe


def reasoning_recipe(recipe: Recipe, base: Path, seed: int) -> Recipe:
    """The recipe's SFT and RL stages on `base`, with `seed`."""
    table = recipe.model_dump(exclude_none=True)
    stages = {name: stage for name, stage in table["stages"].items() if stage["kind"] != "pretrain"}
    return parse_recipe({**table, "name": f"seed-{seed}", "seed": seed, "base": str(base), "model": {}, "stages": stages})


def control_recipe(recipe: Recipe, sft: str, base: Path, seed: int, steps: int) -> Recipe:
    """More SFT: the same stage once more with other examples, `steps` long, from the SFT model."""
    table = recipe.model_dump(exclude_none=True)
    stage = {**table["stages"][sft], "steps": steps, "eval_every": steps, "checkpoint_every": steps, "seed": seed + 1000}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/demo.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", type=Path, default=Path("runs/demo/pretrain/model"))
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"), help="where the runs go; finished ones are kept")
    arguments = parser.parse_args()
    recipe, rows = load_recipe(arguments.recipe), []
    for seed in arguments.seeds:
        rows.append(run_seed(recipe, arguments.base, seed, arguments.runs))
        row = rows[-1]
        progress_line(
            f"seed {seed}: free {row['before']['free']:.1%} -> {row['after']['free']:.1%} by RL, "
            f"-> {row['more_sft']['free']:.1%} by {row['more_sft_seconds']:.0f} s more SFT"
        )
    write_results("demo_seeds", {"recipe": arguments.recipe, "rows": rows})


if __name__ == "__main__":
    main()
