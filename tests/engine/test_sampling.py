"""The law of the sampler: the right frequencies, the right nucleus, nothing outside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.engine import SamplingParams
from tael.engine.sampling import sample, uniforms


def draw(
    logits: torch.Tensor, count: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """`count` draws from one row of logits [V], each with the first number of a seed of its own."""
    uniform = uniforms([SamplingParams(1, seed=seed + i) for i in range(count)], 1)[:, 0]
    rows = logits.expand(count, -1)
    return sample(rows, torch.full((count,), temperature), torch.full((count,), top_p), uniform)[0]


def chi_square(found: torch.Tensor, probability: torch.Tensor) -> float:
    expected = probability.double() * found.sum()
    return float(((found - expected) ** 2 / expected).sum())


LOGITS = torch.tensor([1.0, 0.2, -0.5, 0.9, -2.0, 0.0, -1.0, 0.5])
LIMIT = 24.3  # chi-square with 7 degrees of freedom exceeds it once in a thousand


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 10**6, 2**39])
def test_frequencies(temperature: float, seed: int) -> None:
    """Neighbouring seeds, as a rollout's group has, are as good as independent."""
    found = draw(LOGITS, 4000, temperature, seed=seed).bincount(minlength=8)
    assert chi_square(found, (LOGITS / temperature).softmax(-1)) < LIMIT


def test_frequencies_along_one_request() -> None:
    uniform = uniforms([SamplingParams(1, seed=3)], 4000)[0]
    ones = torch.ones(4000)
    tokens, logprobs = sample(LOGITS.expand(4000, -1), ones, ones, uniform)
    assert chi_square(tokens.bincount(minlength=8), LOGITS.softmax(-1)) < LIMIT
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[tokens])
    pairs = (tokens[:-1] * 8 + tokens[1:]).bincount(minlength=64)
    joint = (LOGITS.softmax(-1)[:, None] * LOGITS.softmax(-1)).flatten()
    assert chi_square(pairs, joint) < 103.4  # 63 degrees of freedom, once in a thousand: no memory from step to step


def test_uniforms_do_not_depend_on_the_batch() -> None:
    few = uniforms([SamplingParams(1, seed=7)], 5)
    many = uniforms([SamplingParams(1, seed=s) for s in (1, 7, 2)], 300)
    assert torch.equal(few[0], many[1, :5])
    assert bool((many >= 0).all()) and bool((many < 1).all())


@pytest.mark.parametrize(("top_p", "kept"), [(0.2, 1), (0.5, 2), (0.56, 3), (0.69, 3), (0.85, 5), (1.0, 8)])
def test_nucleus(top_p: float, kept: int) -> None:
    """The fewest tokens whose mass reaches top_p, in their own proportions; log-probabilities of the whole law."""
    probability = torch.tensor([0.30, 0.05, 0.10, 0.25, 0.02, 0.15, 0.03, 0.10])
    count = 3000
    uniform = uniforms([SamplingParams(1, seed=i) for i in range(count)], 1)[:, 0]
    rows = probability.log().expand(count, -1)
    tokens, logprobs = sample(rows, torch.ones(count), torch.full((count,), top_p), uniform)
    found = tokens.bincount(minlength=8)
    best = probability.argsort(descending=True, stable=True)[:kept]
    assert set(found.nonzero().flatten().tolist()) == set(best.tolist())
    if kept > 1:
        assert chi_square(found[best], probability[best] / probability[best].sum()) < LIMIT
    torch.testing.assert_close(logprobs, probability.log()[tokens], rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    temperature=st.floats(0.01, 10),
    top_p=st.floats(0.01, 1),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_inverse_transform(logits: list[float], temperature: float, top_p: float, uniform: float) -> None:
    """The token drawn is in the nucleus, and the first whose cumulative share passes the number."""
    row = torch.tensor(logits)
    token, _ = sample(
        row[None], torch.tensor([temperature]), torch.tensor([top_p]), torch.tensor([uniform], dtype=torch.float64)
    )
    probability = (row / temperature).softmax(-1)
    order = probability.argsort(descending=True, stable=True)
    before = probability[order].cumsum(-1) - probability[order]
    allowed = order[before <= top_p + 1e-5]
    assert int(token) in allowed.tolist()
    assert probability[token] > 0


def test_greedy_and_drawn_in_one_batch() -> None:
    rows = LOGITS.expand(2, -1)
    half = torch.tensor([0.999, 0.999], dtype=torch.float64)
    tokens, logprobs = sample(rows, torch.tensor([0.0, 1.0]), torch.ones(2), half)
    assert tokens.tolist() == [0, 7]
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[tokens])


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    for uniform in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        token, _ = sample(logits[None], torch.ones(1), torch.ones(1), torch.tensor([uniform], dtype=torch.float64))
        assert int(token) in (1, 3)
