"""What goes in and comes out of the engine: a request on its way, the events it makes, and what it leaves."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from tael.engine.params import SamplingParams
from tael.engine.sampling import SamplerState
from tael.engine.watch import FinishReason, Watch

State = Literal["waiting", "running", "finished"]
Ending = FinishReason | Literal["cancelled", "error"]
Top = list[tuple[int, float]] | None


@dataclass(eq=False)
class Sequence:
    """One request. `tokens` are prompt and output; the first `computed` of them have entries in `table`."""

    prompt_length: int
    tokens: list[int]
    params: SamplingParams
    arrival: int
    sampler: SamplerState
    watch: Watch
    salt: Hashable = None
    state: State = "waiting"
    table: list[int] = field(default_factory=list)
    computed: int = 0
    published: int = 0
    """Blocks of `table` that are shareable."""
    logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)
    finish_reason: Ending | None = None
    stop_sequence: str | None = None
    error: str | None = None
    admitted: bool = False
    cached: int = 0
    """Prompt tokens that were taken from the prefix cache when it was first admitted."""
    drafted: int = 0
    accepted: int = 0
    preemptions: int = 0
    passed: int = 0
    """Tokens of it that went through the model: drafts, and what was computed again, too."""
    seconds: float = 0.0
    """Its share, by tokens, of the steps it was in."""

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def room(self) -> int:
        """Tokens it may still generate."""
        return self.params.max_tokens - self.generated

    @property
    def slots(self) -> int:
        """Slots it may ever need: its last token is never read."""
        return self.prompt_length + self.params.max_tokens - 1

    @property
    def decodes(self) -> bool:
        """Whether the last token alone is left to be computed, and is a generated one."""
        return self.computed == len(self.tokens) - 1 and self.computed >= self.prompt_length


@dataclass(frozen=True)
class TokenEvent:
    """One token and the text it makes certain: none while a character, or what may be a stop string, is unfinished.

    The last event of a sequence has a `finish_reason`; with "error" it brings no token (-1).
    """

    token: int
    text: str
    logprob: float
    finish_reason: Ending | None = None
    sequence: Sequence | None = None
    top: Top = None


@dataclass
class Completion:
    """What followed one prompt: `tokens` end with the stop token when `finish_reason` is "stop".

    `cached_tokens` of the prompt were taken from the prefix cache; of `drafted_tokens` as many as `accepted_tokens`
    were right.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Ending = "length"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def of(cls, sequence: Sequence) -> Completion:
        """What a finished sequence leaves."""
        return cls(
            sequence.output,
            sequence.logprobs,
            sequence.finish_reason or "length",
            sequence.prompt_length,
            sequence.cached,
            sequence.drafted,
            sequence.accepted,
        )


@dataclass
class EngineStats:
    """Totals since the engine began. A mixed step's seconds are split by its tokens."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were right."""
        return self.accepted_tokens / max(self.drafted_tokens, 1)
