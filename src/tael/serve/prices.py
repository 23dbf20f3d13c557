"""What a request costs: prompt tokens found in the cache, prompt tokens computed, tokens written."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from tael.errors import TaelError

_MOST = 1e15
"""Above every count of tokens and every price: what is larger is a mistake, and could overflow a product."""


@dataclass(frozen=True)
class Cost:
    """Dollars, by the three things that are paid for."""

    hit: float
    miss: float
    output: float

    @property
    def total(self) -> float:
        return self.hit + self.miss + self.output


@dataclass(frozen=True)
class Price:
    """Dollars a million tokens. Raises TaelError for what is negative, or no number."""

    hit: float
    """Prompt tokens that were in the prefix cache."""
    miss: float
    """Prompt tokens that were not."""
    output: float
    """Tokens written, thoughts among them."""

    def __post_init__(self) -> None:
        for name in ("hit", "miss", "output"):
            _check(f"price of {name} tokens", getattr(self, name))

    @classmethod
    def parse(cls, text: str) -> Price:
        """The price that "HIT/MISS/OUTPUT" names; `str` writes it so. Raises TaelError for anything else."""
        try:
            hit, miss, output = map(float, text.split("/"))
        except ValueError:
            raise TaelError(
                f"price '{text}': give HIT/MISS/OUTPUT in dollars a million tokens, such as {DEFAULT_PRICE}"
            ) from None
        return cls(hit, miss, output)

    def __str__(self) -> str:
        return "/".join(map(str, astuple(self)))

    def cost(self, hit_tokens: int, miss_tokens: int, output_tokens: int) -> Cost:
        """What these tokens cost. Raises TaelError for negative counts."""
        counts = {"hit": hit_tokens, "miss": miss_tokens, "output": output_tokens}
        for name, tokens in counts.items():
            _check(f"number of {name} tokens", tokens)
        return Cost(*(tokens * getattr(self, name) / 1e6 for name, tokens in counts.items()))


def _check(what: str, value: float) -> None:
    if not 0 <= value <= _MOST:  # false for nan too
        raise TaelError(f"{what} is {value}; it must be 0 or more, and finite")


DEFAULT_PRICE = Price(hit=0.028, miss=0.28, output=0.42)
"""DeepSeek's own list price for V3.2 chat, as published on 2025-09-29."""
