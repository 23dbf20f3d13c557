"""GPTQ: a layer's objective against rounding to nearest, the algorithm against the paper's; whole models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tael.data import Document, train_tokenizer
from tael.errors import TaelError
from tael.model import ModelConfig, build_model
from tael.weights.gptq import DAMPING, calibration_rows, gptq
from tael.weights.quantize import QuantizedExperts, QuantizedLinear, quantize_model
from tael.weights.rounding import int4_codes, int4_scales, pack_int4

MOE = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    n_routed_experts=4,
    moe_intermediate_size=32,
    kv_lora_rank=32,
    num_nextn_predict_layers=1,
)
LLAMA = ModelConfig(model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2)


def correlated(rows: int, width: int) -> Tensor:
    """Inputs as a layer sees them: far fewer directions than columns carry most of the variance."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(rows, width // 8, generator=generator) @ torch.randn(width // 8, width, generator=generator)
    return few + 0.3 * torch.randn(rows, width, generator=generator)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(found: tuple[Tensor, Tensor, Tensor | None], group: int) -> Tensor:
    codes, scales, minimums = found
    return QuantizedLinear("int4", pack_int4(codes), scales, minimums, group=group).dequantize()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [32, 64, 96])
def test_beats_rounding_to_nearest_on_correlated_inputs(group: int, act_order: bool, asymmetric: bool) -> None:
    weight, x = normal(40, 192), correlated(600, 192)
    found = gptq(weight, x.T @ x, group, act_order=act_order, asymmetric=asymmetric)
    nearest = QuantizedLinear.from_float(weight, "int4", group, asymmetric).dequantize()

    def error(rounded: Tensor) -> float:
        return float(((weight - rounded) @ x.T).square().sum())

    assert error(values(found, group)) < 0.6 * error(nearest)


def test_equals_the_paper_written_out_plainly() -> None:
    """Algorithm 1 without lazy blocks, in fp64, the inverse Hessian shrunk step by step (equation 3)."""
    group, weight, x = 32, normal(6, 96).double(), correlated(300, 96).double()
    h = x.T @ x
    importance = h.diagonal().float()
    inverse = torch.linalg.inv(h + DAMPING * h.diagonal().mean() * torch.eye(96, dtype=torch.float64))
    w, expected = weight.clone(), torch.empty(6, 96)
    for i in range(96):
        if i % group == 0:
            scale = int4_scales(w[:, i : i + group].float(), importance[i : i + group])
        code = int4_codes(w[:, i : i + 1].float(), scale.unsqueeze(-1)[:, 0]).squeeze(-1)
        expected[:, i] = (code - 8) * scale.float()
        error = (w[:, i] - expected[:, i].double()) / inverse[0, 0]
        w[:, i:] -= error.unsqueeze(1) * inverse[0]
        inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]  # without row and column i
    assert (
        values(gptq(weight.float(), h.float(), group), group) - expected
    ).norm() < 0.02 * expected.norm()  # fp32 may tip a code or two


def test_white_inputs_leave_nothing_to_make_up_for() -> None:
    weight = normal(16, 64)
    assert torch.equal(
        values(gptq(weight, 100 * torch.eye(64), 32), 32), QuantizedLinear.from_float(weight, "int4").dequantize()
    )


def test_dead_and_degenerate_inputs() -> None:
    weight, x = normal(8, 64), correlated(10, 64)  # fewer tokens than columns
    x[:, 5] = 0
    assert torch.isfinite(values(gptq(weight, x.T @ x, 32), 32)).all()
    with pytest.raises(TaelError, match="not finite or degenerate"):
        gptq(weight, torch.full((64, 64), torch.nan), 32)


@pytest.mark.parametrize("config", [MOE, LLAMA], ids=["mla-moe-mtp", "llama"])
def test_a_calibrated_model_is_nearer_to_the_float_one(config: ModelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (48, 33), generator=generator)
    other = torch.randint(config.vocab_size, (8, 33), generator=generator)

    def make() -> torch.nn.Module:
        return build_model(dataclasses.replace(config, initializer_range=0.08), zero_residual=False)

    def distance(calibration: Tensor | None) -> tuple[float, int, int]:
        model = make()
        report = quantize_model(model, "int4", calibration=calibration, mixed={"embedding": "float", "head": "float"})
        with torch.no_grad():
            return float((model(other) - expected).norm()), report.calibrated, report.sparse

    with torch.no_grad():
        expected = make()(other)
    (nearest, none, _), (calibrated, some, sparse) = distance(None), distance(rows)
    assert none == 0 and some > 0 and sparse == 0
    assert calibrated < nearest


def test_experts_that_saw_too_little_are_rounded_to_nearest() -> None:
    model, plain = build_model(MOE, zero_residual=False), build_model(MOE, zero_residual=False)
    rows = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(0))
    report = quantize_model(model, "int4", calibration=rows)
    quantize_model(plain, "int4")
    # 12 tokens, 2 experts each: no expert of 4 reaches 16, which gate_up needs; down needs 8.
    assert report.sparse >= 8
    ours, theirs = model.layers[1].mlp.experts, plain.layers[1].mlp.experts
    assert isinstance(ours, QuantizedExperts) and isinstance(theirs, QuantizedExperts)
    assert torch.equal(ours.gate_up.codes, theirs.gate_up.codes)


def test_calibration_rows() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat\n"] * 20, 300)
    documents = [Document("the cat sat on the mat\n" * 5, "x")] * 10
    rows = calibration_rows(tokenizer, documents, 3, 16)
    assert rows.shape == (3, 16) and (rows[:, 0] == tokenizer.bos_id).all()
    assert tokenizer.decode(rows[:, 1:].flatten().tolist()).startswith("the cat sat on the mat\nthe cat")
    with pytest.raises(TaelError, match="give more text"):
        calibration_rows(tokenizer, documents[:1], 100, 100)
    with pytest.raises(TaelError, match="at least 1 row"):
        calibration_rows(tokenizer, documents, 0, 16)


def test_bad_calibration() -> None:
    with pytest.raises(TaelError, match="token ids"):
        quantize_model(build_model(LLAMA), "int4", calibration=torch.full((2, 8), 96))
    with pytest.raises(TaelError, match="no layer of this model is to be int4"):
        quantize_model(build_model(LLAMA), "int8", calibration=torch.zeros(2, 8, dtype=torch.int64))
