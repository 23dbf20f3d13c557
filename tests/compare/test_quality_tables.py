"""The fitted lines of bench/cost_to_quality.py, against numpy's and against laws that are known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy
import pytest

from tael.compare import Curve, Point

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from quality_tables import crossing, power_law, scaling_table


def ended(name: str, seconds: float, bits: float) -> Curve:
    points = tuple(
        Point(step=step, tokens=step, flops=step, seconds=seconds * share, bits_per_byte=bits + more)
        for step, share, more in ((1, 0.5, 0.2), (2, 1.0, 0.0))
    )
    return Curve(
        name=name, seed=0, setup="s", clock="processor", threads=1, parameters_total=1, parameters_active=1,
        cache_bytes_per_token=1, flops_per_token=1.0, points=points,
    )  # fmt: skip


def test_the_line_is_numpys() -> None:
    ends = [(8.0, 2.04), (43.0, 1.83), (245.0, 1.67)]
    slope, offset = numpy.polyfit(*numpy.log(numpy.array(ends)).T, 1)
    a, b = power_law([ended("c", *end) for end in ends])
    assert (a, b) == pytest.approx((math.exp(offset), -slope))


def test_lines_cross_where_they_are_equal() -> None:
    one, other = (2.5, 0.07), (2.3, 0.05)
    seconds = crossing(one, other)
    assert seconds is not None
    assert one[0] * seconds ** -one[1] == pytest.approx(other[0] * seconds ** -other[1])
    assert crossing((2.5, 0.07), (2.3, 0.07)) is None


def test_the_ladder_compares_equal_sizes() -> None:
    """Half way between evaluations, and never reached."""
    scaled = {
        "meta": [ended("meta", 100.0, 2.0), ended("meta", 400.0, 1.8)],
        "tael": [ended("tael", 20.0, 1.9), ended("tael", 80.0, 1.85)],
    }
    table, _ = scaling_table(scaled, ["1 x 128", "2 x 192"])
    ends = [(row[0], *row[-2:]) for row in table["rows"]]
    assert ends[2:] == [("tael, 1 x 128", "15", "6.7"), ("tael, 2 x 192", "not reached", "")]
