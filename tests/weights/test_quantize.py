"""Quantised modules and models: the format's law, errors, tied heads, mixed choices, loading a tensor at a time."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tael.errors import TaelError
from tael.model import ModelConfig, Transformer, build_model
from tael.model.moe import Experts
from tael.weights import load_model, save_model
from tael.weights.quantize import (
    SCHEMES,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    Scheme,
    is_quantized,
    quantize_model,
    round_activations,
    targets,
)
from tael.weights.rounding import pack_int4, unpack_int4
from tael.weights.streamed import load_quantized

SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    n_routed_experts=4,
    moe_intermediate_size=32,
    kv_lora_rank=32,
    num_nextn_predict_layers=1,
)
TIED = dataclasses.replace(SMALL, tie_word_embeddings=True, num_nextn_predict_layers=0)
QWEN = ModelConfig(
    model_type="qwen2",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_key_value_heads=2,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_of(config: ModelConfig) -> Transformer:
    return build_model(config, zero_residual=False)


def tokens_of(config: ModelConfig, rows: int = 3, length: int = 24) -> Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ the format


def test_int4_packing_puts_even_columns_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_int4(codes).tolist() == [[1 + 16 * 2, 15]]
    everything = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_int4(unpack_int4(everything)), everything)


@pytest.mark.parametrize("minimums", [False, True])
def test_int4_law_by_hand(minimums: bool) -> None:
    codes = torch.randint(16, (3, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales, low = normal(3, 2).half(), normal(3, 2, seed=1).half()
    layer = QuantizedLinear("int4", pack_int4(codes), scales, low if minimums else None)
    assert (layer.in_features, layer.out_features) == (64, 3)
    for row in range(3):
        for column in range(64):
            scale, code = float(scales[row, column // 32]), int(codes[row, column])
            expected = scale * code + float(low[row, column // 32]) if minimums else scale * (code - 8)
            assert float(layer.dequantize()[row, column]) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_int8_law(scheme: Scheme) -> None:
    layer = QuantizedLinear.from_float(normal(5, 96), scheme)
    expected = layer.codes.float() * layer.scales.float().repeat_interleave(32, 1)
    assert torch.equal(layer.dequantize(), expected)
    assert torch.equal(layer.dequantize(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize(
    ("scheme", "asymmetric", "most"), [("int4", False, 0.10), ("int4", True, 0.10), ("int8", False, 0.008)]
)
def test_rounding_is_close(scheme: Scheme, asymmetric: bool, most: float, group: int) -> None:
    weight = 0.02 * normal(64, 256)
    layer = QuantizedLinear.from_float(weight, scheme, group, asymmetric)
    assert (layer.dequantize() - weight).norm() / weight.norm() < most


def test_searched_scales_beat_the_plain_ones_of_q4_0() -> None:
    weight = normal(64, 256)
    groups = weight.unflatten(-1, (-1, 32))
    peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    plain = ((groups / (peak / -8)).round().clamp(-8, 7) * (peak / -8)).flatten(1)
    searched = QuantizedLinear.from_float(weight, "int4").dequantize()
    assert (searched - weight).norm() < 0.97 * (plain - weight).norm()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SCHEMES), st.floats(-6, 3))
def test_codes_that_are_values_come_back(seed: int, scheme: Scheme, exponent: float) -> None:
    """Rounding what a layer stands for changes nothing much: 1.6 steps at most in any weight.

    A scale below 6e-5 is a subnormal fp16, off by up to 2^-25, which the largest code takes 128 times.
    """
    first = QuantizedLinear.from_float(normal(4, 64, seed=seed) * 10**exponent, scheme)
    values = first.dequantize()
    again = QuantizedLinear.from_float(values, scheme)
    step = again.scales.float().abs().repeat_interleave(32, 1)
    assert ((again.dequantize() - values).abs() <= 1.6 * step + 128 * 2**-25).all()


def test_zeros_and_one_sided_weights() -> None:
    for scheme in SCHEMES:
        assert not QuantizedLinear.from_float(torch.zeros(2, 32), scheme).dequantize().any()
    ones = QuantizedLinear.from_float(torch.ones(2, 32), "int4", asymmetric=True)
    assert torch.allclose(ones.dequantize(), torch.ones(2, 32), atol=1e-3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: QuantizedLinear.from_float(torch.ones(2, 48), "int4"), "48 input columns"),
        (lambda: QuantizedLinear.from_float(torch.ones(2, 64), "int4", 48), "quantisation group 48"),
        (lambda: QuantizedLinear.from_float(torch.full((2, 32), torch.nan), "int4"), "not finite"),
        (lambda: QuantizedLinear.from_float(torch.full((2, 32), torch.inf), "int8"), "not finite"),
        (lambda: QuantizedLinear.from_float(torch.full((2, 32), 1e9), "int8"), "too large"),
        (lambda: QuantizedLinear.from_float(torch.ones(2, 32), "int3"), "no quantisation scheme 'int3'"),  # type: ignore[arg-type]
        (lambda: QuantizedLinear.from_float(torch.ones(2, 32), "int8", asymmetric=True), "has no minimums"),
        (lambda: QuantizedLinear("int8", torch.ones(2, 32), torch.ones(2, 1).half()), "codes must be int8"),
        (
            lambda: QuantizedLinear("int8", torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 2).half()),
            r"must be fp16 \[2, 1\]",
        ),
    ],
)
def test_what_cannot_be_is_said(make: Callable[[], object], said: str) -> None:
    with pytest.raises(TaelError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ products


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_is_the_product_of_the_values(scheme: Scheme) -> None:
    weight, bias, x = normal(40, 96), normal(40, seed=2), normal(7, 96, seed=3)
    layer = QuantizedLinear.from_float(weight, scheme, bias=bias)
    inputs = x if scheme == "int8" else round_activations(x)
    expected = inputs.double() @ layer.dequantize().double().T + bias.double()
    assert torch.allclose(layer(x).double(), expected, atol=1e-4)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(layer(x.view(1, 7, 96))[0], layer(x), atol=1e-5)


def test_a_product_in_slabs_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = QuantizedLinear.from_float(normal(50, 64), "int4", asymmetric=True), normal(3, 64, seed=1)
    whole = layer(x)
    monkeypatch.setattr("tael.weights.quantized._SLAB", 64 * 7)
    assert torch.allclose(layer(x), whole, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_do_not_meet(scheme: Scheme) -> None:
    """Activations are rounded within a row: order and company of rows change nothing but the order of sums."""
    layer, x = QuantizedLinear.from_float(normal(40, 64), scheme), normal(9, 64, seed=1)
    shuffled = torch.tensor([3, 1, 8, 0, 2, 7, 6, 5, 4])
    assert torch.equal(round_activations(x)[shuffled], round_activations(x[shuffled]))
    assert torch.allclose(layer(x)[shuffled], layer(x[shuffled]), atol=1e-5)
    assert torch.allclose(layer(x)[4:5], layer(x[4:5]), atol=1e-5)


def test_activations_have_255_levels() -> None:
    x = normal(3, 64)
    rounded = round_activations(x)
    scale = x.view(3, 2, 32).abs().amax(-1, keepdim=True) / 127
    levels = rounded.view(3, 2, 32) / scale
    assert torch.allclose(levels, levels.round(), atol=1e-4) and float(levels.abs().max()) <= 127.001
    assert not round_activations(torch.zeros(2, 32)).any()


def test_eight_bits_are_those_of_q8_0() -> None:
    """Weights and activations against the gguf package's Q8_0: scales in fp16, halves rounded away from zero."""
    x = normal(16, 256)
    stored = quants.quantize(x.numpy(), GGMLQuantizationType.Q8_0)
    theirs = torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType.Q8_0))
    step = x.view(16, 8, 32).abs().amax(-1, keepdim=True).expand(16, 8, 32).reshape(16, 256) / 127
    for mine in (QuantizedLinear.from_float(x, "int8").dequantize(), round_activations(x)):
        error = (mine - theirs).abs() / step
        assert error.mean() < 0.03 and error.max() < 1.1  # a code apart where one lies between two


