"""Any schedule gives the same tokens: requests come, go, wait, give way and share, in a cache of any size."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tael.engine import Engine, SamplingParams, Sequence
from tael.engine.blocks import BlockManager
from tael.engine.sampling import SamplerState
from tael.engine.scheduler import Scheduler
from tael.engine.watch import Watch
from tael.model import Transformer

from .conftest import GQA, MLA, random_model

MODELS = {"mla": MLA, "gqa": GQA, "mtp": replace(MLA, num_nextn_predict_layers=1, num_hidden_layers=2)}


@cache
def model_of(name: str) -> Transformer:
    return random_model(MODELS[name])


@cache
def alone(name: str, prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    """What one request says with nobody else there."""
    return tuple(Engine(model_of(name)).generate([list(prompt)], [params])[0].tokens)


def prompt_of(number: int) -> list[int]:
    """Prompts of 1 to 25 tokens that share beginnings of several lengths."""
    generator = random.Random(number // 3)
    whole = [generator.randrange(64) for _ in range(25)]
    own = random.Random(number)
    return whole[: own.randint(1, 20)] + [own.randrange(64) for _ in range(own.randint(0, 5))] or [1]


submit = st.tuples(st.just("submit"), st.integers(0, 11), st.integers(1, 14), st.booleans(), st.integers(0, 2))
cancel = st.tuples(st.just("cancel"), st.integers(0, 99))
step = st.tuples(st.just("step"), st.integers(1, 4))
actions = st.lists(st.one_of(submit, submit, step, step, cancel), min_size=3, max_size=22)
shapes = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 4, 5]),
        "cache_tokens": st.sampled_from([40, 48, 80, 400]),
        "max_batch": st.integers(1, 5),
        "extra_budget": st.sampled_from([0, 3, 40]),
        "prefix_cache": st.sampled_from(["all", "prompts", "off"]),
    }
)


def play(name: str, shape: dict[str, Any], todo: list[tuple], **options: Any) -> Engine:
    shape = dict(shape)
    budget = shape["max_batch"] + shape.pop("extra_budget")
    engine = Engine(model_of(name), token_budget=budget, **shape, **options)
    requests: list[tuple[Sequence, tuple[int, ...]]] = []
    heard: dict[Sequence, list[int]] = {}

    def advance() -> None:
        for event in engine.step():
            assert event.sequence is not None
            heard.setdefault(event.sequence, []).append(event.token)
        engine.pool.scheduler.check_integrity()

    for action in todo:
        if action[0] == "submit":
            _, number, length, greedy, salt = action
            prompt = prompt_of(number)
            params = SamplingParams(length, 0.0 if greedy else 1.0, seed=number, stop_ids=(number,))
            if options:
                params = replace(params, temperature=0.0)
            sequence = engine.submit(prompt, params, salt=salt or None)
            requests.append((sequence, alone(name, tuple(prompt), params)))
        elif action[0] == "cancel" and requests:
            engine.cancel(requests[action[1] % len(requests)][0])
            engine.pool.scheduler.check_integrity()
        elif action[0] == "step":
            for _ in range(action[1]):
                advance()
    for _ in range(2000):
        if not engine.busy:
            break
        advance()
    assert not engine.busy
    for sequence, wanted in requests:
        found = tuple(sequence.output)
        assert heard.get(sequence, []) == sequence.output
        if sequence.finish_reason == "cancelled":
            assert found == wanted[: len(found)]
        else:
            assert found == wanted and sequence.finish_reason in ("stop", "length")
    assert engine.pool.blocks.available == engine.pool.blocks.usable
    return engine


quick = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", ["mla", "gqa"])
@quick
@given(shape=shapes, todo=actions)
def test_schedules(name: str, shape: dict[str, Any], todo: list[tuple]) -> None:
    play(name, shape, todo)


@pytest.mark.parametrize("name", ["mtp", "gqa"])
@settings(quick, max_examples=20)
@given(shape=shapes, todo=actions, depth=st.integers(1, 3))
def test_schedules_with_speculation(name: str, shape: dict[str, Any], todo: list[tuple], depth: int) -> None:
    play(name, shape, todo, speculate="on", draft_tokens=depth)


def test_the_small_caches_do_preempt() -> None:
    todo = [("submit", i, 14, False, 0) for i in range(12)]
    shape = {"block_size": 4, "cache_tokens": 40, "max_batch": 5, "extra_budget": 9, "prefix_cache": "all"}
    assert play("mla", shape, todo).stats.preemptions > 0


# ------------------------------------------------------------- the scheduler


def sequence(number: int, prompt: list[int], length: int = 5) -> Sequence:
    params = SamplingParams(length)
    return Sequence(len(prompt), list(prompt), params, number, SamplerState(params, prompt), Watch(params))


def advance(scheduler: Scheduler, plan: list, token: int | None = 1) -> None:
    for work in plan:
        if work.samples:
            work.sequence.tokens.append(token)
        scheduler.advance(work.sequence, work.stop)
    scheduler.check_integrity()


def test_decoding_comes_first_and_prompts_fill_the_budget() -> None:
    scheduler = Scheduler(BlockManager(50, 4), 8, 10)
    first, long = sequence(0, [1] * 6), sequence(1, list(range(30)))
    scheduler.add(first)
    scheduler.add(long)
    plan = scheduler.schedule()
    assert [(w.sequence, w.start, w.stop, w.samples) for w in plan] == [(first, 0, 6, True), (long, 0, 4, False)]
    advance(scheduler, plan)
    plan = scheduler.schedule()
    assert [(w.sequence, w.start, w.stop) for w in plan] == [(first, 6, 7), (long, 4, 13)]
    assert [w.expanded for w in plan] == [False, True]


def test_a_replayed_piece_ends_where_the_prompt_ends() -> None:
    scheduler = Scheduler(BlockManager(50, 4), 8, 100, "off")
    one = sequence(0, [1] * 6)
    scheduler.add(one)
    for _ in range(3):
        advance(scheduler, scheduler.schedule())
    scheduler.preempt(one)
    scheduler.check_integrity()
    plan = scheduler.schedule()
    assert [(w.start, w.stop, w.expanded, w.samples) for w in plan] == [(0, 6, True, False)]
    advance(scheduler, plan)
    plan = scheduler.schedule()
    assert [(w.start, w.stop, w.expanded, w.samples) for w in plan] == [(6, 9, False, True)]


def test_the_youngest_gives_way() -> None:
    scheduler = Scheduler(BlockManager(7, 2), 8, 100, "off")
    old, young = sequence(0, [1] * 4, 8), sequence(1, [2] * 4, 8)
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(3):
        advance(scheduler, scheduler.schedule())
    advance(scheduler, scheduler.schedule())
    assert (old.state, young.state, young.preemptions, scheduler.preemptions) == ("running", "waiting", 1, 1)
    scheduler.finish(old)
    advance(scheduler, scheduler.schedule())
    assert young.state == "running" and young.computed == 4


def test_equal_prompts_wait_for_the_first() -> None:
    """Eight samples of one prompt: it is read once."""
    scheduler = Scheduler(BlockManager(90, 4), 8, 100)
    group = [sequence(i, list(range(14))) for i in range(8)]
    for one in group:
        scheduler.add(one)
    plan = scheduler.schedule()
    assert [w.sequence for w in plan] == group[:1]
    advance(scheduler, plan)
    plan = scheduler.schedule()
    assert [(w.sequence.arrival, w.start) for w in plan] == [(0, 14), *((i, 12) for i in range(1, 8))]
    assert [s.cached for s in group] == [0] + [12] * 7


def test_drafts_never_cost_anybody_a_place() -> None:
    scheduler = Scheduler(BlockManager(6, 2), 4, 6, "off")
    one, two = sequence(0, [1] * 3, 9), sequence(1, [2] * 3, 9)
    for s in (one, two):
        scheduler.add(s)
    advance(scheduler, scheduler.schedule())
    plan = scheduler.schedule(lambda _: 3)
    assert [(w.sequence, w.drafts) for w in plan] == [(one, 0), (two, 0)]  # one block is left, drafts need two
    assert not scheduler.preemptions


def test_clients_with_a_common_beginning_read_it_once() -> None:
    """Arriving together, in one step's budget: the first reads, the others wait a step and find its blocks."""
    model = random_model(GQA)
    common = [(7 * i) % 60 for i in range(16)]
    prompts = [[*common, i, i + 1, i + 2] for i in range(6)]
    engine = Engine(model, block_size=4, token_budget=512)
    together = engine.generate(prompts, SamplingParams(4, temperature=0.0))
    assert engine.stats.cached_tokens == 5 * 16
    for prompt, found in zip(prompts, together, strict=True):
        assert found.tokens == Engine(model).generate([prompt], SamplingParams(4, temperature=0.0))[0].tokens
