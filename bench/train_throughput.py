"""Tokens a second of a whole training step: Tael against transformers' DeepseekV3, in one process, round by round.

    python bench/train_throughput.py                about ten minutes on two idle cores
    python bench/train_throughput.py --quick        seconds: shows that it runs, writes nothing

Both sides have the same shape, start from the same weights (through a saved folder), and take the same batches. A
step is forward, loss, backward, clip at 1.0 and the optimiser. The candidates:

    tael, bf16 twin, Muon        as recipes train
    tael, bf16 twin, AdamW       the optimiser alike
    transformers, fp32           AdamW (fused), its default kernels (SDPA, grouped_mm)
    transformers, bf16 autocast  AdamW (fused), its default kernels
    the same, eager              both with its plain attention and expert loop, which on a CPU can be faster

The fastest of transformers' four is the baseline. Neither side has MTP or a balance loss here (transformers trains
without), and documents are not masked.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import interleave, machine, print_table, ratios, spread, write_results

from tael.data import Batch
from tael.model import ModelConfig, build_model
from tael.recipe import OptimizerSettings, TrainSettings
from tael.train import LanguageModelling
from tael.train.optim import Optimizer
from tael.train.precision import Twin
from tael.weights import save_model


@dataclass(frozen=True)
class Shape:
    """A model and the batch it is trained on."""

    config: ModelConfig
    batch: int
    length: int


SHAPES = {
    "small": Shape(
        ModelConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            kv_lora_rank=64,
            n_routed_experts=8,
            moe_intermediate_size=192,
        ),
        32,
        256,
    ),
    "16M": Shape(
        ModelConfig(
            vocab_size=4096,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            kv_lora_rank=96,
            n_routed_experts=8,
            moe_intermediate_size=192,
        ),
        16,
        256,
    ),
}
QUICK = Shape(
    ModelConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, kv_lora_rank=32), 4, 32
)


class Batches:
    """The same random batches for every candidate; `next` hands out one after the other."""

    def __init__(self, shape: Shape, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        size = (count, shape.batch, shape.length + 1)
        self.tokens = torch.randint(0, shape.config.vocab_size, size, generator=generator)
        self.at = 0

    def next(self) -> torch.Tensor:
        self.at += 1
        return self.tokens[(self.at - 1) % len(self.tokens)]


def tael_step(shape: Shape, matrices: Any, precision: torch.dtype = torch.bfloat16) -> Callable[[], float]:
    """One step of Tael's loop body, without its logging."""
    model = build_model(shape.config, zero_residual=False)
    twin = Twin(model, precision)
    optimizer = Optimizer(model, OptimizerSettings(matrices=matrices, learning_rate=1e-3))
    objective = LanguageModelling(TrainSettings(mtp_weight=0, balance_loss_weight=0, mask_documents=False))
    batches = Batches(shape)
    documents = torch.zeros(shape.batch, shape.length, dtype=torch.int64)

    def step() -> float:
        tokens = batches.next()
        loss = objective(twin.compute, Batch(tokens[:, :-1], tokens[:, 1:], documents))
        loss.total.backward()
        twin.collect_gradients()
        optimizer.step(1.0)
        twin.sync()
        return loss.metrics["loss"]

    return step


def transformers_step(shape: Shape, folder: Path, autocast: bool, eager: bool) -> Callable[[], float]:
    """One step of the same model in transformers, as its documentation trains it."""
    kernels: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"} if eager else {}
    model: Any = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, **kernels)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = Batches(shape)

    def step() -> float:
        tokens = batches.next()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(name: str, shape: Shape, rounds: int) -> dict[str, Any]:
    """Time one shape, print its table, return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_model(build_model(shape.config, zero_residual=False), path)
        candidates = {
            "tael, bf16 twin, Muon": tael_step(shape, "muon"),
            "tael, bf16 twin, AdamW": tael_step(shape, "adamw"),
            "transformers, fp32": transformers_step(shape, path, autocast=False, eager=False),
            "transformers, fp32, eager": transformers_step(shape, path, autocast=False, eager=True),
            "transformers, bf16": transformers_step(shape, path, autocast=True, eager=False),
            "transformers, bf16, eager": transformers_step(shape, path, autocast=True, eager=True),
        }
    first = {label: step() for label, step in candidates.items()}
    if max(first.values()) - min(first.values()) > 0.02:
        raise SystemExit(f"{name}: the candidates do not compute the same loss: {first}")
    seconds = interleave(candidates, rounds)
    theirs = [label for label in candidates if label.startswith("transformers")]
    baseline = min(theirs, key=lambda label: spread(seconds[label])["median"])
    tokens, rows, figures = shape.batch * shape.length, [], {}
    for label, times in seconds.items():
        speed, ratio = spread([tokens / t for t in times]), ratios(seconds[baseline], times)
        figures[label] = {"tokens_per_second": speed, "ratio_to_baseline": ratio, "first_loss": first[label]}
        rows.append(
            (
                label + (" (baseline)" if label == baseline else ""),
                f"{speed['median']:,.0f}",
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            )
        )
    total, active = shape.config.parameters(), shape.config.parameters(active=True)
    title = (
        f"{name}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M active, {shape.batch} x {shape.length} tokens"
    )
    columns = ["training step", "tokens/s", "ratio", "quartiles"]
    print_table(title, columns, rows)
    notes = [f"{title}; {rounds} interleaved rounds; the baseline is the fastest of transformers' four."]
    return {
        "table": {"columns": columns, "rows": rows, "notes": notes},
        "config": shape.config.to_dict(),
        "parameters": total,
        "parameters_active": active,
        "batch": [shape.batch, shape.length],
        "rounds": rounds,
        "baseline": baseline,
        "candidates": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two rounds, no file")
    parser.add_argument("--shape", choices=[*SHAPES], action="append", help="only this one (may be repeated)")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if options.quick:
        measure("quick", QUICK, 2)
        return
    found = machine() | {"transformers": transformers.__version__}
    shapes = {name: measure(name, SHAPES[name], options.rounds) for name in options.shape or SHAPES}
    content = {
        "title": "Training throughput against transformers' DeepseekV3",
        "command": "python bench/train_throughput.py",
        "machine": found,
        "tables": [shape.pop("table") for shape in shapes.values()],
        "shapes": shapes,
    }
    print("written:", write_results("train_throughput", content).name)


if __name__ == "__main__":
    main()
