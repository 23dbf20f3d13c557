"""Memory and speed of training on a CPU, by what oneDNN and malloc keep; beside the planner's figure.

    python bench/training_memory.py            about nine minutes on two idle cores
    python bench/training_memory.py --quick    one round of one step, writes nothing

oneDNN compiles a primitive for every shape it multiplies and keeps the last 1,024 of them. Experts see another number
of rows at every step, so in bf16, where torch multiplies with oneDNN, these are megabytes of code that is hardly used
again. malloc keeps freed memory in its heap. Each setting is a process of its own that trains the demo's first stage;
they take turns, some steps at a time. What a process has grown by once the model is gone again is code: in fp32 the
program's own that was read into memory by using it, in bf16 what oneDNN compiled and never gives back as well.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

import torch
from common import machine, print_table, ratios, spread, write_results
from peers import Peer

from tael.cost.here import KERNEL_BYTES, plan_recipe
from tael.recipe import load_recipe
from tael.train.precision import KEPT_PRIMITIVES

RECIPE = "recipes/demo.toml"
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
DEFAULTS = "1,024, oneDNN's default"


def kept(primitives: int) -> dict[str, str]:
    return {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(primitives)}


SETTINGS: dict[str, dict[str, str]] = {
    DEFAULTS: kept(1024),
    f"{KEPT_PRIMITIVES}, as `tael run`": kept(KEPT_PRIMITIVES),
    "64": kept(64),
    "16": kept(16),
    f"{KEPT_PRIMITIVES}, malloc gives back at once": kept(KEPT_PRIMITIVES) | AT_ONCE,
}
STEPS, ROUNDS = 4, 11
STEPS_TO_FILL = 12
"""After which oneDNN's code has stopped growing."""


def left_behind(precision: str, steps: int, threads: int) -> float:
    """Bytes by which a process has grown when the model it trained is gone."""
    overrides = [f"stages.pretrain.precision={precision}"]
    environment = kept(1) | AT_ONCE
    with Peer("trainer", environment, recipe=RECIPE, threads=threads, overrides=overrides) as peer:
        peer.do("train", steps=steps)
        return peer.do("forget")["resting_bytes"] - peer.described["resting_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of one step, no file")
    quick: bool = parser.parse_args().quick
    found, threads, names = machine(), torch.get_num_threads(), list(SETTINGS)
    steps, rounds = (1, 1) if quick else (STEPS, ROUNDS)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    with ExitStack() as stack:
        peers = {
            name: stack.enter_context(Peer("trainer", environment, recipe=RECIPE, threads=threads))
            for name, environment in SETTINGS.items()
        }
        described = peers[DEFAULTS].described
        for index in range(-1, rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                answer = peers[name].do("train", steps=steps)
                peaks[name] = answer["peak_bytes"]
                if index >= 0:
                    seconds[name].append(answer["seconds"])
    predicted = plan_recipe(load_recipe(RECIPE), measured=False, peak=1e12)[0].memory_bytes
    rows, figures = [], {}
    for name, times in seconds.items():
        speed = spread([steps * described["tokens"] / t for t in times])
        ratio = ratios(seconds[DEFAULTS], times)
        figures[name] = {"tokens_per_second": speed, "ratio": ratio, "peak_bytes": peaks[name]}
        rows.append(
            (
                name,
                f"{peaks[name] / 1e9:.2f}",
                f"{speed['median']:,.0f}",
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            )
        )
    precisions = ("fp32", "bf16") if described["precision"] == "bf16" else ()  # emulated it takes an hour
    grown = {precision: left_behind(precision, 1 if quick else STEPS_TO_FILL, threads) for precision in precisions}
    columns = ["primitives kept", "peak GB", "tokens/s", "ratio", "quartiles"]
    print_table(f"{RECIPE}, first stage, {described['precision']}", columns, rows)
    note = (
        f"The demo's pretraining in {described['precision']}, {threads} threads, {rounds} interleaved rounds of "
        f"{steps} steps; `tael plan` predicts {predicted / 1e9:.2f} GB, what malloc keeps not counted."
    )
    if grown:
        note += (
            f" When the model is gone, a process has grown by {grown['bf16'] / 1e9:.2f} GB in bf16 and "
            f"{grown['fp32'] / 1e9:.2f} in fp32: the difference is oneDNN's code, counted as "
            f"{KERNEL_BYTES / 1e9:.2f}."
        )
    print(note)
    content: dict[str, Any] = {
        "title": "Memory of training on a CPU: oneDNN's primitives, malloc's heap",
        "command": "python bench/training_memory.py",
        "machine": found | {"precision": described["precision"]},
        "tables": [{"columns": columns, "rows": rows, "notes": [note]}],
        "predicted_bytes": predicted,
        "left_behind_bytes": grown,
        "settings": figures,
    }
    if not quick:
        print("written:", write_results("training_memory", content).name)


if __name__ == "__main__":
    main()
