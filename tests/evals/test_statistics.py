from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.evals.statistics import Accuracy, Spread, wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_holds_the_share_and_is_symmetric(counts: tuple[int, int]) -> None:
    correct, total = counts
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low))
    wider = wilson_interval(correct, total, confidence=0.99)
    assert wider[0] <= low and wider[1] >= high
    # The ends are where the score test is just met: (p - end)^2 = z^2 end (1 - end) / n.
    for end in (low, high):
        assert (correct / total - end) ** 2 == pytest.approx(1.959963985**2 * end * (1 - end) / total, abs=1e-9)


def test_impossible_counts_are_refused() -> None:
    for correct, total in ((-1, 3), (4, 3), (0, -1)):
        with pytest.raises(ValueError, match="0 to total"):
            Accuracy(correct, total)
        with pytest.raises(ValueError, match="0 to total"):
            wilson_interval(correct, total)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=1.0)


def test_accuracy() -> None:
    accuracy = Accuracy(66, 200)
    assert accuracy.share == 0.33
    assert accuracy.as_dict() == {"correct": 66, "total": 200}
    assert Accuracy(**accuracy.as_dict()) == accuracy
    assert accuracy + Accuracy(1, 2) == Accuracy(67, 202)
    assert str(accuracy) == "33.0% (66/200, 95%: 26.9 to 39.8)"


def test_nothing_counted() -> None:
    assert Accuracy(0, 0).share == 0.0
    assert Accuracy(0, 0).interval() == (0.0, 1.0)
    assert str(Accuracy(0, 0)) == "- (0/0)"


def test_spreads_by_hand() -> None:
    assert Spread.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.extremes([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.quartiles([2.0]) == Spread.extremes([2.0]) == Spread(2.0, 2.0, 2.0)
