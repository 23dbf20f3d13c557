"""Equal quality for less: OpenAI's and Meta's recipes against a modern one, DeepSeek's parts and Tael's default.

    taskset -c 0 python bench/cost_to_quality.py                 everything, about two hours of one core
    taskset -c 0 python bench/cost_to_quality.py --part race     one part: tune, race, ablate, scale, infer or report
    python bench/cost_to_quality.py --quick                      a minute: shows that it runs, writes nothing

(a) openai: transformers' GPT2LMHeadModel, (b) meta: its LlamaForCausalLM, both with AdamW and a cosine
(bench/baselines.py); (c) modern: a dense model, Muon, residual outputs that start at zero, QK-norm
(recipes/compare/modern.toml); (d) deepseek: MLA and a mixture of experts (recipes/compare/deepseek.toml); (e) tael:
what is left of all that once each part had to pay for its seconds (recipes/compare/tael.toml). Same text, same
tokenizer, same rows in the same order for equal seeds; bf16 for all where the CPU multiplies it (1.7 times faster for
the baselines on a Zen 4), fp32 elsewhere. One thread each; seconds are processor time of training steps: other work
on the machine hardly counts, and the contestants of a race take turns of a few seconds. The target is what (b) ends
at on its worst seed.

What is measured goes to runs/cost_to_quality/curves.jsonl, race by race: an interrupted run goes on from there.
`report` makes results/cost_to_quality.json of it. `tune` chose learning rates and the other settings, on a seed that
nothing else uses; the recipes' steps are as many as end a little better than (b) there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines import Baseline, TransformersContestant
from common import machine, write_results
from quality_tables import (
    ablation_table,
    inference_table,
    print_rows,
    race_table,
    scaling_table,
    tuning_table,
)  # fmt: skip

from tael.compare import Contestant, Curve, Point, Record, race, standings
from tael.compare.picture import curves_picture
from tael.compare.recipes import RecipeContestant, setup_of
from tael.data import Document
from tael.engine import Engine, SamplingParams
from tael.model import build_model
from tael.preparation import Prepared, model_config, prepare
from tael.recipe import PretrainSettings, Recipe, load_recipe
from tael.train.parallel import Parallel
from tael.train.precision import choose_precision
from tael.weights import load_model

HERE = Path(__file__).parents[1]
WORK = HERE / "runs" / "cost_to_quality"
RECIPES = HERE / "recipes" / "compare"
SEEDS = (0, 1, 2)
TUNING_SEED = 100
DOCUMENTS = 32
"""Held-out documents of every evaluation: the same for all."""
DOLLARS_PER_CORE_HOUR = 0.04
"""Half of two shared cloud vCPUs at list price, as recipes price them."""

Entrant = Recipe | Baseline
Overrides = dict[str, Any]


OPTIMIZER = "stages.pretrain.optimizer"
BATCH, LENGTH, BASELINE_STEPS = 8, 256, 500
PRECISION = choose_precision("auto", torch.device("cpu"))


@dataclass(frozen=True)
class Size:
    """A shape, and how long it is trained: by so many times the steps of the race."""

    width: int
    depth: int
    baseline: float = 1.0
    others: float = 1.0

    @property
    def label(self) -> str:
        return f"{self.depth} x {self.width}"


SIZES = (Size(128, 1), Size(192, 2, 1.5, 2.0), Size(256, 3, 2.5, 5.0))
"""The ladder; its first rung is what the shallow entrants of the race are. The others take the
steps that end a little better than meta."""
RACED = {"openai": Size(128, 4), "meta": Size(128, 4), "modern": Size(128, 4)} | dict.fromkeys(
    ("deepseek", "tael"), SIZES[0]
)
RATE = 1.5e-3
"""The baselines' learning rate at a width of 128, which `tune` chose; it falls with the root of the width."""


