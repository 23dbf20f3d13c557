"""Measurements give plausible, positive numbers; no timing is asserted."""

from __future__ import annotations

import ctypes

import numpy
import psutil
import pytest
import torch

from tael.cost import units
from tael.cost.measure import give_back_memory, matrix_peak, peak_memory_bytes, read_bandwidth, reset_peak_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_peak_is_positive_and_draws_nothing(dtype):
    state = torch.get_rng_state()
    assert 1e7 < matrix_peak("cpu", dtype) < 1e16
    assert torch.equal(state, torch.get_rng_state())


def test_read_bandwidth_is_positive():
    assert 1e7 < read_bandwidth() < 1e14


def test_peak_memory_sees_an_allocation_and_can_start_again():
    if not reset_peak_memory():
        pytest.skip("this system cannot reset the peak")
    before = peak_memory_bytes()
    block = numpy.ones(200_000_000, dtype=numpy.uint8)
    assert peak_memory_bytes() > before + 150_000_000
    del block
    reset_peak_memory()
    assert peak_memory_bytes() < before + 150_000_000


def test_free_pieces_between_pieces_in_use_are_given_back():
    if not reset_peak_memory() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this system's malloc keeps its own counsel")
    pieces = [bytes(100_000) for _ in range(2000)]
    in_use = pieces[::50]
    before = psutil.Process().memory_info().rss
    pieces.clear()
    give_back_memory()
    assert psutil.Process().memory_info().rss < before - 120_000_000
    assert len(in_use) == 40


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (units.count(1_234_567), "1.23M"),
        (units.count(999_999), "1.00M"),
        (units.count(12), "12"),
        (units.flops(3.2e15), "3.20P"),
        (units.size(1_430_000_000), "1.43 GB"),
        (units.duration(564), "9.4 min"),
        (units.duration(5), "5.0 s"),
        (units.duration(2 * 86400 * 5), "10.0 d"),
        (units.money(0.01234), "$0.012"),
        (units.money(5_576_000), "$5,576,000"),
        (units.money(1.5), "$1.50"),
        (units.money(0.0027), "$0.0027"),
        (units.energy(19_800, estimated=True), "~5.50 Wh"),
        (units.percent(0.021), "2.1%"),
        (units.percent(None), "–"),
    ],
)
def test_units(shown, wanted):
    assert shown == wanted
