"""Muon against torch's own, stacked matrices against separate ones, and who gets which optimiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from tael.model import ModelConfig, build_model
from tael.recipe import OptimizerSettings
from tael.train import optim
from tael.train.optim import COEFFICIENTS, Muon, Optimizer, is_matrix, orthogonalise

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, n_routed_experts=4, num_nextn_predict_layers=1, q_lora_rank=8
)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_equals_torchs(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon with `match_rms_adamw` is the same law, bit for bit once both orthogonalise alike."""
    monkeypatch.setattr(
        optim,
        "orthogonalise",
        lambda x, steps: torch.stack([_zeropower_via_newtonschulz(m, COEFFICIENTS, steps, 1e-7).float() for m in x]),
    )
    generator = torch.Generator().manual_seed(shape[0])
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.02, momentum=0.95, weight_decay=0.1, steps=5)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, weight_decay=0.1, ns_steps=5, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    assert torch.equal(mine.state[ours]["momentum"], reference.state[theirs]["momentum_buffer"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_newton_schulz_is_as_exact_as_torchs(shape: tuple[int, int]) -> None:
    """Both iterate in bf16, in another order of products: compare each with float64."""
    matrices = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    a, b, c = COEFFICIENTS
    x = matrices.double() if shape[0] <= shape[1] else matrices.double().mT
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    exact = x if shape[0] <= shape[1] else x.mT
    ours = orthogonalise(matrices, 5)
    theirs = torch.stack([_zeropower_via_newtonschulz(m, COEFFICIENTS, 5, 1e-7) for m in matrices])
    error, reference = ((found - exact).norm() / exact.norm() for found in (ours, theirs))
    assert error < 0.04 and error < 1.5 * reference


def test_orthogonalise_points_at_the_nearest_orthogonal_matrix() -> None:
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    found, svd = orthogonalise(matrices, 5), torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    cosine = (found * (svd.U @ svd.Vh)).sum((1, 2)) / (found.norm(dim=(1, 2)) * 20**0.5)
    assert (cosine > 0.97).all()
    assert not orthogonalise(torch.zeros(1, 4, 4), 5).any()


def test_update_has_adamws_size() -> None:
    """Root mean square about 0.2 lr, whatever the shape (Moonlight, arXiv 2502.16982, section 2.2)."""
    for shape in ((32, 32), (16, 64), (4, 64, 16)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        Muon([parameter], lr=1.0, momentum=0.95, weight_decay=0.0, steps=5).step()
        assert 0.13 < float(parameter.detach().square().mean().sqrt()) < 0.25


def test_stacked_experts_equal_separate_matrices() -> None:
    generator = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(3, 8, 12, generator=generator), torch.randn(2, 3, 8, 12, generator=generator)
    stacked, single = nn.Parameter(start.clone()), [nn.Parameter(m.clone()) for m in start]
    other = nn.Parameter(torch.randn(8, 12, generator=generator))  # of equal shape: goes through together
    together = Muon([stacked, other], 0.01, 0.9, 0.1, 5)
    apart = [Muon([p], 0.01, 0.9, 0.1, 5) for p in single]
    for gradient in gradients:
        stacked.grad, other.grad = gradient.clone(), gradient[0].clone()
        together.step()
        for p, g, optimizer in zip(single, gradient, apart, strict=True):
            p.grad = g.clone()
            optimizer.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]), rtol=0, atol=2e-4)


def test_who_gets_what() -> None:
    model = build_model(CONFIG)
    optimizer = Optimizer(model, OptimizerSettings(learning_rate=0.01, matrix_learning_rate=0.02, weight_decay=0.3))
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = optimizer.parts
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert {names[id(p)] for p in muon.param_groups[1]["params"]} == {n for n in by_muon if "gate_up_proj" in n}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
    assert by_muon | decayed | plain == set(names.values())
    assert decayed == {n for n in names.values() if "embed_tokens" in n or "lm_head" in n or "mlp.gate.weight" in n}
    assert "mtp.0.block.mlp.gate.weight" in decayed and "mtp.0.eh_proj.weight" in by_muon
    assert "layers.1.mlp.experts.gate_up_proj" in by_muon and "layers.0.mlp.gate_proj.weight" in by_muon
    assert all(dict(model.named_parameters())[n].dim() == 1 for n in plain)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.3, 0.0]
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.02, 0.01)


def test_adamw_alone_and_its_law() -> None:
    """matrices = "adamw": one optimiser; its first step moves every weight by lr, after decay."""
    model = build_model(CONFIG)
    settings = OptimizerSettings(matrices="adamw", learning_rate=0.01, weight_decay=0.1, clip=1e9)
    optimizer = Optimizer(model, settings)
    (adamw,) = optimizer.parts
    assert isinstance(adamw, torch.optim.AdamW)
    weight, norm = dict(model.named_parameters())["layers.0.self_attn.o_proj.weight"], model.norm.weight
    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0.5)
    torch.testing.assert_close(weight.detach(), before * (1 - 0.005 * 0.1) - 0.005)
    torch.testing.assert_close(norm.detach(), torch.full_like(norm, 1 - 0.005))
    assert all(p.grad is None for p in model.parameters())


def test_clip_scales_the_whole_gradient() -> None:
    model = build_model(CONFIG)
    optimizer = Optimizer(model, OptimizerSettings(matrices="adamw", clip=0.5))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in model.parameters())
    seen: list[torch.Tensor] = []

    def note(*_: object) -> None:
        seen.extend(p.grad.norm() for p in model.parameters() if p.grad is not None)

    optimizer.parts[0].register_step_pre_hook(note)
    assert optimizer.step(1.0) == pytest.approx(count**0.5, rel=1e-5)
    assert float(torch.stack(seen).norm()) == pytest.approx(0.5, rel=1e-4)


def test_is_matrix() -> None:
    square = torch.zeros(2, 2)
    assert is_matrix("layers.0.mlp.gate_proj.weight", square)
    assert is_matrix("mtp.0.block.mlp.shared_experts.gate_proj.weight", square)
    assert not is_matrix("layers.0.mlp.gate.weight", square)
    assert not is_matrix("norm.weight", torch.zeros(2))


def test_named_state_made_early_changes_nothing() -> None:
    """A checkpoint before the first step creates the state that the step would have created."""
    models = [build_model(CONFIG, seed=3) for _ in range(2)]
    optimizers = [Optimizer(m, OptimizerSettings()) for m in models]
    optimizers[0].named_state()
    for model, optimizer in zip(models, optimizers, strict=True):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        optimizer.step(1.0)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    states = [o.named_state() for o in optimizers]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_fused_gate_and_up_are_two_matrices() -> None:
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(3, 8, 6, generator=generator)
    grad = torch.randn(3, 8, 6, generator=generator)
    fused = torch.nn.Parameter(value.clone())
    halves = [torch.nn.Parameter(half.clone()) for half in value.split(4, dim=1)]
    fused.grad = grad.clone()
    for half, part in zip(halves, grad.split(4, dim=1), strict=True):
        half.grad = part.clone()
    Muon([], 0.1, 0.9, 0.1, 5, fused=[fused]).step()
    Muon(halves, 0.1, 0.9, 0.1, 5).step()
    torch.testing.assert_close(fused.detach(), torch.cat([h.detach() for h in halves], dim=1), atol=1e-6, rtol=1e-5)
