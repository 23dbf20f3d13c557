"""Routing worked out by hand, and the dispatch to experts against one token and one expert at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tael.model import ModelConfig
from tael.model.moe import Experts, MixtureOfExperts, Router, _Gather, _Spread, grouped_linear

FOUR = ModelConfig(
    hidden_size=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, routed_scaling_factor=2.5
)


def router(config: ModelConfig, logits: list[float], bias: list[float] | None = None) -> tuple[Tensor, Any]:
    """Gates and routing of one token whose gate logits are `logits` (x is the first unit vector)."""
    gate = Router(config)
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = torch.tensor(logits)
        if bias is not None:
            gate.e_score_correction_bias.copy_(torch.tensor(bias))
        return gate(torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_v3_by_hand() -> None:
    """Scores .9 .1 | .6 .5: groups sum to 1.0 and 1.1, so the best expert is out; gates .6/1.1, .5/1.1, x 2.5."""
    gates, routing = router(FOUR, [logit(p) for p in (0.9, 0.1, 0.6, 0.5)])
    torch.testing.assert_close(routing.scores, torch.tensor([[[0.9, 0.1, 0.6, 0.5]]]))
    assert routing.choice.tolist() == [[[2, 3]]]
    torch.testing.assert_close(gates, torch.tensor([[[0.6, 0.5]]]) / 1.1 * 2.5)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    """+.2 on expert 1 lifts its group to 1.2; the gates are still the bare .9 and .1."""
    gates, routing = router(FOUR, [logit(p) for p in (0.9, 0.1, 0.6, 0.5)], [0.0, 0.2, 0.0, 0.0])
    assert routing.choice.tolist() == [[[0, 1]]]
    torch.testing.assert_close(gates, torch.tensor([[[0.9, 0.1]]]) / 1.0 * 2.5)
    torch.testing.assert_close(routing.scores, torch.tensor([[[0.9, 0.1, 0.6, 0.5]]]))


def test_negative_biased_scores_stay_within_their_groups() -> None:
    """A strongly negative bias must not make the masked-out groups look better (the trap of masking with 0)."""
    _, routing = router(FOUR, [logit(p) for p in (0.9, 0.1, 0.6, 0.5)], [-5.0, -5.0, -1.0, -1.0])
    assert sorted(routing.choice.flatten().tolist()) == [2, 3]


def test_without_normalisation() -> None:
    gates, _ = router(dataclasses.replace(FOUR, norm_topk_prob=False), [logit(p) for p in (0.9, 0.1, 0.6, 0.5)])
    torch.testing.assert_close(gates, torch.tensor([[[0.6, 0.5]]]) * 2.5)


def test_v2_by_hand() -> None:
    """Softmax .4 .1 | .3 .2; a group counts by its best expert, gates are the bare probabilities, x 2.5."""
    config = dataclasses.replace(FOUR, model_type="deepseek_v2", topk_method="group_limited_greedy")
    gates, routing = router(config, [math.log(p) for p in (0.4, 0.1, 0.3, 0.2)])
    assert routing.choice.tolist() == [[[0, 1]]]
    torch.testing.assert_close(gates, torch.tensor([[[0.4, 0.1]]]) * 2.5)
    gates, routing = router(
        dataclasses.replace(config, topk_method="greedy"), [math.log(p) for p in (0.4, 0.1, 0.3, 0.2)]
    )
    assert routing.choice.tolist() == [[[0, 2]]]
    torch.testing.assert_close(gates, torch.tensor([[[0.4, 0.3]]]) * 2.5)


# ------------------------------------------------------------------ dispatch


def mixture(config: ModelConfig, seed: int = 0) -> MixtureOfExperts:
    layer = MixtureOfExperts(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return layer


@pytest.mark.parametrize(("hidden", "width"), [(16, 8), (15, 7), (16, 7)], ids=["grouped", "looped", "mixed"])
def test_mixture_against_one_token_at_a_time(hidden: int, width: int) -> None:
    config = ModelConfig(hidden_size=hidden, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=width)
    layer = mixture(config)
    x = torch.randn(2, 5, hidden, generator=torch.Generator().manual_seed(1))
    out, routing = layer(x)
    gates, _ = layer.gate(x)
    expected = torch.zeros_like(out)
    for b in range(2):
        for t in range(5):
            token = x[b, t]
            expected[b, t] = layer.shared_experts(token)
            for slot, expert in enumerate(routing.choice[b, t].tolist()):
                gate, up = (layer.experts.gate_up_proj[expert] @ token).chunk(2)
                expected[b, t] += gates[b, t, slot] * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_other_rows_of_the_batch_do_not_matter() -> None:
    """No token is ever dropped: permuting or removing the others changes nothing for a token."""
    layer = mixture(ModelConfig(hidden_size=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8))
    x = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out, routing = layer(x)
        permuted, other = layer(x[order])
        alone, _ = layer(x[:1])
    torch.testing.assert_close(permuted, out[order], rtol=1e-5, atol=1e-6)
    assert torch.equal(other.choice, routing.choice[order])
    torch.testing.assert_close(alone, out[:1], rtol=1e-5, atol=1e-6)


def looped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    st.sampled_from([(8, 4), (4, 12), (5, 8), (8, 5), (3, 3)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_grouped_linear_with_empty_experts(counts: list[int], sides: tuple[int, int], dtype: torch.dtype) -> None:
    """Both paths, with experts nobody chose first, last and in the middle; gradients too."""
    generator = torch.Generator().manual_seed(sum(counts))
    out_width, in_width = sides
    x = torch.randn(sum(counts), in_width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), out_width, in_width, generator=generator).to(dtype).requires_grad_()
    cotangent = torch.randn(sum(counts), out_width, generator=generator).to(dtype)
    found = []
    for function in (grouped_linear, looped):
        out = function(x, weight, torch.tensor(counts))
        found.append((out, *torch.autograd.grad((out * cotangent).sum(), (x, weight))))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for expert, count in enumerate(counts):
        if not count:
            assert not found[0][2][expert].any()


def test_spread_and_gather_gradients() -> None:
    """The handwritten gradients against finite differences, in float64."""
    generator = torch.Generator().manual_seed(0)
    tokens, k = 5, 3
    order = torch.randint(0, 4, (tokens * k,), generator=generator).argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(tokens * k)
    x = torch.randn(tokens, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = torch.randn(tokens * k, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: _Spread.apply(t, order, inverse, k), (x,))
    assert torch.autograd.gradcheck(lambda t: _Gather.apply(t, order, inverse, k), (rows,))


def test_experts_gradients() -> None:
    """The whole dispatch against finite differences in float64 (looped path: 24-byte rows)."""
    experts = Experts(ModelConfig(hidden_size=3, n_routed_experts=3, moe_intermediate_size=3)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(0.0, 1.0, generator=generator)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    gates = torch.rand(4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    choice = torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2]])  # expert 1: nobody
    assert torch.autograd.gradcheck(lambda a, b: experts(a, b, choice), (x, gates))
