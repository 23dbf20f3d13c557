"""Emulated FP8: the rounding by hand and against torch's type, and that a model trains in it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tael.model import ModelConfig, build_model
from tael.train.fp8 import Float8Experts, Float8Linear, emulate_fp8, round_blocks, round_tiles


def test_a_tile_is_scaled_to_the_types_range() -> None:
    x = torch.zeros(2, 200)
    x[0, 3], x[0, 5] = 7.0, 7.0 / 448 * 17  # 17 lies between 16 and 18 in E4M3, and goes to the even one
    x[0, 130] = 1000.0  # another tile: does not move the first one's scale
    x[1] = 1e-3 * torch.arange(200)
    rounded = round_tiles(x)
    assert rounded[0, 3] == 7.0
    torch.testing.assert_close(rounded[0, 5], torch.tensor(7.0 / 448 * 16))
    assert rounded[0, 130] == 1000.0
    scale = x[1, :128].max() / 448
    expected = (x[1, :128] / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(rounded[1, :128], expected, rtol=0, atol=0)
    assert round_tiles(torch.zeros(3, 5)).eq(0).all()


def test_blocks_have_a_scale_each() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 130, 140, generator=generator)
    weight[0, :128, :128] *= 1e-3
    rounded = round_blocks(weight)
    assert rounded.shape == weight.shape
    block = weight[0, :128, :128]
    scale = block.abs().max() / 448
    torch.testing.assert_close(
        rounded[0, :128, :128], (block / scale).to(torch.float8_e4m3fn).float() * scale, rtol=0, atol=0
    )
    assert ((rounded - weight).abs() <= weight.abs() / 16 + weight.abs().amax() / 448 / 2).all()  # 3 bits of mantissa


@pytest.mark.parametrize(("rounded", "block"), [(round_blocks, (128, 128)), (round_tiles, (1, 128))])
def test_rounding_against_transformers(rounded, block) -> None:
    """transformers' own quantiser of fine-grained FP8, dequantised: values and scales as the released V3 has them."""
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    quantiser = finegrained.Fp8Quantize(SimpleNamespace(quantization_config=config))
    weight = torch.randn(3, 256, 384, generator=torch.Generator().manual_seed(5))
    weight *= torch.logspace(-6, 3, 256).unsqueeze(-1)
    found = quantiser.convert({"w.weight": weight})
    codes, scales = found["w.weight"], found["w.weight_scale_inv"]
    theirs = codes.float() * scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    ours = rounded(weight)
    # They multiply by the reciprocal of the scale, we divide: a value in the middle may go to the other neighbour.
    close = (ours - theirs).abs() <= 1e-5 * theirs.abs()
    assert close.float().mean() > 0.9999
    assert ((ours - theirs).abs() <= 0.13 * theirs.abs() + 1e-12).all()


def test_products_and_gradients_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(40, 24)
    layer.__class__ = Float8Linear
    x = torch.randn(6, 40, generator=generator, requires_grad=True)
    gradient = torch.randn(6, 24, generator=generator)
    out = layer(x)
    out.backward(gradient)
    xq, wq, gq = round_tiles(x.detach()), round_blocks(layer.weight.detach()), round_tiles(gradient)
    torch.testing.assert_close(out, xq @ wq.T + layer.bias)
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    torch.testing.assert_close(x.grad, gq @ wq)
    torch.testing.assert_close(layer.weight.grad, gq.T @ xq)
    torch.testing.assert_close(layer.bias.grad, gradient.sum(0))


def test_only_the_blocks_matrices_take_part_and_the_model_stays_close() -> None:
    config = ModelConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_nextn_predict_layers=1)
    plain, rounded = (build_model(config, 3, zero_residual=False) for _ in range(2))
    emulate_fp8(rounded)
    assert type(rounded.lm_head) is torch.nn.Linear
    kinds = {type(module) for module in rounded.layers[1].modules()}
    assert Float8Linear in kinds and Float8Experts in kinds and torch.nn.Linear not in kinds
    assert plain.state_dict().keys() == rounded.state_dict().keys()
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = plain(tokens), rounded(tokens)
    gap = (one - other).abs().max() / one.abs().max()
    assert 1e-4 < gap < 0.2
    assert all(p.grad is None for p in rounded.parameters())
    rounded(tokens).square().mean().backward()
    assert all(p.grad is not None for name, p in rounded.named_parameters() if not name.startswith("mtp."))
