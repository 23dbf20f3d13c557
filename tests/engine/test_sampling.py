"""The law of the sampler: right frequencies, right survivors, the same bits in any company, exact rollback."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tael.engine.constrain import Constraint
from tael.engine.filters import survivors
from tael.engine.params import SamplingParams
from tael.engine.sampling import (
    ACCEPT,
    DRAFT,
    SamplerState,
    distribution,
    sample_rows,
    uniform,
)
from tael.errors import TaelError

LOGITS = torch.tensor([1.0, 0.2, -0.5, 0.9, -2.0, 0.0, -1.0, 0.5])
LIMIT = 29.9  # chi-square with 7 degrees of freedom exceeds it once in ten thousand; some 20 are looked at
PARITY = settings(max_examples=60, deadline=None, derandomize=True)


def draw(logits: torch.Tensor, count: int, seed: int = 0, **options: Any) -> torch.Tensor:
    """`count` draws from one row of logits [V], each with the first number of a seed of its own."""
    states = [SamplerState(SamplingParams(seed=seed + i, **options)) for i in range(count)]
    return torch.tensor(sample_rows(logits.expand(count, -1), states).tokens)


def chi_square(found: torch.Tensor, probability: torch.Tensor) -> float:
    expected = probability.double() * found.sum()
    return float(((found - expected) ** 2 / expected).sum())


def peaked(vocab_size: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------------- random numbers


def test_stream_0_is_the_generators_own() -> None:
    for seed in (0, 7, 2**40 + 1, -3, 2**70):
        wanted = np.random.Generator(np.random.Philox(key=seed % 2**64)).random(200)
        assert [uniform(seed, i) for i in range(200)] == wanted.tolist()


def test_numbers_do_not_depend_on_the_way_to_them() -> None:
    """In any order, also far ahead and back again, from the state's table as from the function."""
    state = SamplerState(SamplingParams(seed=11))
    order = [random.Random(0).randrange(2000) for _ in range(300)]
    for index in order:
        for stream in (0, DRAFT, ACCEPT):
            assert state.uniform(index, stream) == uniform(11, index, stream)


def test_streams_are_independent() -> None:
    numbers = torch.tensor([[uniform(5, i, stream) for i in range(3000)] for stream in range(3)], dtype=torch.float64)
    assert bool((numbers >= 0).all()) and bool((numbers < 1).all())
    correlation = torch.corrcoef(numbers)
    assert float((correlation - torch.eye(3)).abs().max()) < 0.06


# ---------------------------------------------------------------------- frequencies


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 10**6, 2**39])
def test_frequencies(temperature: float, seed: int) -> None:
    """Neighbouring seeds, as a rollout's group has, are as good as independent."""
    found = draw(LOGITS, 2000, seed, temperature=temperature).bincount(minlength=8)
    assert chi_square(found, (LOGITS / temperature).softmax(-1)) < LIMIT


def test_frequencies_along_one_request() -> None:
    state = SamplerState(SamplingParams(seed=3))
    sampled = sample_rows(LOGITS.expand(4000, -1), [state] * 4000, range(4000))
    tokens = torch.tensor(sampled.tokens)
    assert chi_square(tokens.bincount(minlength=8), LOGITS.softmax(-1)) < LIMIT
    torch.testing.assert_close(torch.tensor(sampled.logprobs), LOGITS.log_softmax(-1)[tokens])
    pairs = (tokens[:-1] * 8 + tokens[1:]).bincount(minlength=64)
    joint = (LOGITS.softmax(-1)[:, None] * LOGITS.softmax(-1)).flatten()
    assert chi_square(pairs, joint) < 103.4  # 63 degrees of freedom, once in a thousand: no memory from step to step


