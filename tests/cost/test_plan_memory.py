"""Predicted memory against torch's own count of what backward keeps, and against processes that train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tael.cost.here import KERNEL_BYTES, PROGRAM_BYTES, plan_recipe
from tael.cost.memory import saved_bytes
from tael.cost.named import find_model
from tael.cost.shapes import Block
from tael.cost.trainer_memory import TrainingStep, kept_for_backward, trainer_memory
from tael.data import Batch
from tael.model import ModelConfig, build_model
from tael.recipe import OptimizerSettings, PretrainSettings, TrainSettings, parse_recipe
from tael.train import LanguageModelling
from tael.train.precision import Twin, choose_precision

LLAMA = ModelConfig(
    model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, n_routed_experts=None,
)  # fmt: skip
DENSE = ModelConfig(vocab_size=512, hidden_size=128, n_routed_experts=None, num_hidden_layers=2, q_lora_rank=48)
MOE = ModelConfig(vocab_size=512, hidden_size=128, num_hidden_layers=3, num_experts_per_tok=3)
WIDE = replace(MOE, scoring_func="softmax", model_type="deepseek_v2", n_shared_experts=2, num_nextn_predict_layers=2)


def random_batch(config: ModelConfig, rows: int, length: int) -> Batch:
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(rows, length, dtype=torch.int64))


def kept_by_torch(step: TrainingStep) -> int:
    """Bytes of every tensor that autograd saves for a step, each storage once, parameters left out."""
    dtype = torch.float32 if step.value_bytes == 4 else torch.bfloat16
    model = Twin(build_model(step.config), dtype).compute
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being given out again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    settings = TrainSettings(mtp_weight=0.3 if step.mtp else 0.0, mask_documents=step.documents)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = LanguageModelling(settings)(model, random_batch(step.config, step.rows, step.length))
    assert loss.total.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("width", [4, 2], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("config", "rows", "length", "documents"),
    [
        (LLAMA, 4, 64, True),
        (replace(LLAMA, model_type="qwen3"), 4, 64, True),
        (replace(MOE, model_type="dots1"), 4, 64, True),
        (LLAMA, 2, 1100, True),
        (LLAMA, 2, 1100, False),
        (DENSE, 3, 96, True),
        (DENSE, 2, 1100, True),
        (MOE, 4, 64, False),
        (WIDE, 4, 64, True),
        (replace(MOE, num_nextn_predict_layers=1, tie_word_embeddings=True), 2, 200, True),
    ],
    ids=[
        "llama",
        "qwen3",
        "dots1",
        "llama fused",
        "llama fused causal",
        "mla",
        "mla long",
        "moe",
        "moe v2 mtp",
        "moe mtp tied",
    ],
)
def test_kept_for_backward_is_what_autograd_keeps(
    config: ModelConfig, rows: int, length: int, documents: bool, width: int
) -> None:
    step = TrainingStep(config, rows, length, width, documents=documents)
    assert kept_for_backward(step) == pytest.approx(kept_by_torch(step), rel=0.01)


def test_untrained_mtp_modules_keep_nothing_for_backward() -> None:
    """Their weights and states are there, and saved with the rest."""
    step = TrainingStep(WIDE, 4, 64, mtp=False)
    assert kept_for_backward(step) == pytest.approx(kept_by_torch(step), rel=0.01)
    plain = TrainingStep(replace(WIDE, num_nextn_predict_layers=0), 4, 64)
    untrained, without = trainer_memory(step), trainer_memory(plain)
    assert kept_for_backward(step) == kept_for_backward(plain)
    assert (untrained.backward, untrained.update) == (without.backward, without.update)
    assert untrained.weights > without.weights and untrained.states > without.states


# ------------------------------------------------------------------------------ processes that train

ADAMW = OptimizerSettings(matrices="adamw")
MUON = OptimizerSettings(matrices="muon", newton_schulz_steps=1)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense, large vocabulary, short, AdamW": (
        {
            "model_type": "llama", "vocab_size": 12000, "hidden_size": 256, "intermediate_size": 768,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        },
        {"batch_size": 8, "sequence_length": 128, "optimizer": ADAMW},
    ),
    "MoE, MTP, Muon": (
        {
            "vocab_size": 2048, "hidden_size": 256, "moe_intermediate_size": 192, "num_hidden_layers": 4,
            "num_nextn_predict_layers": 1,
        },
        {"batch_size": 8, "sequence_length": 192, "optimizer": MUON},
    ),
    "long sequences in micro-batches, AdamW": (
        {
            "vocab_size": 1024, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
            "num_attention_heads": 8, "n_routed_experts": None, "qk_nope_head_dim": 16, "v_head_dim": 16,
        },
        {"batch_size": 8, "micro_batch_size": 4, "sequence_length": 384, "optimizer": ADAMW},
    ),
    "many experts, few tokens, Muon": (
        {
            "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "moe_intermediate_size": 256,
            "num_hidden_layers": 5, "n_routed_experts": 12, "num_nextn_predict_layers": 1,
        },
        {"batch_size": 4, "sequence_length": 64, "mtp_weight": 0.0, "optimizer": MUON},
    ),
}  # fmt: skip
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed memory goes back to the system at once, so that a process is as large as what it holds."""
BF16 = ["MoE, MTP, Muon", "long sequences in micro-batches, AdamW"]
"""Cases weighed in bf16 too, where the processor multiplies it."""


