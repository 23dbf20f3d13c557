"""Serving: DeepSeek's published day, laws, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.cost.chips import find_chip
from tael.cost.named import MODELS, find_model
from tael.cost.plan_request import Request
from tael.cost.serving import Service, plan_serving
from tael.cost.serving_day import DAY, DayInputs, day_of_serving, sensitivities
from tael.errors import TaelError

V3 = Service(find_model("deepseek-v3").shape, find_chip("H800"), 144, 4989.0, 21.0)


def test_the_published_day_from_its_inputs() -> None:
    for name, reported, predicted in day_of_serving().compared(DAY):
        assert predicted == pytest.approx(reported, rel=0.2), name


def test_the_revenue_is_arithmetic() -> None:
    assert day_of_serving().revenue == pytest.approx(562_027, rel=1e-3)
    assert DAY.cost == pytest.approx(226.75 * 8 * 24 * 2, rel=1e-3)


def test_the_price_of_the_chip_matters_most() -> None:
    moved = sensitivities()
    assert [name for name, _, _ in moved[:2]] == ["device hour", "occupancy"]
    spans = [abs(high - low) for _, low, high in moved]
    assert spans == sorted(spans, reverse=True)


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(1.0, 4.0), part=st.sampled_from(["memory_bandwidth", "network_bandwidth", "memory_bytes"]))
def test_a_better_chip_never_serves_fewer(factor: float, part: str) -> None:
    better = replace(V3, chip=replace(V3.chip, **{part: getattr(V3.chip, part) * factor}))
    # whole readers: a batch may grow by less than one, so the rate may fall by a rounding of the step
    assert plan_serving(better).decode_rate >= plan_serving(V3).decode_rate * (1 - 2 / plan_serving(V3).batch)


@settings(max_examples=15, deadline=None)
@given(low=st.floats(512, 8192), more=st.floats(1.0, 4.0))
def test_longer_contexts_never_serve_more(low: float, more: float) -> None:
    short, long = replace(V3, context=low), replace(V3, context=low * more)
    assert plan_serving(long).batch <= plan_serving(short).batch


def test_readers_get_their_speed() -> None:
    for speed in (10.0, 21.0, 40.0):
        plan = plan_serving(replace(V3, tokens_per_second=speed))
        assert 1 / plan.step_seconds >= speed
    assert plan_serving(replace(V3, tokens_per_second=10.0)).batch > plan_serving(V3).batch


def test_a_dense_model_shares_its_readers() -> None:
    dense = Service(find_model("llama-3.1-8b").shape, find_chip("H100"), 8, precision="bf16")
    plan, mixed = plan_serving(dense), plan_serving(V3)
    assert plan.readers == plan.batch and mixed.readers == 144 * mixed.batch
    for each in (plan, mixed):
        assert each.decode_rate * each.service.devices == pytest.approx(each.readers / each.step_seconds)


def test_cost_is_price_over_rate() -> None:
    plan = plan_serving(replace(V3, occupancy=1.0))
    cost_in, cost_out = plan.dollars_per_million(2.0, hit_rate=0.5)
    assert cost_out == pytest.approx(2.0 / 3600 * 1e6 / plan.decode_rate)
    assert cost_in == pytest.approx(2.0 / 3600 * 1e6 / plan.prefill_rate / 2)
    assert plan_serving(V3).dollars_per_million(2.0)[1] == pytest.approx(cost_out / V3.occupancy)


def test_mtp_makes_one_reader_faster() -> None:
    one = replace(V3, tokens_per_second=60.0)
    assert plan_serving(replace(one, drafted=0.85)).batch > plan_serving(one).batch


def test_what_cannot_be_served() -> None:
    with pytest.raises(TaelError, match=r"does not fit 1 H800.*--chips"):
        plan_serving(replace(V3, devices=1))
    with pytest.raises(TaelError, match="gives one reader"):
        plan_serving(replace(V3, tokens_per_second=1e6))
    with pytest.raises(TaelError, match="at least one device"):
        plan_serving(replace(V3, devices=0))
    with pytest.raises(TaelError, match="above 0"):
        plan_serving(replace(V3, context=0.0))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_named_model_has_a_serving_plan(name: str) -> None:
    answer = Request(name, chips=1024, chip="H100").answer()
    assert answer["serving"], answer["serving_note"]
    assert answer["serving"]["decode_tokens_per_second_per_device"] > 0


def test_a_dearer_day_has_a_smaller_margin() -> None:
    assert day_of_serving(DayInputs(device_hour=4.0)).margin < day_of_serving().margin
