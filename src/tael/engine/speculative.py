"""Speculation: a cheap drafter proposes tokens, the model reads them in one pass, and each is kept or replaced so
that what comes out has exactly the model's own law (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023).

A token x drafted with probability q(x) is kept with probability min(1, p(x) / q(x)), p being what would have been
sampled from at that place, with penalties, filters and constraint; else one is drawn from max(p - q, 0), normalised,
and what was drafted after it is dropped. Entries of dropped tokens stay in the cache until they are overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from tael.engine.filters import draw
from tael.engine.sampling import (
    ACCEPT,
    TARGET,
    SamplerState,
    distribution,
    report,
    sample_rows,
)
from tael.engine.scheduler import Work
from tael.engine.sequence import Sequence as Request
from tael.engine.sequence import Top


@dataclass(frozen=True)
class Draft:
    """Proposed tokens; `laws[i]` [V] float64 is what token i was drawn from, None where it was certain."""

    tokens: list[int] = field(default_factory=list)
    laws: list[Tensor | None] = field(default_factory=list)


class Drafter(Protocol):
    """Where drafts come from."""

    def most(self, sequence: Request) -> int:
        """How many tokens it could propose now; 0 for a sequence it knows nothing to say about."""
        ...

    def propose(self, works: Sequence[Work]) -> list[Draft]:
        """At most `work.drafts` tokens for each of `works`."""
        ...

    def observe(self, works: Sequence[Work], hidden: Sequence[Tensor]) -> None:
        """What a pass has computed: hidden [n, D] of each work's first n tokens, those that stay."""
        ...

    def forget(self, sequence: Request) -> None:
        """`sequence` no longer has blocks."""
        ...


@dataclass(frozen=True)
class Verified:
    """A token that joins the output. `drafted`: it is the draft's own."""

    token: int
    logprob: float
    top: Top
    drafted: bool


def verify(draft: Draft, logits: Tensor, state: SamplerState) -> Iterator[Verified]:
    """Tokens that follow, one at least; logits [k + 1, V] fp32 at the last known token and at each drafted one.

    `state` must have accepted each token when the next one is asked for; whoever stops asking ends the verification.
    Raises TaelError as `sample_rows` does.
    """
    for row, token, law in zip(logits, draft.tokens, draft.laws, strict=False):
        if state.params.is_greedy:
            found = sample_rows(row.unsqueeze(0), [state])
            right = found.tokens[0] == token
            yield Verified(found.tokens[0], found.logprobs[0], found.top[0], drafted=right)
            if right:
                continue
            return
        index = state.index
        wanted = distribution(row, state)
        chance = float(wanted[token])
        proposed = 1.0 if law is None else float(law[token])
        if state.uniform(index, ACCEPT) * proposed < chance:
            yield Verified(token, *report(row, state, token), drafted=True)
            continue
        left = wanted.clone()
        if law is None:
            left[token] = 0.0
        else:
            left = (left - law.to(left.device)).clamp_min_(0.0)
        if not float(left.sum()) > 0:  # p and q are equal up to rounding
            left = wanted
        token = draw(None, left.cpu().numpy(), state.uniform(index, TARGET))
        yield Verified(token, *report(row, state, token), drafted=False)
        return
    found = sample_rows(logits[len(draft.tokens) :][:1], [state])
    yield Verified(found.tokens[0], found.logprobs[0], found.top[0], drafted=False)


class NgramDrafter:
    """Prompt lookup (Saxena 2023): what followed the last time the newest 3, 2 or 1 tokens stood somewhere before."""

    LONGEST = 3

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._tables: dict[Request, tuple[dict[tuple[int, ...], int], int]] = {}

    def most(self, sequence: Request) -> int:
        return self._depth if self._match(sequence) is not None else 0

    def propose(self, works: Sequence[Work]) -> list[Draft]:
        drafts = []
        for work in works:
            tokens, start = list(work.sequence.tokens), self._match(work.sequence)
            known = len(tokens)
            if start is not None:
                for place in range(start, start + work.drafts):
                    tokens.append(tokens[place])  # may read what was just proposed: a period goes on
            drafts.append(Draft(tokens[known:], [None] * (len(tokens) - known)))
        return drafts

    def observe(self, works: Sequence[Work], hidden: Sequence[Tensor]) -> None:
        """Nothing to learn from states."""

    def forget(self, sequence: Request) -> None:
        self._tables.pop(sequence, None)

    def _match(self, sequence: Request) -> int | None:
        """Where the continuation of the longest match begins."""
        tokens = sequence.tokens
        table, known = self._tables.get(sequence, ({}, 1))
        for end in range(known, len(tokens)):  # the end of the whole is not yet its own match
            for size in range(1, min(self.LONGEST, end) + 1):
                table[tuple(tokens[end - size : end])] = end
        self._tables[sequence] = table, max(known, len(tokens))
        for size in range(min(self.LONGEST, len(tokens) - 1), 0, -1):
            if (found := table.get(tuple(tokens[-size:]))) is not None:
                return found
        return None


class Governor:
    """Decides by measurement whether drafting pays: seconds a token with it and without, in turns.

    A window of WINDOW decode steps is measured with drafts and one without, then the faster way is kept for HOLD
    steps, and both are measured again. Only what is drafted depends on the clock, never the law of what comes out.
    """

    WINDOW = 12
    HOLD = 240

    def __init__(self) -> None:
        self.drafting = True
        self._left = self.WINDOW
        self._measuring = [True, False]
        self._cost: dict[bool, list[float]] = {True: [0.0, 0.0], False: [0.0, 0.0]}  # seconds, tokens

    def record(self, seconds: float, tokens: int) -> None:
        """A step that only decoded took `seconds` and brought `tokens`."""
        cost = self._cost[self.drafting]
        cost[0], cost[1] = cost[0] + seconds, cost[1] + tokens
        self._left -= 1
        if self._left > 0:
            return
        if self._measuring:
            self._measuring.remove(self.drafting)
            if self._measuring:
                self.drafting, self._left = self._measuring[0], self.WINDOW
                return
            with_drafts, without = (c[0] / max(c[1], 1.0) for c in (self._cost[True], self._cost[False]))
            self.drafting, self._left = with_drafts <= without, self.HOLD
            return
        self._cost = {True: [0.0, 0.0], False: [0.0, 0.0]}
        self._measuring = [self.drafting, not self.drafting]
        self._left = self.WINDOW