@pytest.mark.parametrize(("top_p", "kept"), [(0.2, 1), (0.5, 2), (0.56, 3), (0.69, 3), (0.85, 5), (1.0, 8)])
def test_nucleus(top_p: float, kept: int) -> None:
    """The fewest tokens whose mass reaches top_p, in their own proportions; log-probabilities of the whole law."""
    probability = torch.tensor([0.30, 0.05, 0.10, 0.25, 0.02, 0.15, 0.03, 0.10])
    states = [SamplerState(SamplingParams(top_p=top_p, seed=i)) for i in range(2000)]
    sampled = sample_rows(probability.log().expand(2000, -1), states)
    tokens = torch.tensor(sampled.tokens)
    found = tokens.bincount(minlength=8)
    best = probability.argsort(descending=True, stable=True)[:kept]
    assert set(found.nonzero().flatten().tolist()) == set(best.tolist())
    if kept > 1:
        assert chi_square(found[best], probability[best] / probability[best].sum()) < LIMIT
    torch.testing.assert_close(torch.tensor(sampled.logprobs), probability.log()[tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [5, 127, 128, 129, 1000])
def test_the_draw_in_blocks_is_the_inverse_transform(vocab_size: int) -> None:
    """Against one cumulative sum; with tokens of no probability at both ends and at borders of blocks."""
    logits = peaked(vocab_size, 1)
    logits[[0, 1, vocab_size // 2, vocab_size - 1]] = -math.inf
    if vocab_size > 256:
        logits[100:260] = -math.inf
    state = SamplerState(SamplingParams(seed=2))
    cumulative = logits.softmax(-1).double().cumsum(-1)
    count = 500
    tokens = sample_rows(logits.expand(count, -1), [state] * count, range(count)).tokens
    targets = torch.tensor([uniform(2, i) for i in range(count)], dtype=torch.float64) * cumulative[-1]
    wanted = torch.searchsorted(cumulative, targets, right=True).tolist()
    assert sum(a != b for a, b in zip(tokens, wanted, strict=True)) <= 1  # blocks are rounded on their own
    assert all(logits[token] > -math.inf for token in tokens)


def test_the_ends_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    for number in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        for options in ({}, {"top_p": 0.99}, {"top_k": 4}):
            state = SamplerState(SamplingParams(**options))
            monkeypatch.setattr(state, "uniform", lambda index, stream=0, number=number: number)
            assert sample_rows(logits[None], [state]).tokens == [1 if number < 0.5 else 3]


def test_greedy_and_drawn_in_one_batch() -> None:
    states = [SamplerState(SamplingParams(temperature=0)), SamplerState(SamplingParams(temperature=2.0))]
    sampled = sample_rows(LOGITS.expand(2, -1), states)
    assert sampled.tokens[0] == 0
    assert sampled.logprobs[0] == pytest.approx(float(LOGITS.log_softmax(-1)[0]))
    assert sampled.logprobs[1] == pytest.approx(float((LOGITS / 2).log_softmax(-1)[sampled.tokens[1]]))


# ---------------------------------------------------------------------- filters and penalties against transformers


def transformers_law(logits: torch.Tensor, params: SamplingParams, context: list[int]) -> torch.Tensor:
    steps: list[Any] = []
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    scores = LogitsProcessorList(steps)(torch.tensor([context]), logits[None].clone())
    return torch.as_tensor(scores)[0].softmax(-1)


@PARITY
@given(
    seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([9, 300, 5000]),
    scale=st.sampled_from([0.5, 3.0, 8.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 40, 4000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_laws_equal_transformers(
    seed: int,
    vocab_size: int,
    scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=seed
    )
    logits = peaked(vocab_size, seed, scale)
    generator = random.Random(seed)
    prompt, output = ([generator.randrange(vocab_size) for _ in range(n)] for n in (20, 10))
    state = SamplerState(params, prompt, vocab_size)
    for token in output:
        state.accept(token)
    law = distribution(logits, state)
    assert float(law.sum()) == pytest.approx(1)
    torch.testing.assert_close(law.float(), transformers_law(logits, params, prompt + output), rtol=1e-4, atol=1e-6)
    assert law[sample_rows(logits[None], [state]).tokens[0]] > 0


def slow_survivors(logprobs: np.ndarray, params: SamplingParams) -> list[int]:
    """The definition: everything sorted, ties by id."""
    order = sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i))
    order = [i for i in order if logprobs[i] > -math.inf]
    if params.top_k:
        order = [i for i in order if logprobs[i] >= logprobs[order[min(params.top_k, len(order)) - 1]]]
    weight = np.exp(logprobs)
    total = sum(float(weight[i]) for i in order) if params.top_k else 1.0
    kept, before = [], 0.0
    for i in order:
        if params.top_p < 1 and before >= params.top_p * total:
            break
        kept.append(i)
        before += float(weight[i])
    return sorted(i for i in kept if weight[i] >= params.min_p * weight[order[0]])


@PARITY
@given(
    values=st.lists(st.sampled_from([0.0, -1.0, -2.5, -9.0, -14.0, -40.0, -math.inf]), min_size=1, max_size=40),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([1.0, 0.9999999, 0.95, 0.6, 0.1]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05]),
)
def test_survivors_with_ties(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    """Equal tokens, tokens far down the tail, impossible ones: the floors change nothing."""
    logits = torch.tensor([*values, 0.0])
    held = logits.log_softmax(-1).numpy()
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    if not params.is_filtered:
        return
    ids, weights = survivors(held, params)
    assert ids.tolist() == slow_survivors(held, params)
    np.testing.assert_array_equal(weights, np.exp(held[ids]).astype(np.float64))


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 4.0])
def test_survivors_of_a_large_vocabulary(scale: float) -> None:
    """Flat laws need floors below the first, a uniform one all tokens."""
    held = peaked(20_000, 5, scale).log_softmax(-1).numpy()
    for params in (SamplingParams(top_p=0.95), SamplingParams(top_k=300), SamplingParams(min_p=0.2)):
        assert survivors(held, params)[0].tolist() == slow_survivors(held, params)


def test_openai_penalties_bias_and_min_tokens() -> None:
    """Presence once, frequency by count, of output tokens only; bias on top; no stop token before min_tokens."""
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 5.0, 0: -100}, stop_ids=(1,), min_tokens=4
    )
    state = SamplerState(params, [2, 2, 7], 8)
    for token in (5, 5, 6):
        state.accept(token)
    wanted = LOGITS.clone()
    wanted[5] -= 0.5 + 2 * 0.25
    wanted[6] -= 0.75
    wanted[3] += 5
    wanted[0] -= 100
    barred = wanted.clone()
    barred[1] = -math.inf
    given_logits = LOGITS.clone()
    torch.testing.assert_close(state.process(given_logits), barred)
    assert torch.equal(given_logits, LOGITS)
    state.accept(2)
    wanted[2] -= 0.75
    torch.testing.assert_close(state.process(LOGITS), wanted)
    sampled = sample_rows(LOGITS[None], [state])
    assert sampled.logprobs[0] == pytest.approx(float(wanted.log_softmax(-1)[sampled.tokens[0]]))


