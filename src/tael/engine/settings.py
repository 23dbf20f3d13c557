"""How an engine is set up; refuses contradictions with one line."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from tael.errors import TaelError, did_you_mean

Backend = Literal["auto", "torch", "native"]
Speculate = Literal["off", "auto", "on"]
PrefixCache = Literal["all", "prompts", "off"]
DrafterName = Literal["mtp", "ngram"]

MOST_DRAFTS = 3


@dataclass(frozen=True)
class EngineSettings:
    """Raises TaelError, naming the setting, for what cannot be.

    backend        "torch": the Transformer itself; "native": the C++ runner; "auto": native for quantised models on a
                   CPU where it can be had, else torch
    block_size     slots a block of the cache; prefixes are shared in whole blocks
    cache_tokens   slots of the whole cache, or cache_bytes, its size; None: as many as max_batch sequences of the
                   model's full context need, within half of the memory that is free; a plain engine takes what its
                   first requests need
    max_batch      sequences that run at a time; the others wait
    token_budget   tokens a step: every running sequence's next token first, then prompts in pieces
    prefix_cache   "all": sequences share what they begin with, a reused answer's numbers being equal up to rounding;
                   "prompts": only blocks read as prompts, equal bit for bit to reading them again; "off"
    speculate      "on", "off", or "auto": drafts tokens and verifies them in one pass, while measured to pay
    draft_tokens   drafts a step and sequence, at most 3
    drafter        "mtp", "ngram" (prompt lookup), or None: mtp where the model has such modules, else ngram
    release        the native runner gives up a quantised model's codes once they are packed: half the memory, but
                   only engines with the native runner can use the model from then on
    """

    backend: Backend = "auto"
    block_size: int = 16
    cache_tokens: int | None = None
    cache_bytes: int | None = None
    max_batch: int = 256
    token_budget: int = 2048
    prefix_cache: PrefixCache = "all"
    speculate: Speculate = "off"
    draft_tokens: int = 2
    drafter: DrafterName | None = None
    release: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("backend", get_args(Backend)),
            ("speculate", get_args(Speculate)),
            ("prefix_cache", get_args(PrefixCache)),
            ("drafter", (*get_args(DrafterName), None)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise TaelError(f"engine: {name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        for name in ("block_size", "max_batch", "token_budget", "draft_tokens", "cache_tokens", "cache_bytes"):
            value = getattr(self, name)
            if value is None and name.startswith("cache"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TaelError(f"engine: {name} must be a whole number of 1 or more, not {value!r}")
        for holds, message in (
            (self.cache_tokens is None or self.cache_bytes is None, "give cache_tokens or cache_bytes, not both"),
            (self.draft_tokens <= MOST_DRAFTS, f"draft_tokens may be at most {MOST_DRAFTS}, not {self.draft_tokens}"),
            (
                self.token_budget >= self.max_batch,
                f"token_budget {self.token_budget} is less than max_batch {self.max_batch}: every running sequence "
                "needs a token a step; raise the one or lower the other",
            ),
            (
                self.cache_tokens is None or self.cache_tokens >= self.block_size,
                f"cache_tokens {self.cache_tokens} is less than one block of {self.block_size}",
            ),
        ):
            if not holds:
                raise TaelError(f"engine: {message}")

    @property
    def sizes_cache(self) -> bool:
        """Whether the size of the cache is set."""
        return self.cache_tokens is not None or self.cache_bytes is not None

    def put(self, **overrides: Any) -> EngineSettings:
        """A copy with some settings changed; raises TaelError for an unknown one."""
        names = [f.name for f in fields(self)]
        for name in overrides:
            if name not in names:
                raise TaelError(f"unknown engine setting '{name}'{did_you_mean(name, names)}")
        return replace(self, **overrides)
