"""What a request took of the engine: its share of the steps, the tokens that passed for it, and FLOPs from both."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tael.engine import Engine, SamplingParams
from tael.engine.work import computed_flops, generation_work, sum_work
from tael.model import Transformer
from tael.train.objective import Work


def ask(engine: Engine, prompts: list[list[int]], tokens: int = 6):
    sequences = [
        engine.submit(prompt, SamplingParams(max_tokens=tokens, temperature=1.0, seed=place))
        for place, prompt in enumerate(prompts)
    ]
    while engine.busy:
        engine.step()
    return sequences


def test_shares_of_the_steps_add_up(model: Transformer) -> None:
    engine = Engine(model, max_batch=2, token_budget=8)
    sequences = ask(engine, [list(range(1, 12)), [5, 6, 7], [9] * 20])
    stats = engine.stats
    assert sum(each.seconds for each in sequences) == pytest.approx(stats.prefill_seconds + stats.decode_seconds)
    assert all(each.seconds > 0 for each in sequences)
    for each in sequences:
        assert each.passed == each.prompt_length - each.cached + each.generated - 1


def test_flops_are_those_of_reading_and_writing(model: Transformer) -> None:
    """Without drafts and without having to make room, what passed is what had to."""
    prompt = list(range(1, 34))
    engine = Engine(model, cache_tokens=512)
    first, again = (ask(engine, [prompt])[0] for _ in range(2))
    assert again.cached >= 16 and first.cached == 0
    for each in (first, again):
        counted = generation_work(model.config, each.prompt_length, each.generated, each.cached)
        assert computed_flops(model.config, each) == pytest.approx(counted.flops)
        assert counted.tokens == each.prompt_length - each.cached + each.generated
    assert computed_flops(model.config, again) < computed_flops(model.config, first)


def test_what_was_broken_off_counts_as_far_as_it_came(model: Transformer) -> None:
    engine = Engine(model, token_budget=8, max_batch=2)
    sequence = engine.submit(list(range(1, 40)), SamplingParams(max_tokens=5))
    engine.step()
    engine.cancel(sequence)
    assert sequence.passed == 8 and computed_flops(model.config, sequence) > 0
    whole = generation_work(model.config, 39, 5).flops
    assert computed_flops(model.config, sequence) < whole / 3
    waiting = engine.submit([1, 2, 3], SamplingParams(max_tokens=5))
    engine.cancel(waiting)
    assert computed_flops(model.config, waiting) == waiting.seconds == 0


def test_reading_agrees_with_torchs_count(model: Transformer) -> None:
    if model.config.is_mla:
        pytest.skip("experts are counted in tests/model/test_costs.py")
    tokens = torch.randint(0, 64, (1, 64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    work = generation_work(model.config, 64, 1)
    assert work.tokens == 65 and work.flops == 64 * model.config.flops_per_token(32, training=False)
    # Plain attention is computed on all pairs, of which causal masks half: ours counts 32 keys a token, torch 64.
    assert counter.get_total_flops() == pytest.approx(64 * model.config.flops_per_token(64, training=False), rel=0.03)


def test_several_answers_share_a_prompt(model: Transformer) -> None:
    one, two = generation_work(model.config, 50, 10), generation_work(model.config, 50, 20, answers=2)
    reading = generation_work(model.config, 50, 0).flops
    assert two.flops - reading == pytest.approx(2 * (one.flops - reading))
    assert sum_work([one, two]) == Work(60 + 70, one.flops + two.flops) and sum_work([]) == Work(0, 0)