def weigh(names: list[str], precision: str, directory: Path) -> dict[str, dict[str, int]]:
    """By how many bytes a process grew while it trained each case: {"step", "judging", "saving"}."""
    program = Path(__file__).with_name("train_and_weigh.py")
    cases = {name: [CASES[name][0], settings_of(name, precision).model_dump(mode="json")] for name in names}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(cases), str(directory)],
        env=kept | AT_ONCE | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if result is None:
        pytest.skip("this system cannot reset a process's peak")
    return result


def settings_of(name: str, precision: str) -> PretrainSettings:
    return PretrainSettings(precision=precision, eval_documents=32, **CASES[name][1])  # type: ignore[arg-type]


def assert_as_predicted(name: str, precision: str, measured: dict[str, int], least: float) -> None:
    predicted = trainer_memory(TrainingStep.of(ModelConfig.from_dict(CASES[name][0]), settings_of(name, precision)))
    expected = {"step": predicted.step, "judging": predicted.judging, "saving": predicted.saving}
    print(name, {phase: (round(expected[phase] / 1e6), round(grown / 1e6)) for phase, grown in measured.items()})
    assert predicted.step > least  # beside which what the process keeps of its own is small
    assert measured == pytest.approx(expected, rel=0.15)


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return weigh(list(CASES), "fp32", tmp_path_factory.mktemp("weighed"))


@pytest.mark.parametrize("name", list(CASES))
def test_memory_is_within_15_percent_of_a_process_that_trains(name: str, weighed: dict[str, dict[str, int]]) -> None:
    assert_as_predicted(name, "fp32", weighed[name], 150e6)


@pytest.fixture(scope="module")
def weighed_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    if choose_precision("auto", torch.device("cpu")) != "bf16":
        pytest.skip("this processor does not multiply bf16")
    return weigh(BF16, "bf16", tmp_path_factory.mktemp("weighed_in_bf16"))


@pytest.mark.parametrize("name", BF16)
def test_in_bf16_too(name: str, weighed_in_bf16: dict[str, dict[str, int]]) -> None:
    assert_as_predicted(name, "bf16", weighed_in_bf16[name], 100e6)


