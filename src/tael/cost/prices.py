"""Money and energy from time: the two sums every cost line rests on."""

from __future__ import annotations


def dollars(seconds: float, per_hour: float) -> float:
    """Price in dollars of `seconds` on a machine that costs `per_hour` dollars an hour."""
    return seconds / 3600.0 * per_hour


def energy(seconds: float, watts: float | None) -> float | None:
    """Joules drawn in `seconds` at an average of `watts`; None when the draw is not known."""
    return None if watts is None else seconds * watts
