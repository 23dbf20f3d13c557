"""The chunked head loss against torch's own cross-entropy: the same number, the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tael.train import losses
from tael.train.losses import linear_cross_entropy, token_logprobs


def random_problem(
    tokens: int, width: int, vocabulary: int, masked: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden, weight, targets.masked_fill(torch.rand(tokens, generator=generator) < masked, -100)


def value_and_gradients(function, hidden: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(h, w)
    (loss * scale).backward()
    assert h.grad is not None and w.grad is not None
    return loss.detach(), h.grad, w.grad


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).flatten(0, -2).float(), targets.flatten(), reduction="sum")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 30),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.integers(1, 17),
    scale=st.floats(0.01, 10),
    seed=st.integers(0, 1000),
)
def test_equals_cross_entropy(
    tokens: int, width: int, vocabulary: int, masked: float, chunk: int, scale: float, seed: int
) -> None:
    """Any size, any share of masked tokens, chunk borders anywhere, any factor on the way back."""
    hidden, weight, targets = random_problem(tokens, width, vocabulary, masked, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CPU_CHUNK", chunk)
        found = value_and_gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight, scale)
    wanted = value_and_gradients(lambda h, w: torch_loss(h, w, targets), hidden, weight, scale)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * scale * max(1.0, float(theirs.abs().max())))


def test_real_chunk_borders_and_batch_shape() -> None:
    """More tokens than one chunk holds, as [B, T, D]."""
    hidden, weight, targets = random_problem(3 * 700, 8, 16, 0.2, 1)
    assert len(hidden) > losses.CPU_CHUNK
    hidden, targets = hidden.view(3, 700, 8), targets.view(3, 700)
    found = value_and_gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight, 1 / 1700)
    wanted = value_and_gradients(lambda h, w: torch_loss(h, w, targets), hidden, weight, 1 / 1700)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_all_masked_is_zero() -> None:
    hidden, weight, _ = random_problem(7, 4, 5, 0.0, 2)
    targets = torch.full((7,), -100)
    found = value_and_gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight, 1.0)
    assert all(not value.any() for value in found)


def test_bf16_is_as_near_to_fp32_as_torchs_own() -> None:
    hidden, weight, targets = random_problem(600, 64, 100, 0.1, 3)
    scale = 1 / 541  # no power of two: a factor rounded to bf16 would shift every gradient
    exact = value_and_gradients(lambda h, w: torch_loss(h, w, targets), hidden / 8, weight, scale)
    h, w = (hidden / 8).bfloat16(), weight.bfloat16()
    ours = value_and_gradients(lambda h, w: linear_cross_entropy(h, w, targets), h, w, scale)
    theirs = value_and_gradients(lambda h, w: torch_loss(h, w, targets), h, w, scale)
    for a, b, true in zip(ours, theirs, exact, strict=True):
        error, reference = ((x.float() - true).norm() / true.norm() for x in (a, b))
        assert error <= 1.25 * reference + 1e-4
    slope = (ours[1].float() * exact[1]).sum() / exact[1].square().sum()
    assert abs(slope - 1) < 1e-3  # no systematic shrinking


def test_token_logprobs() -> None:
    """token_logprobs is the same law, per token and with a temperature."""
    hidden, weight, targets = random_problem(20, 6, 11, 0.0, 4)
    logprobs = token_logprobs(hidden, weight, targets)
    torch.testing.assert_close(-logprobs.sum(), linear_cross_entropy(hidden, weight, targets))
    warm = token_logprobs(hidden, weight, targets, temperature=1.7)
    torch.testing.assert_close(warm, ((hidden @ weight.t()) / 1.7).log_softmax(-1)[torch.arange(20), targets])
