"""The loop learns, every parameter takes part, and the size of a forward pass changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tael.data import Loader
from tael.model import ModelConfig, build_model
from tael.recipe import TrainSettings
from tael.train import LanguageModelling, Trainer
from tael.train.balance import moe_modules
from tael.train.optim import Optimizer
from tael.train.precision import Twin


def gradients(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, float], list[Tensor]]:
    batch = trainer.source.batch(0, trainer.model)
    metrics, loads, _ = trainer._forward_backward(batch)
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}, metrics, loads


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_equals_the_whole_batch(make_trainer, parts: int) -> None:
    """1 x 8 rows equals 8 x 1, though the rows have unequal numbers of tokens to learn, with MTP and balance loss."""
    options = {"batch_size": 8, "balance_loss_weight": 0.1, "mtp_weight": 0.5}
    whole, metrics, loads = gradients(make_trainer("whole", **options))
    pieces, part_metrics, part_loads = gradients(make_trainer("parts", micro_batches=parts, **options))
    assert whole.keys() == pieces.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert part_metrics == pytest.approx(metrics, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(loads, part_loads, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_a_repeated_batch_is_learned(make_trainer, rows, precision: str, matrices: str) -> None:
    """Loss, and MTP's loss, fall well below the first on four rows seen thirty times."""
    optimizer = {"matrices": matrices, "learning_rate": 0.02, "clip": 10.0}
    few = replace(rows, tokens=rows.tokens[:4], loss_mask=rows.loss_mask[:4], document_ids=rows.document_ids[:4])
    seen: list[dict[str, float]] = []
    trainer = make_trainer(
        "learn",
        steps=30,
        rows=few,
        precision=precision,
        optimizer=optimizer,
        checkpoint_every=1000,
        setup={"on_step": lambda step, metrics: seen.append(metrics)},
    )
    trainer.run()
    assert seen[0]["loss"] == pytest.approx(math.log(48), abs=0.1)
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]
    assert seen[-1]["mtp_loss"] < 0.7 * seen[0]["mtp_loss"]
    assert [m["tokens"] for m in seen] == [64 * (i + 1) for i in range(30)]


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_learns(tiny: ModelConfig, rows, tied: bool) -> None:
    """After a few steps each tensor has a gradient: nothing is cut off behind a projection that starts at zero."""
    config = replace(tiny, num_nextn_predict_layers=2, q_lora_rank=12, tie_word_embeddings=tied)
    model = build_model(config, seed=0)
    settings = TrainSettings(batch_size=24, mtp_weight=0.3, balance_loss_weight=1e-3)
    optimizer = Optimizer(model, settings.optimizer)
    objective, batch = LanguageModelling(settings), Loader(rows, 24, seed=0).batch(0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        objective(model, batch).total.backward()
        optimizer.step(1.0)
    objective(model, batch).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert not torch.equal(parameter, start[name]), name
        if "experts.gate_up_proj" in name or "experts.down_proj" in name:
            assert parameter.grad.flatten(1).any(1).all(), f"{name}: an expert without gradient"


def test_bf16_twin(tiny: ModelConfig) -> None:
    """Masters and routers are fp32, the rest of the twin bf16, and the selection bias is one tensor."""
    master = build_model(tiny, seed=2)
    twin = Twin(master, torch.bfloat16)
    assert twin.separate and all(p.dtype == torch.float32 for p in master.parameters())
    for (name, p), original in zip(twin.compute.named_parameters(), master.parameters(), strict=True):
        assert p.dtype == (torch.float32 if "mlp.gate.weight" in name else torch.bfloat16), name
        assert torch.equal(p, original.to(p.dtype))
    for ours, theirs in zip(moe_modules(master), moe_modules(twin.compute), strict=True):
        assert ours.gate.e_score_correction_bias.data_ptr() == theirs.gate.e_score_correction_bias.data_ptr()
        assert theirs.gate.e_score_correction_bias.dtype == torch.float32
    with torch.no_grad():
        master.norm.weight.fill_(1.5)
        master.layers[1].mlp.gate.e_score_correction_bias += 1  # type: ignore[union-attr]
    twin.sync()
    assert (twin.compute.norm.weight == 1.5).all()
    assert (twin.compute.layers[1].mlp.gate.e_score_correction_bias == 1).all()  # type: ignore[union-attr]


def test_bf16_twin_adds_up_gradients_in_fp32(tiny: ModelConfig) -> None:
    """A thousand small gradients are not lost, as they would be in a bf16 sum."""
    twin = Twin(build_model(tiny), torch.bfloat16)
    for _ in range(1000):
        twin.compute.norm.weight.grad = torch.full((32,), 1e-3, dtype=torch.bfloat16)
        twin.collect_gradients()
    gradient = twin.master.norm.weight.grad
    assert gradient is not None and gradient.dtype == torch.float32
    torch.testing.assert_close(
        gradient, torch.full((32,), 1000 * float(torch.tensor(1e-3).bfloat16())), rtol=1e-4, atol=0
    )


def test_bf16_keeps_tied_weights_tied(tiny: ModelConfig) -> None:
    twin = Twin(build_model(replace(tiny, tie_word_embeddings=True)), torch.bfloat16)
    assert twin.compute.lm_head.weight is twin.compute.embed_tokens.weight


def test_bf16_step_follows_fp32(make_trainer) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        seen: list[float] = []
        trainer = make_trainer(
            precision, precision=precision, setup={"on_step": lambda s, m, seen=seen: seen.append(m["loss"])}
        )
        trainer.run()
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


def test_nothing_to_learn_is_no_update(make_trainer, rows, read_metrics) -> None:
    """A batch without targets leaves the weights alone and the run going."""
    empty = replace(rows, loss_mask=rows.loss_mask & False)
    trainer = make_trainer("empty", steps=2, rows=empty)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.run()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert [m["step"] for m in read_metrics(trainer.setup.directory) if m["kind"] == "step"] == [1, 2]


def test_masked_rows_are_neutral_in_accumulation(make_trainer, rows) -> None:
    """A micro-batch with nothing to learn adds nothing."""
    mask = rows.loss_mask.copy()
    source = make_trainer("order").source.loader
    mask[source.row_indices(0)[2]] = False
    options = {"rows": replace(rows, loss_mask=mask), "balance_loss_weight": 0.1}
    whole, _, _ = gradients(make_trainer("whole", **options))
    pieces, _, _ = gradients(make_trainer("parts", micro_batches=4, **options))
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