# ---------------------------------------------------------------------- company, speculation


def a_state(generator: random.Random, vocab_size: int) -> SamplerState:
    pick = generator.choice
    params = SamplingParams(
        temperature=pick([0.0, 0.7, 1.0, 1.4]),
        top_p=pick([1.0, 1.0, 0.9]),
        top_k=pick([0, 0, 20]),
        min_p=pick([0.0, 0.0, 0.05]),
        repetition_penalty=pick([1.0, 1.0, 1.2]),
        frequency_penalty=pick([0.0, 0.0, 0.5]),
        logit_bias=pick([{}, {1: 2.0, 4: -3.0}]),
        logprobs=pick([None, 0, 3]),
        seed=generator.randrange(2**40),
    )
    prompt = [generator.randrange(vocab_size) for _ in range(9)]
    state = SamplerState(params, prompt, vocab_size)
    for _ in range(generator.randrange(6)):
        state.accept(generator.randrange(vocab_size))
    return state


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), vocab_size=st.sampled_from([50, 1024, 4097]))
def test_a_row_is_the_same_bits_in_any_company(seed: int, vocab_size: int) -> None:
    generator = random.Random(seed)
    count = generator.randint(2, 24)
    states = [a_state(generator, vocab_size) for _ in range(count)]
    logits = peaked(count * vocab_size, seed).view(count, vocab_size)
    alone = [sample_rows(logits[i : i + 1].clone(), [states[i]]) for i in range(count)]
    order = generator.sample(range(count), generator.randint(1, count))
    together = sample_rows(logits[order], [states[i] for i in order])
    for place, i in enumerate(order):
        assert together.tokens[place] == alone[i].tokens[0]
        assert together.logprobs[place] == alone[i].logprobs[0]
        assert together.top[place] == alone[i].top[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), steps=st.lists(st.integers(0, 5), max_size=12))
def test_rollback(seed: int, steps: list[int]) -> None:
    """Accepting and taking back leaves what accepting only the rest leaves."""
    generator = random.Random(seed)
    options: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    params = SamplingParams(min_tokens=3, stop_ids=(2,), **options)
    prompt = [generator.randrange(30) for _ in range(8)]
    state, kept = SamplerState(params, prompt, 30), []
    for back in steps:
        for _ in range(generator.randrange(90)):
            kept.append(generator.randrange(30))
            state.accept(kept[-1])
        back = min(back * generator.randrange(9), len(kept))
        state.rollback(back)
        kept = kept[: len(kept) - back]
    fresh = SamplerState(params, prompt, 30)
    for token in kept:
        fresh.accept(token)
    logits = peaked(30, seed)
    assert state.index == fresh.index
    assert torch.equal(state.process(logits), fresh.process(logits))
    with pytest.raises(ValueError, match="cannot take back"):
        state.rollback(state.index + 1)


