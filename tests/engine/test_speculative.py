"""Speculation changes how fast tokens come, never which: the same greedy output, the same law of what is drawn."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.engine import Engine, EngineSettings, SamplingParams
from tael.engine.batch import StepBatch
from tael.engine.params import SamplingParams as Params
from tael.engine.runner import TorchRunner
from tael.engine.sampling import SamplerState, distribution
from tael.engine.speculative import Draft, Governor, NgramDrafter, verify
from tael.model import ModelConfig, Transformer, build_model

from .conftest import GQA, MLA, random_model

MODELS = {
    "mla-1": (replace(MLA, num_nextn_predict_layers=1), "mtp"),
    "mla-2": (replace(MLA, num_nextn_predict_layers=2), "mtp"),
    "mla-3": (replace(MLA, num_nextn_predict_layers=3, num_hidden_layers=1), "mtp"),
    "mla-ngram": (MLA, "ngram"),
    "gqa-ngram": (GQA, "ngram"),
}


@pytest.fixture(scope="module", params=list(MODELS))
def drafted(request: pytest.FixtureRequest) -> tuple[Transformer, dict[str, object]]:
    config, drafter = MODELS[request.param]
    return random_model(config), {"speculate": "on", "drafter": drafter, "block_size": 4}


def prompts_of(count: int, seed: int, longest: int = 24) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(12) for _ in range(generator.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_greedy_is_plain_greedy(drafted: tuple[Transformer, dict], depth: int) -> None:
    """Stop tokens and limits in the middle of a draft, in a batch where some requests are sampled."""
    model, options = drafted
    prompts = prompts_of(8, seed=depth)
    params = [SamplingParams(3 + 5 * i, 0.0 if i % 3 else 0.9, seed=i, stop_ids=(7, 8)) for i in range(8)]
    plain = Engine(model).generate(prompts, params)
    engine = Engine(model, **options, draft_tokens=depth)
    found = engine.generate(prompts, params)
    for i, (mine, theirs) in enumerate(zip(found, plain, strict=True)):
        if i % 3:
            assert (mine.tokens, mine.finish_reason) == (theirs.tokens, theirs.finish_reason)
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert len(mine.tokens) <= params[i].max_tokens and len(mine.logprobs) == len(mine.tokens)
    stats = engine.stats
    assert stats.drafted_tokens == sum(c.drafted_tokens for c in found) > 0
    assert stats.accepted_tokens == sum(c.accepted_tokens for c in found) <= stats.drafted_tokens
    engine.pool.scheduler.check_integrity()


def test_right_drafts_save_steps() -> None:
    """A model that counts to eight over and over: prompt lookup is always right, four tokens a step."""
    model = build_model(GQA)  # residual outputs are zero: only the token before decides
    with torch.no_grad():
        model.lm_head.weight.zero_()
        for token in range(8):
            model.lm_head.weight[(token + 1) % 8] = model.embed_tokens.weight[token]
    engine = Engine(model, speculate="on", draft_tokens=3)
    completion = engine.generate([list(range(8)) * 2], SamplingParams(40, 0.0))[0]
    assert completion.tokens == list(range(8)) * 5
    assert completion.accepted_tokens == completion.drafted_tokens > 0
    assert engine.stats.steps == 11 and engine.stats.acceptance == 1.0


# ------------------------------------------------------------------ the law


LIMITS = {7: 24.3, 15: 37.7, 63: 103.4}  # chi-square exceeds it once in a thousand, by degrees of freedom


def chi_square(found: torch.Tensor, probability: torch.Tensor) -> float:
    expected = probability.double() * found.sum()
    seen = expected > 0
    assert not found[~seen].any()
    return float(((found - expected)[seen] ** 2 / expected[seen]).sum())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5, "top_p": 0.8},
        {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    ],
)
@pytest.mark.parametrize("point", [False, True])
def test_verification_keeps_the_law(options: dict, point: bool) -> None:
    """Joint of two tokens over many seeds, with drafts from a law of their own, or certain ones."""
    generator = torch.Generator().manual_seed(3)
    logits = 1.5 * torch.randn(3, 8, generator=generator)
    guess = logits[:2] + torch.randn(2, 8, generator=generator)
    found = torch.zeros(8, 8)
    count = 900
    for seed in range(count):
        state = SamplerState(Params(8, seed=seed, **options), [1, 2, 2])
        draft = Draft()
        for row in guess:
            law = distribution(row, state)
            token = 5 if point else int(torch.multinomial(law, 1, generator=generator))
            draft.tokens.append(token)
            draft.laws.append(None if point else law)
            state.accept(token)
        state.rollback(2)
        tokens = []
        for verified in verify(draft, logits, state):
            tokens.append(verified.token)
            state.accept(verified.token)
        if len(tokens) == 1:  # rejected at once: the second is drawn in the next step, from the law after the first
            law = distribution(logits[1], state)
            tokens.append(int(torch.multinomial(law, 1, generator=generator)))
        found[tokens[0], tokens[1]] += 1
    state = SamplerState(Params(8, **options), [1, 2, 2])
    first = distribution(logits[0], state)
    joint = torch.zeros(8, 8, dtype=torch.float64)
    for token in range(8):
        state.accept(token)
        joint[token] = first[token] * distribution(logits[1], state)
        state.rollback(1)
    degrees = int((joint > 0).sum()) - 1
    assert chi_square(found, joint) < degrees + 4.5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(("kind", "depth"), [("mla-1", 1), ("mla-2", 3), ("gqa-ngram", 2)])
def test_sampled_law_of_the_engine(kind: str, depth: int) -> None:
    """Three tokens of a model with a vocabulary of 4, over many seeds: the same joint law as the model's own."""
    config, drafter = MODELS[kind]
    config = replace(config, vocab_size=4)
    model = random_model(config, seed=5)
    prompt = [1, 2, 3, 1, 2]
    count = 1500
    engine = Engine(model, speculate="on", drafter=drafter, draft_tokens=depth, block_size=4)
    completions = engine.generate([prompt] * count, SamplingParams(4, 1.3, seed=17))
    assert engine.stats.accepted_tokens > 0 and engine.stats.accepted_tokens < engine.stats.drafted_tokens
    found = torch.zeros(4, 4, 4)
    for completion in completions:
        found[tuple(completion.tokens[1:4])] += 1
    law = torch.zeros(4, 4, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        rows = [[*prompt, *rest] for rest in product(range(4), repeat=3)]
        probability = (model(torch.tensor(rows)) / 1.3).softmax(-1)[:, len(prompt) - 1 :].double()  # [64, 4, V]
    for row, rest in zip(probability, product(range(4), repeat=3), strict=True):
        law[rest] = row[0, rest[0]] * row[1, rest[1]] * row[2, rest[2]] * row[3]
    assert chi_square(found, law.sum(0)) < LIMITS[63]


# ------------------------------------------------------------ MTP and its cache


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_drafting_states_are_the_trainers(modules: int) -> None:
    """Pieces through the paged cache, in both forms, against `mtp_features` over the whole sequence."""
    model = random_model(replace(MLA, num_nextn_predict_layers=modules))
    runner = TorchRunner(model, 12, 4)
    tokens = torch.randint(0, 64, (25,), generator=torch.Generator().manual_seed(1)).tolist()
    table = [3, 7, 1, 9, 2, 11, 5]
    with torch.no_grad():
        hidden = model.features(torch.tensor([tokens])).hidden[0]
        wanted = model.mtp_features(hidden[None, : 25 - modules], torch.tensor([tokens]))
    states = hidden
    for module in range(1, modules + 1):
        found, start = [], module
        for size, expanded in ((5, True), (1, False), (3, False), (6, True), (30, False)):
            piece = tokens[start : start + size]
            batch = StepBatch.build([(piece, start, table, expanded)])
            # states[i] belongs to slot i + module - 1; token `start` follows slot start - 1
            found.append(runner.draft(module, batch, states[start - module : start - module + len(piece)]))
            start += len(piece)
        states = torch.cat(found)
        reference = wanted[module - 1].hidden[0]
        torch.testing.assert_close(states[: len(reference)], reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("modules", [1, 2, 3])
def test_drafts_after_a_shared_prefix_are_the_same(modules: int) -> None:
    """A conversation's next turn, its beginning taken from the cache, drafts what it would have without."""
    model = random_model(replace(MLA, num_nextn_predict_layers=modules))
    options = {"speculate": "on", "draft_tokens": 3, "block_size": 4, "cache_tokens": 200}
    first, more = prompts_of(2, seed=9)
    params = SamplingParams(14, 0.0)
    warm, cold = Engine(model, **options), Engine(model, **options)
    answer = warm.generate([first], params)[0].tokens
    for prompt in ([*first, *answer, *more], [*first, *more]):
        found = warm.generate([prompt], params)[0]
        wanted = cold.generate([prompt], params)[0]
        cold.pool.blocks.clear()
        assert found.cached_tokens > 0 and wanted.cached_tokens == 0
        assert found.tokens == wanted.tokens
        assert (found.drafted_tokens, found.accepted_tokens) == (wanted.drafted_tokens, wanted.accepted_tokens)


def test_speculation_with_preemption(drafted: tuple[Transformer, dict]) -> None:
    """A cache too small for all: sequences give way and are computed again, and say the same."""
    model, options = drafted
    prompts, params = prompts_of(6, seed=4), SamplingParams(24, 0.0)
    engine = Engine(model, **options, draft_tokens=2, cache_tokens=88)
    found = engine.generate(prompts, params)
    plain = Engine(model).generate(prompts, params)
    assert [c.tokens for c in found] == [c.tokens for c in plain]
    assert engine.stats.preemptions > 0


# -------------------------------------------------------------- prompt lookup


class Stub:
    """A sequence, as the drafter sees it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.lists(st.integers(0, 3), max_size=12))
def test_lookup_finds_the_longest_and_latest(start: list[int], later: list[int]) -> None:
    drafter, stub = NgramDrafter(3), Stub(list(start))
    for token in [None, *later]:
        if token is not None:
            stub.tokens.append(token)
        tokens, wanted = stub.tokens, None
        for size in (3, 2, 1):
            ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[-size:]]
            if ends and size < len(tokens):
                wanted = max(ends)
                break
        assert drafter._match(stub) == wanted  # type: ignore[arg-type]


def test_governor_keeps_the_faster_way() -> None:
    for pays in (True, False):
        governor = Governor()
        modes = []
        for _ in range(3 * (Governor.HOLD + 2 * Governor.WINDOW)):
            modes.append(governor.drafting)
            governor.record(1.0 if governor.drafting == pays else 2.0, 1)
        share = modes.count(True) / len(modes)
        assert (share > 0.9) if pays else (share < 0.1)


def test_auto_gives_the_same_tokens(drafted: tuple[Transformer, dict]) -> None:
    model, options = drafted
    prompts, params = prompts_of(3, seed=6), SamplingParams(60, 0.0)
    found = Engine(model, **{**options, "speculate": "auto"}, draft_tokens=2).generate(prompts, params)
    assert [c.tokens for c in found] == [c.tokens for c in Engine(model).generate(prompts, params)]


def test_off_is_the_default() -> None:
    assert EngineSettings().speculate == "off"
    assert ModelConfig().num_nextn_predict_layers == 0