def test_experts_are_those_of_the_values() -> None:
    config = dataclasses.replace(SMALL, n_routed_experts=4, num_experts_per_tok=2)
    experts = Experts(config)
    torch.nn.init.normal_(experts.gate_up_proj, std=0.1, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(experts.down_proj, std=0.1, generator=torch.Generator().manual_seed(1))
    up = QuantizedLinear.from_float(experts.gate_up_proj.detach(), "int8")
    down = QuantizedLinear.from_float(experts.down_proj.detach(), "int8")
    quantised = QuantizedExperts(up, down)
    assert up.codes.shape == (4, 64, 64) and up.scales.shape == (4, 64, 2)
    with torch.no_grad():
        experts.gate_up_proj.copy_(up.dequantize())
        experts.down_proj.copy_(down.dequantize())
        x, gates = normal(11, 64), normal(11, 2, seed=2).sigmoid()
        choice = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(i))[:2] for i in range(11)])
        assert torch.allclose(quantised(x, gates, choice), experts(x, gates, choice), atol=1e-5)


# ------------------------------------------------------------------ a model


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.03), ("w8a8", 0.04), ("int4", 0.25)])
@pytest.mark.parametrize("config", [SMALL, TIED, QWEN], ids=["mla-moe-mtp", "tied", "qwen2"])
def test_logits_stay_close(config: ModelConfig, scheme: Scheme, most: float) -> None:
    model, tokens = model_of(config), tokens_of(config)
    with torch.no_grad():
        before, keep = model(tokens), {name: p.clone() for name, p in model.named_parameters()}
        lines: list[str] = []
        report = quantize_model(model, scheme, progress=lines.append)
        after = model(tokens)
    assert (after - before).norm() / before.norm() < most
    assert is_quantized(model) and not report.kept and lines
    assert report.bytes_before == sum(p.numel() * 4 for p in keep.values()) + 4 * sum(
        b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")
    )
    kinds = {row.type: row for row in report.types}
    assert kinds["attention"].after < kinds["attention"].before / (3 if scheme != "int4" else 6)
    left = dict(model.named_parameters())
    assert all("norm" in name or name.endswith("gate.weight") for name in left)
    assert all(torch.equal(left[name], keep[name]) for name in left)