@pytest.mark.parametrize(
    ("precision", "experts", "code"), [("fp32", 4, 0.0), ("bf16", 4, KERNEL_BYTES), ("bf16", None, 0.0)]
)
def test_experts_in_bf16_bring_compiled_code(precision: str, experts: int | None, code: float) -> None:
    model = {"hidden_size": 64, "num_hidden_layers": 2, "n_routed_experts": experts}
    stage = {"kind": "pretrain", "steps": 1, "batch_size": 2, "sequence_length": 32, "precision": precision}
    recipe = parse_recipe(
        {"name": "tiny", "tokenizer": {"vocab_size": 320}, "data": {"path": "book.txt"}, "model": model}
        | {"stages": {"pretrain": stage}}
    )
    config = ModelConfig.from_dict(model | {"vocab_size": 320})
    settings = PretrainSettings.model_validate(stage)
    [planned] = plan_recipe(recipe, measured=False, peak=1e12)
    training = trainer_memory(TrainingStep.of(config, settings)).peak
    assert planned.memory_bytes == PROGRAM_BYTES + code + training


# ------------------------------------------------------------------------------ the planner's formula, fused kernels


class Kernel(torch.autograd.Function):
    """Stands for a fused kernel: zeros of `shape`; it keeps what it is given and, with `own`, what it gives."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], own: bool, *given: torch.Tensor) -> torch.Tensor:
        out = given[0].new_zeros(shape)
        ctx.save_for_backward(*given, *([out] if own else []))
        return out


def kernel(shape: tuple[int, ...], *given: torch.Tensor, own: bool = False) -> torch.Tensor:
    return Kernel.apply(shape, own, *given)  # type: ignore[return-value]


def linear(x: torch.Tensor, width: int) -> torch.Tensor:
    return x @ torch.zeros(x.shape[-1], width, dtype=x.dtype, device=x.device, requires_grad=True)


def fused_layer(block: Block, x: torch.Tensor) -> torch.Tensor:
    """One layer over x [n, d] as a cluster runs it: norms, attention, SwiGLU and dispatch are one kernel each."""
    a, (n, d) = block.attention, x.shape
    normed = kernel((n, d), x)
    if a.decode_v is not None:
        rank, query_rank = a.decode_v, a.vectors - a.decode_v
        query = linear(kernel((n, query_rank), linear(normed, query_rank)), a.heads * a.qk)
        entry = kernel((n, rank), linear(normed, a.cache))
        key, value = linear(entry, a.heads * a.qk), linear(entry, a.heads * a.v)
    else:
        query, key = linear(normed, a.heads * a.qk), linear(normed, a.kv_heads * a.qk)
        value = linear(normed, a.kv_heads * a.v)
    x = x + linear(kernel((n, a.heads * a.v), query, key, value, own=True), d)
    normed = kernel((n, d), x)
    linear(normed, block.experts)  # the router
    parts = []
    if block.dense_width:
        parts.append(linear(kernel((n, block.dense_width), linear(normed, 2 * block.dense_width)), d))
    if block.shared:
        width = block.shared * (block.shared_width or block.expert_width)
        parts.append(linear(kernel((n, width), linear(normed, 2 * width)), d))
    if block.chosen:
        copies = normed.repeat(block.chosen, 1)  # what a dispatch brings; one expert stands for all
        width = (len(copies), block.expert_width)
        parts.append(linear(kernel(width, linear(copies, 2 * block.expert_width)), d)[:n])
    return x + sum(parts)


@pytest.mark.parametrize("name", ["llama-2-7b", "qwen3-30b-a3b", "deepseek-v3"])
def test_the_planners_activations_are_what_autograd_keeps_of_fused_layers(name: str) -> None:
    """On the meta device: shapes without bytes, so that V3's own layers can be counted."""
    shape, tokens = find_model(name).shape, 61
    for block in shape.blocks:
        x = torch.zeros(tokens, shape.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, Any] = saved, block: Block = block) -> torch.Tensor:
            if tensor.shape[0] in (tokens, tokens * block.chosen):  # weights have other heights
                saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            fused_layer(block, x)
        kept = sum(storage.nbytes() for storage in saved.values())
        assert tokens * saved_bytes(block, shape.hidden, "none") == pytest.approx(kept, rel=0.001)