def test_distribution_is_what_is_drawn() -> None:
    for options in ({"temperature": 0}, {"temperature": 0.8}, {"top_p": 0.7}, {"top_k": 3, "min_p": 0.4}):
        law = distribution(LOGITS, SamplerState(SamplingParams(**options)))
        assert law.dtype == torch.float64 and float(law.sum()) == pytest.approx(1)
        found = draw(LOGITS, 2000, **options).bincount(minlength=8)
        assert bool((found[law == 0] == 0).all())
        assert chi_square(found[law > 0], law[law > 0]) < LIMIT


def test_top_logprobs() -> None:
    state = SamplerState(SamplingParams(temperature=0.5, top_k=1, logprobs=3))
    (top,) = sample_rows(LOGITS[None], [state]).top
    wanted = (LOGITS / 0.5).log_softmax(-1)
    assert top is not None and [i for i, _ in top] == [0, 3, 7]
    assert [value for _, value in top] == pytest.approx(wanted[[0, 3, 7]].tolist())
    assert sample_rows(LOGITS[None], [SamplerState(SamplingParams(logprobs=0))]).top == [None]


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 2}])
def test_broken_logits(value: float, options: dict[str, Any]) -> None:
    row = torch.full((8,), value)
    state = SamplerState(SamplingParams(**options))
    for call in (lambda: sample_rows(torch.stack([LOGITS, row]), [state] * 2), lambda: distribution(row, state)):
        with pytest.raises(TaelError, match="no token is left to choose"):
            call()


NAN = math.nan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 2.5}, "max_tokens must be at least 1"),
        ({"temperature": NAN}, "temperature must be 0 or more"),
        ({"temperature": math.inf}, "temperature must be 0 or more"),
        ({"temperature": "hot"}, "temperature must be 0 or more, not 'hot'"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"stop_ids": (-1,)}, "stop_ids must be token ids"),
        ({"stop_ids": 7}, "stop_ids must be token ids"),
        ({"top_k": -1}, r"top_k must be a whole number of 0 \(off\)"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in"),
        ({"presence_penalty": 3}, r"presence_penalty must be in \[-2, 2\], not 3"),
        ({"frequency_penalty": NAN}, "frequency_penalty must be in"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must name token ids"),
        ({"logit_bias": {1: 101}}, "logit_bias must be numbers in"),
        ({"logit_bias": {1: NAN}}, "logit_bias must be numbers in"),
        ({"logit_bias": {1: "x"}}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": 5}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias names a token twice"),
        ({"logprobs": 21}, "logprobs must be 0 to 20"),
        ({"logprobs": -1}, "logprobs must be 0 to 20"),
        ({"stop": ("a", "")}, "stop holds an empty string"),
        ({"stop": ("a",) * 17}, "stop may hold 16 strings, not 17"),
        ({"stop": ("a" * 600,)}, "stop strings may have 512 characters"),
        ({"stop": (3,)}, "stop must be a string or strings"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 is more than max_tokens 8"),
        ({"thinking_budget": -1}, "thinking_budget must be 0 or more"),
        ({"loop_guard": 1}, "loop_guard must be True or False"),
        ({"constraint": "json"}, "constraint must be a Constraint"),
        ({"constraint": Constraint.json_object(), "min_tokens": 2}, "min_tokens and constraint contradict"),
    ],
)
def test_parameters_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaelError, match=message) as error:
        SamplingParams(**options)
    assert "\n" not in str(error.value) and str(error.value).startswith("sampling: ")


def test_parameters_are_settled_and_hashable() -> None:
    params = SamplingParams(logit_bias={5: 1, 2: -1.5}, stop="END", logprobs=True, stop_ids=[3])  # type: ignore[arg-type]
    assert params.logit_bias == ((2, -1.5), (5, 1.0))
    assert params.stop == ("END",) and params.logprobs == 0 and params.stop_ids == (3,)
    assert hash(params) == hash(SamplingParams(logit_bias={2: -1.5, 5: 1}, stop=("END",), logprobs=0, stop_ids=(3,)))
    assert SamplingParams(logprobs=False).logprobs is None


def test_unknown_tokens() -> None:
    for params in (SamplingParams(logit_bias={8: 1.0}), SamplingParams(stop_ids=(8,))):
        params.check_vocabulary(9)
        with pytest.raises(TaelError, match=r"names token 8, but the model has only 0\.\.7"):
            SamplerState(params, [], 8)


def test_a_constraint_has_to_be_compiled() -> None:
    with pytest.raises(TaelError, match="the constraint was not compiled"):
        SamplerState(SamplingParams(constraint=Constraint.json_object()))
