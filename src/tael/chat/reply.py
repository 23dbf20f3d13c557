"""What an answer took: tokens, seconds, dollars, in one line."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tael.cost.prices import dollars
from tael.engine import TokenEvent

ENDINGS = {
    "length": "cut off by the token limit",
    "loop": "ended because it repeated itself",
    "cancelled": "stopped",
}


@dataclass
class Reply:
    """One answer's figures. `seconds` run from the question to the last token; `first` to the first one."""

    tokens: int = 0
    thought_tokens: int = 0
    seconds: float = 0.0
    first: float = 0.0
    thought_seconds: float = 0.0
    prompt: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    ending: str | None = None
    """The engine's finish_reason."""
    _began: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def cut(self) -> bool:
        """Whether the token limit ended it."""
        return self.ending == "length"

    @property
    def rate(self) -> float:
        """Tokens a second once the first was there; over all where there is but one. 0 when unknown."""
        after = self.seconds - self.first
        if self.tokens > 1 and after > 0:
            return (self.tokens - 1) / after
        return self.tokens / self.seconds if self.seconds else 0.0

    def follow(self, events: Iterable[TokenEvent]) -> Iterator[TokenEvent]:
        """Pass the events of the answer on, counting."""
        for event in events:
            self.seconds = time.perf_counter() - self._began
            self.tokens += event.token >= 0
            self.first = self.first or self.seconds
            self.ending = event.finish_reason
            if event.sequence is not None:
                sequence = event.sequence
                self.prompt, self.cached = sequence.prompt_length, sequence.cached
                self.drafted, self.accepted = sequence.drafted, sequence.accepted
            yield event

    def figures(self, dollars_per_hour: float) -> dict[str, float | int]:
        """The figures for --json."""
        return {
            "seconds": round(self.seconds, 6),
            "first_token_seconds": round(self.first, 6),
            "tokens_per_second": round(self.rate, 3),
            "prompt_tokens": self.prompt,
            "cached_tokens": self.cached,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "dollars": dollars(self.seconds, dollars_per_hour),
        }

    def line(self, dollars_per_hour: float) -> str:
        """The figures in a line."""
        parts = [f"{self.tokens} token{'s' * (self.tokens != 1)}"]
        if self.seconds:
            parts += [f"{rounded(self.rate)} tok/s", f"first after {duration(self.first)}"]
        if self.cached:
            parts.append(f"{self.cached} of {self.prompt} prompt tokens cached")
        if self.drafted:
            parts.append(f"{self.accepted} of {self.drafted} drafts kept")
        parts.append(money(dollars(self.seconds, dollars_per_hour)))
        return ", ".join(parts) + (f"; {ENDINGS[self.ending]}" if self.ending in ENDINGS else "")


def rounded(value: float) -> str:
    """Three digits are enough: 1,234 or 61.3 or 0.52."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """0.12 s, 7.3 s, 48 s, 3 min 5 s."""
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def money(amount: float) -> str:
    """Two significant digits, never in powers of ten: $0.0000021, $1.40."""
    if amount >= 1 or amount <= 0:
        return f"${amount:,.2f}"
    places = 2
    while amount < 9.5 * 10**-places and places < 12:
        places += 1
    return f"${amount:.{places}f}"
