"""Figures with their spread: medians, and shares with Wilson's score interval, the `Accuracy` that reports carry.

An accuracy over 200 problems moves by several points from chance alone; every table says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, median, quantiles


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Wilson score interval for a binomial share (Wilson 1927), without continuity correction.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n); (0, 1) when `total` is 0. Raises ValueError for counts
    that cannot be, or a confidence outside (0, 1).
    """
    if not 0 <= correct <= total:
        raise ValueError(f"correct must be 0 to total, got {correct} of {total}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, z2 = correct / total, z * z / total
    centre = (share + z2 / 2) / (1 + z2)
    half = z * sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    # The ends are exact at 0 and `total`; rounding would leave them 1e-17 off.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


@dataclass(frozen=True)
class Spread:
    """The middle of some values, and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def quartiles(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles: of many rounds of the same. Raises StatisticsError for no values."""
        if len(values) < 2:
            return cls.extremes(values)
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    @classmethod
    def extremes(cls, values: Sequence[float]) -> Spread:
        """Median, least and most: of a few seeds. Raises StatisticsError for no values."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Accuracy:
    """`correct` out of `total`. Raises ValueError unless 0 <= correct <= total."""

    correct: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total:
            raise ValueError(f"correct must be 0 to total, got {self.correct} of {self.total}")

    @property
    def share(self) -> float:
        """Fraction correct in [0, 1]; 0.0 when nothing was counted."""
        return self.correct / self.total if self.total else 0.0

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of the share."""
        return wilson_interval(self.correct, self.total, confidence)

    def as_dict(self) -> dict[str, int]:
        """`{"correct":..,"total":..}`, the form metrics.jsonl and summary.json hold."""
        return {"correct": self.correct, "total": self.total}

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.correct + other.correct, self.total + other.total)

    def __str__(self) -> str:
        """As in `33.0% (66/200, 95%: 26.9 to 39.8)`."""
        if not self.total:
            return "- (0/0)"
        low, high = self.interval()
        return f"{self.share:.1%} ({self.correct}/{self.total}, 95%: {100 * low:.1f} to {100 * high:.1f})"