def test_mtp_is_quantised_too() -> None:
    model = model_of(SMALL)
    quantize_model(model, "int4")
    assert isinstance(model.mtp[0].eh_proj, QuantizedLinear)
    tokens = tokens_of(SMALL)
    with torch.no_grad():
        hidden = model.features(tokens[:, :-1]).hidden
        assert torch.isfinite(model.mtp_features(hidden, tokens)[0].hidden).all()


def test_kv_b_is_read_in_the_absorbed_form() -> None:
    model, x = model_of(SMALL), normal(1, 5, 32)
    attention = model.layers[0].self_attn
    quantize_model(model, "int4")
    assert attention.kv_b_proj.scheme == "int8"
    q_nope, q_rope = normal(1, 5, 4, 32, seed=1), normal(1, 5, 4, 16, seed=2)
    latent, k_rope, mask = x, normal(1, 5, 16, seed=3), torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    absorbed = attention._absorbed(q_nope, q_rope, latent, k_rope, mask)
    expanded = attention._expanded(q_nope, q_rope, latent, k_rope, mask)
    assert torch.allclose(absorbed, expanded, atol=1e-4)
    assert attention.kv_b_proj.weight is attention.kv_b_proj.weight  # small: kept


def test_tied_head_shares_its_codes() -> None:
    model = model_of(TIED)
    quantize_model(model, "int4")
    assert isinstance(model.embed_tokens, QuantizedEmbedding) and isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.codes.data_ptr() == model.embed_tokens.codes.data_ptr()
    assert model.lm_head.scales.data_ptr() == model.embed_tokens.scales.data_ptr()
    tokens = tokens_of(TIED)
    assert torch.equal(model.embed_tokens(tokens), model.embed_tokens.weight[tokens])


def test_mixed_choices_and_what_stays_float() -> None:
    model = model_of(dataclasses.replace(SMALL, moe_intermediate_size=24))
    mixed = {"attention": "w8a8", "head": "float", "feed_forward": "int8"}
    report = quantize_model(model, "int4", mixed=mixed)
    assert model.layers[0].self_attn.o_proj.scheme == "w8a8"
    assert model.layers[0].mlp.up_proj.scheme == "int8"
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert isinstance(model.layers[1].mlp.experts, Experts)
    assert any("layers.1.mlp.experts: 64 columns" in line or "24" in line for line in report.kept)
    assert not any("lm_head" in line for line in report.kept)
    assert torch.isfinite(model(tokens_of(SMALL))).all()


def test_single_matrices_may_be_named() -> None:
    model = model_of(QWEN)
    quantize_model(model, "int4", mixed={"v_proj": "w8a8", "down_proj": "int8"})
    layer = model.layers[0]
    assert (layer.self_attn.v_proj.scheme, layer.self_attn.q_proj.scheme) == ("w8a8", "int4")
    assert (layer.mlp.down_proj.scheme, layer.mlp.up_proj.scheme) == ("int8", "int4")