def entrant(
    name: str, size: Size | None = None, *, share: float = 1.0, rate: float = RATE, extra: Overrides | None = None
) -> Entrant:
    """One of the five, for `share` of its steps; `rate` is the baselines', `extra` overrides the others' recipes."""
    size = size or RACED[name]
    if name in ("openai", "meta"):
        kind, intermediate = ("gpt2", 4 * size.width) if name == "openai" else ("llama", 11 * size.width // 4)
        steps = round(BASELINE_STEPS * size.baseline * share)
        rate *= math.sqrt(128 / size.width)
        return Baseline(
            name=name, kind=kind, hidden_size=size.width, layers=size.depth, heads=size.width // 32,
            intermediate_size=intermediate, steps=steps, batch_size=BATCH, sequence_length=LENGTH, learning_rate=rate,
            precision=PRECISION,
        )  # fmt: skip
    recipe = load_recipe(RECIPES / f"{name}.toml", overrides(extra or {}))
    stage = recipe.stages["pretrain"]
    assert isinstance(stage, PretrainSettings)
    values: Overrides = {
        "model.num_hidden_layers": size.depth,
        "stages.pretrain.steps": round(stage.steps * size.others * share),
    }
    if size.width != 128:
        wider = ["hidden_size", "intermediate_size", "num_attention_heads"]
        wider += ["kv_lora_rank", "moe_intermediate_size"] if name == "deepseek" else []
        values |= {f"model.{key}": recipe.model[key] * size.width // 128 for key in wider}
    return load_recipe(RECIPES / f"{name}.toml", overrides((extra or {}) | values))


def overrides(values: Overrides) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def renamed(entrant: Entrant, name: str) -> Entrant:
    if isinstance(entrant, Recipe):
        return entrant.model_copy(update={"name": name})
    return dataclasses.replace(entrant, name=name)


class Bench:
    """The corpus, the record of what is finished, and the way to add to it."""

    def __init__(self, work: Path) -> None:
        self.work, self.record = work, Record(work / "curves.jsonl")
        recipe = load_recipe(RECIPES / "tael.toml")
        work.mkdir(parents=True, exist_ok=True)
        self.prepared: Prepared = prepare(recipe, work, Parallel(torch.device("cpu")), print)
        self.held_out: list[Document] = self.prepared.held_out()[:DOCUMENTS]

    def contestant(self, entrant: Entrant, seed: int) -> Contestant:
        if isinstance(entrant, Baseline):
            return TransformersContestant(entrant, seed, self.prepared, self.held_out)
        folder = self.work / "training" / f"{entrant.name}-{seed}"
        return RecipeContestant(entrant, seed, self.prepared, self.held_out, folder)

    def run(self, entrants: Sequence[Entrant], seeds: Sequence[int]) -> list[Curve]:
        """Race those of `entrants` that are not in the record yet, a race a seed; every curve asked for."""
        for seed in seeds:
            missing = [e for e in entrants if self.record.find(e.name, seed, setup(e)) is None]
            if missing:
                print(f"seed {seed}: {', '.join(e.name for e in missing)}", flush=True)
                self.record.add(race([self.contestant(e, seed) for e in missing], say))
        return self.known(entrants, seeds)

    def known(self, entrants: Sequence[Entrant], seeds: Sequence[int]) -> list[Curve]:
        found = [self.record.find(e.name, seed, setup(e)) for e in entrants for seed in seeds]
        return [curve for curve in found if curve is not None]


def setup(entrant: Entrant) -> str:
    return setup_of(entrant, DOCUMENTS, 1) if isinstance(entrant, Recipe) else entrant.setup


def say(contestant: Contestant, point: Point) -> None:
    line = f"{contestant.name} {point.step}/{contestant.steps}: {point.bits_per_byte:.4f} bits/byte, "
    print(line + f"{point.seconds:.0f} s, {point.tokens / point.seconds:,.0f} tokens/s", flush=True)


# ------------------------------------------------------------------ parts


def tune(bench: Bench) -> None:
    """On a seed that nothing else uses: the baselines' rates, the others' settings one at a time."""
    for name in ("openai", "meta"):
        rates = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
        bench.run([renamed(entrant(name, share=0.25, rate=r), f"{name} at {r:g}") for r in rates], [TUNING_SEED])
    bench.run(
        [renamed(entrant("meta", rate=r), f"meta at {r:g}, whole") for r in (7.5e-4, 1.5e-3, 3e-3, 1.2e-2)],
        [TUNING_SEED],
    )
    rates = (2.5e-3, 5e-3, 1e-2)
    bench.run([renamed(modern_at(r), f"modern, matrices at {r:g}") for r in rates], [TUNING_SEED])
    shared: dict[str, Overrides] = {
        "": {},
        "rope_theta 10000": {"model.rope_theta": 10000.0},
        "matrices at 5e-3": {f"{OPTIMIZER}.matrix_learning_rate": 5e-3},
        "matrices at 2e-2": {f"{OPTIMIZER}.matrix_learning_rate": 2e-2},
        "momentum 0.95": {f"{OPTIMIZER}.momentum": 0.95},
        "betas 0.9, 0.95": {f"{OPTIMIZER}.betas": [0.9, 0.95]},
        "embedding and head at 5e-3": {f"{OPTIMIZER}.learning_rate": 5e-3},
    }
    own: dict[str, dict[str, Overrides]] = {
        "tael": {
            "four heads of 32": {"model.num_attention_heads": 4},
            "initializer_range 0.06": {"model.initializer_range": 0.06},
            "five Newton-Schulz steps": {f"{OPTIMIZER}.newton_schulz_steps": 5},
            "V3's experts": {
                "model.model_type": "dots1", "model.n_routed_experts": 8, "model.n_shared_experts": 1,
                "model.num_experts_per_tok": 2, "model.moe_intermediate_size": 112, "model.first_k_dense_replace": 0,
            },
        },
        "deepseek": {
            "four heads of 16 + 32": {
                "model.num_attention_heads": 4, "model.qk_nope_head_dim": 16, "model.qk_rope_head_dim": 32,
                "model.v_head_dim": 32,
            },
            "initializer_range 0.02": {"model.initializer_range": 0.02},
            "a latent of 32": {"model.kv_lora_rank": 32},
        },
    }  # fmt: skip
    for name, changes in own.items():
        tried = {", ".join(filter(None, (name, what))): extra for what, extra in (shared | changes).items()}
        bench.run([renamed(entrant(name, extra=extra), label) for label, extra in tried.items()], [TUNING_SEED])


def modern_at(rate: float) -> Entrant:
    return entrant("modern", share=0.5, extra={f"{OPTIMIZER}.matrix_learning_rate": rate})


FIVE = ("openai", "meta", "modern", "deepseek", "tael")


def racing() -> list[Entrant]:
    """The five, and (b) and (c) as shallow as (e), since their own depth may be more than so small a budget wants."""
    shallow = [renamed(entrant(name, SIZES[0]), f"{name}, 1 layer") for name in ("meta", "modern")]
    return [entrant(name) for name in FIVE] + shallow


def ablations() -> list[Entrant]:
    """DeepSeek's parts with one thing changed; the whole first."""
    stage, model = "stages.pretrain", "model"
    changes: dict[str, Overrides] = {
        "deepseek": {},
        "MLA -> grouped-query attention, QK-norm": {f"{model}.model_type": "dots1"},
        "experts -> dense, as wide": {f"{model}.n_routed_experts": 0},
        "no shared expert, three routed": {f"{model}.n_shared_experts": 0, f"{model}.num_experts_per_tok": 3},
        "auxiliary loss in place of the bias": {
            f"{stage}.bias_update_speed": 0.0,
            f"{stage}.balance_loss_weight": 0.01,
        },
        "with multi-token prediction": {f"{model}.num_nextn_predict_layers": 1, f"{stage}.mtp_weight": 0.3},
        "FP8, emulated": {f"{stage}.precision": "fp8-emulated"},
        "Muon -> AdamW": {f"{OPTIMIZER}.matrices": "adamw", f"{OPTIMIZER}.learning_rate": RATE},
    }  # fmt: skip
    return [renamed(entrant("deepseek", extra=extra), label) for label, extra in changes.items()]


SCALED = ("meta", "deepseek", "tael")


def ladder(name: str) -> list[Entrant]:
    """One of SCALED at every size; the race's own runs where it has them."""
    first = entrant(name, SIZES[0])
    first = first if RACED[name] == SIZES[0] else renamed(first, f"{name}, 1 layer")
    return [first, *(renamed(entrant(name, size), f"{name}, {size.label}") for size in SIZES[1:])]


def infer(bench: Bench) -> list[dict[str, Any]]:
    """Bytes of cache and tokens a second of the race's models, all on Tael's engine (weights do not change it)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        baseline = entrant("meta")
        assert isinstance(baseline, Baseline)
        baseline.build(bench.prepared.tokenizer.vocab_size).save_pretrained(folder)
        models = {"meta": load_model(folder)}
    for name in ("modern", "deepseek", "tael"):
        recipe = entrant(name)
        assert isinstance(recipe, Recipe)
        models[name] = build_model(model_config(recipe, bench.prepared.tokenizer), 0)
    engines = {name: Engine(model) for name, model in models.items()}
    rounds: dict[str, list[float]] = {name: [] for name in engines}
    prompt, params = [5] * 64, SamplingParams(128, temperature=0.0)
    for index in range(6):
        for name, engine in engines.items():
            began = time.process_time()
            list(engine.generate([prompt], params))
            if index:
                rounds[name].append(128 / (time.process_time() - began))
    for name, model in models.items():
        speed = statistics.median(rounds[name])
        cache = model.config.cache_bytes_per_token()
        rows.append({"name": name, "cache_bytes_per_token": cache, "decode_tokens_per_second": round(speed)})
    return rows


def measured_before() -> list[dict[str, Any]] | None:
    """The inference figures of the last report, where there is one."""
    path = HERE / "results" / "cost_to_quality.json"
    return json.loads(path.read_text(encoding="utf-8")).get("inference") if path.exists() else None


# ------------------------------------------------------------------ report


def report(bench: Bench, inference: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Tables of all that is in the record; parts that were not run are left out."""
    curves = bench.known(racing(), SEEDS)
    content: dict[str, Any] = {
        "title": "Equal quality for less: five recipes on one corpus",
        "command": "taskset -c 0 python bench/cost_to_quality.py",
        "machine": machine() | {"transformers": transformers.__version__, "threads": 1, "precision": PRECISION},
        "tables": [],
        "curves": [curve.model_dump() for curve in curves],
    }
    result = standings(curves, DOLLARS_PER_CORE_HOUR, "meta")
    content["standings"] = result.to_dict()
    content["tables"].append(race_table(result))
    ablated = bench.known(ablations(), SEEDS[:2])
    if ablated:
        content["tables"].append(ablation_table(ablated, result.target))
        content["ablations"] = [curve.model_dump() for curve in ablated]
    scaled = {name: found for name in SCALED if len(found := bench.known(ladder(name), SEEDS[:1])) == len(SIZES)}
    if "meta" in scaled:
        table, content["scaling"] = scaling_table(scaled, [size.label for size in SIZES])
        content["tables"].append(table)
    if tuned := [curve for curve in bench.record.curves() if curve.seed == TUNING_SEED]:
        content["tables"].append(tuning_table(tuned))
    if inference:
        content["inference"] = inference
        content["tables"].append(inference_table(inference))
    pictures = {axis: curves_picture(curves, result.target, axis) for axis in ("seconds", "flops", "tokens")}
    if scaled:
        rungs = [c.model_copy(update={"name": name}) for name, found in scaled.items() for c in found]
        pictures["ladder"] = curves_picture(rungs)
    (HERE / "docs" / "pictures").mkdir(exist_ok=True)
    for name, drawn in pictures.items():
        (HERE / "docs" / "pictures" / f"cost_to_quality_{name}.svg").write_text(drawn, encoding="utf-8")
    content["pictures"] = [f"pictures/cost_to_quality_{name}.svg" for name in pictures]
    return content


QUICK = {"openai": 0.01, "meta": 0.01, "modern": 0.02, "deepseek": 0.02, "tael": 0.03}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("tune", "race", "ablate", "scale", "infer", "report")
    parser.add_argument("--part", choices=parts, action="append", help="only this one (may be repeated)")
    parser.add_argument("--seed", type=int, action="append", help="race: only this seed (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="a few steps of all five, no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder))
            entrants = [entrant(name, share=share) for name, share in QUICK.items()]
            result = standings(bench.run(entrants, [0]), DOLLARS_PER_CORE_HOUR, "meta")
            print_rows(race_table(result))
        return
    chosen, bench = options.part or parts, Bench(WORK)
    if "tune" in chosen:
        tune(bench)
    if "race" in chosen:
        bench.run(racing(), options.seed or SEEDS)
    if "ablate" in chosen:
        bench.run(ablations(), SEEDS[:2])
    if "scale" in chosen:
        for position in range(len(SIZES)):
            bench.run([ladder(name)[position] for name in SCALED], SEEDS[:1])
    if "report" in chosen:
        content = report(bench, infer(bench) if "infer" in chosen else measured_before())
        for table in content["tables"]:
            print_rows(table)
        print("written:", write_results("cost_to_quality", content).name)


if __name__ == "__main__":
    main()
