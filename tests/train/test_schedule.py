"""The law of the learning rate: up, level, down."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.recipe import ScheduleSettings
from tael.train.schedule import learning_rate_factor


def factors(steps: int, **options) -> list[float]:
    settings = ScheduleSettings(**options)
    return [learning_rate_factor(step, steps, settings) for step in range(steps)]


def test_by_hand() -> None:
    found = factors(10, warmup=0.3, decay=0.4, final=0.0)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert factors(10, warmup=0, decay=0) == [1.0] * 10
    assert factors(4, warmup=0, decay=1, final=0.5) == pytest.approx([1.0, 0.875, 0.75, 0.625])
    cosine = factors(4, warmup=0, decay=1, final=0.0, shape="cosine")
    assert cosine == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)])


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    shape=st.sampled_from(["linear", "cosine"]),
)
def test_law(steps: int, warmup: float, decay: float, final: float, shape: str) -> None:
    """Positive and at most one; never falls in the warm-up, never rises after it."""
    found = factors(steps, warmup=warmup, decay=decay, final=final, shape=shape)
    assert all(0 < value <= 1 for value in found)
    rising = [value for step, value in enumerate(found) if step < warmup * steps]
    falling = found[len(rising) :]
    assert rising == sorted(rising)
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    assert all(value >= final - 1e-12 for value in falling)