@pytest.mark.parametrize(
    ("mixed", "schemes"),
    [
        (None, ("w8a8", "w8a8")),
        ({"attention": "int4"}, ("int4", "w8a8")),
        ({"down_proj": "int8"}, ("w8a8", "int8")),
        ({"feed_forward": "int4"}, ("w8a8", "int4")),
    ],
)
def test_calibrated_int4_keeps_the_sensitive_matrices_in_8_bits(mixed: dict | None, schemes: tuple[str, str]) -> None:
    model = model_of(QWEN)
    quantize_model(model, "int4", mixed=mixed, calibration=tokens_of(QWEN))
    layer = model.layers[0]
    assert (layer.self_attn.v_proj.scheme, layer.mlp.down_proj.scheme) == schemes
    assert layer.self_attn.q_proj.scheme == "int4"


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (SMALL, {"scheme": "int5"}, "no quantisation scheme"),
        (SMALL, {"scheme": "int4", "mixed": {"heads": "int8"}}, "did you mean 'head'"),
        (SMALL, {"scheme": "int4", "mixed": {"head": "int2"}}, "'int2' for head"),
        (SMALL, {"scheme": "int4", "mixed": {"embedding": "int4"}}, "embedding can be int8 or float"),
        (SMALL, {"scheme": "int4", "group": 24}, "quantisation group 24"),
        (TIED, {"scheme": "int4", "mixed": {"head": "float"}}, "one matrix"),
        (TIED, {"scheme": "int4", "mixed": {"head": "int4"}}, "not int4"),
    ],
)
def test_bad_choices(config: ModelConfig, options: dict, said: str) -> None:
    with pytest.raises(TaelError, match=said):
        quantize_model(model_of(config), **options)


def test_not_twice_and_not_saved(tmp_path: Path) -> None:
    model = model_of(TIED)
    quantize_model(model, "int8")
    with pytest.raises(TaelError, match="quantised already"):
        quantize_model(model, "int4")
    with pytest.raises(TaelError, match="cannot be saved"):
        save_model(model, tmp_path / "model")


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("config", [SMALL, TIED, QWEN], ids=["mla-moe-mtp", "tied", "qwen2"])
def test_loading_quantised_gives_the_bits_of_quantising_what_was_loaded(
    config: ModelConfig, asymmetric: bool, tmp_path: Path
) -> None:
    save_model(model_of(config), tmp_path / "m", dtype=torch.bfloat16)
    whole = load_model(tmp_path / "m")
    expected_report = quantize_model(whole, "int4", asymmetric=asymmetric)
    lines: list[str] = []
    read, report = load_quantized(tmp_path / "m", "int4", asymmetric=asymmetric, progress=lines.append)
    expected, state = whole.state_dict(), read.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    assert report == expected_report and "reading and quantising layers.1" in lines
    if config.tie_word_embeddings:
        assert read.lm_head.codes.data_ptr() == read.embed_tokens.codes.data_ptr()


PEAK = """
import sys, torch
from tael.weights import reader
from tael.weights.streamed import load_quantized
torch.set_num_threads(1)
def anonymous():
    return 1024 * sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
load_quantized(sys.argv[1], "int4")  # small: whatever the first call costs
before, seen = anonymous(), []
read = reader.Files.read
reader.Files.read = lambda self, name: (seen.append(anonymous()), read(self, name))[1]
model, report = load_quantized(sys.argv[2], "int4")
print(max(seen) - before, report.bytes_before, report.bytes_after)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory figures")
def test_memory_stays_bounded_while_loading(tmp_path: Path) -> None:
    """A 160 MB model (as floats) in 4 bits: the process's own memory grows by the codes and a constant.

    The mapped file's pages are not counted: they are the system's, dropped when memory is short.
    """
    big = dataclasses.replace(
        SMALL,
        hidden_size=512,
        moe_intermediate_size=512,
        n_routed_experts=16,
        num_hidden_layers=4,
        num_nextn_predict_layers=0,
    )
    save_model(build_model(big), tmp_path / "big", dtype=torch.bfloat16)
    save_model(build_model(SMALL), tmp_path / "small")
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "big")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, floats, codes = map(int, run.stdout.split())
    assert floats > 150e6 and codes < floats / 6
    assert grown < codes + 25e6


def test_targets_name_every_matrix() -> None:
    model = model_of(SMALL)
    named = {target.name for target in targets(model, "int8")}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith("mlp.gate.weight"):
            assert any(name.startswith(f"{target}.") for target in named), name
