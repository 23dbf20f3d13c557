"""The filters top_k, top_p and min_p, and the draw from what they leave."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tael.engine.params import SamplingParams
from tael.errors import TaelError

NO_TOKEN = "no token is left to choose: the logits are not finite, or every token is barred"

_FLOORS = (math.log(1e-4), math.log(3e-6), math.log(1e-7), -math.inf)
"""Log-probabilities above which to look for the survivors: mostly a few hundred of 129,280 tokens, so that sorting
them all (0.7 to 11 ms) is the exception. Where a floor has cut too high, the next is tried; as floors cut by value,
the result is the same as from sorting everything."""


def survivors(logprobs: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens [m], ascending, that top_k, then top_p, then min_p leave, and their probabilities [m].

    logprobs [V] fp32. As in transformers: ties of the k-th token all stay; top_p is of the mass that top_k leaves and
    keeps the token that reaches it (of tokens as likely as that one, those with the lowest ids). Raises TaelError
    when no token has a probability.
    """
    if not logprobs.max() > -math.inf:
        raise TaelError(f"sampling: {NO_TOKEN}")
    top_k = params.top_k if params.top_k < len(logprobs) else 0
    likeliest = float(logprobs.max())
    lowest = likeliest + math.log(params.min_p) if params.min_p else -math.inf  # what min_p alone would leave
    for floor in _FLOORS:
        last = floor == -math.inf
        ids = np.flatnonzero(logprobs > floor)
        held = logprobs[ids]
        if len(ids) < top_k and not last:
            continue
        if top_k and len(ids) > top_k:
            keep = held >= np.partition(held, len(held) - top_k)[len(held) - top_k]
            ids, held = ids[keep], held[keep]
        weights = np.exp(held)
        if params.top_p < 1:
            keep = _nucleus_of(weights, params.top_p, top_k > 0, last)
            if keep is None:
                continue
            ids, weights = ids[keep], weights[keep]
        elif not top_k and not last and floor > lowest - 0.01:
            continue
        if params.min_p:
            keep = weights >= params.min_p * weights.max()
            ids, weights = ids[keep], weights[keep]
        return ids, weights.astype(np.float64)
    raise AssertionError("the last floor is below every token")


def _nucleus_of(weights: NDArray[np.float32], top_p: float, relative: bool, last: bool) -> NDArray[np.bool_] | None:
    """Which of the likeliest `weights` are the fewest that reach top_p (Holtzman et al. 2020); None: not among these.

    `relative`: top_p of their own sum, else of 1.
    """
    if not (relative or last) and weights.sum(dtype=np.float64) < top_p * (1 - 1e-9):
        return None  # without sorting; the margin is for the order of the sum
    ordered = np.sort(weights)[::-1].astype(np.float64)
    cumulative = np.cumsum(ordered)
    limit = top_p * cumulative[-1] if relative else top_p
    count = int(np.searchsorted(cumulative, limit, side="left")) + 1
    if count > len(weights):
        if not last:
            return None
        count = len(weights)
    cut = ordered[count - 1]
    keep = weights > cut
    ties = np.flatnonzero(weights == cut)
    keep[ties[: count - int(np.count_nonzero(keep))]] = True
    return keep


def draw(ids: NDArray[np.int64] | None, weights: NDArray[np.float64], number: float) -> int:
    """Inverse transform: the first of `ids` (0, 1, ..) whose cumulative share of `weights` passes `number`."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    place = min(place, len(weights) - 1)
    return place if ids is None else int(ids[place])
