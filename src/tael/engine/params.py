"""How one request is sampled, checked when it is written down.

Names and meanings are those of the OpenAI API and of vLLM, so that a server hands its fields on unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from tael.engine.constrain import Constraint
from tael.errors import TaelError

MOST_STOP_STRINGS = 16
LONGEST_STOP_STRING = 512
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. temperature 0 is greedy; `seed` fixes its random numbers.

    Order of work on a row of logits: repetition, presence and frequency penalty, logit_bias, min_tokens and the
    constraint (all of which change what a log-probability is of), then temperature, top_k, top_p, min_p.

    Raises TaelError, in one line that names the field, for anything out of range or contradictory.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    top_k: int = 0
    """Only the k most likely tokens (and any as likely as the k-th); 0 is off."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest one (Nguyen et al. 2024); 0 is off."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output: divided by it where positive, else multiplied (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token in the output (OpenAI's)."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for every time it is in the output (OpenAI's)."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Added to the logits of tokens; a mapping or pairs, held as pairs in the order of the tokens."""
    logprobs: int | bool | None = None
    """None: no alternatives wanted; n: the n most likely tokens besides the chosen one. True is 0, False is None."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; not shown, not looked for inside thoughts."""
    min_tokens: int = 0
    """No stop token, and no stop string, before so many tokens."""
    thinking_budget: int | None = None
    """At most so many tokens of thought, then `</think>` is put in; None is no limit."""
    loop_guard: bool = False
    """End an answer that provably repeats itself. Off here, so that RL sees what the model does; chat and serve
    turn it on."""
    constraint: Constraint | None = None
    """What the answer (not the thoughts) has to look like."""

    def __post_init__(self) -> None:
        _settle(self)
        for holds, message in _checks(self):
            if not holds:
                raise TaelError(f"sampling: {message}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_filtered(self) -> bool:
        """Are tokens cut off the distribution before the draw?"""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Does anything but temperature and the filters act on the logits?"""
        return self.has_penalties or bool(self.logit_bias) or self.min_tokens > 0 or self.constraint is not None

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        return cast(tuple[tuple[int, float], ...], self.logit_bias)

    @property
    def top_logprobs(self) -> int:
        """How many alternatives to report for every token."""
        return int(self.logprobs or 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise TaelError for a token in logit_bias or stop_ids that the model does not have."""
        for name, tokens in (("logit_bias", [t for t, _ in self.bias_pairs]), ("stop_ids", self.stop_ids)):
            for token in tokens:
                if token >= vocab_size:
                    raise TaelError(
                        f"sampling: {name} names token {token}, but the model has only 0..{vocab_size - 1}"
                    )


def _settle(params: SamplingParams) -> None:
    """Bring lists, mappings and booleans into the one form that is held (and hashable)."""

    def put(name: str, value: object) -> None:
        object.__setattr__(params, name, value)

    if isinstance(params.logprobs, bool):
        put("logprobs", 0 if params.logprobs else None)
    if isinstance(params.stop, str):
        put("stop", (params.stop,))
    elif isinstance(params.stop, list):
        put("stop", tuple(params.stop))
    if not isinstance(params.stop_ids, tuple):
        put("stop_ids", _tuple(params.stop_ids, "stop_ids must be token ids"))
    bias: Any = params.logit_bias
    if bias:
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        try:
            put("logit_bias", tuple(sorted((token, float(value)) for token, value in pairs)))
        except (TypeError, ValueError):
            raise TaelError("sampling: logit_bias must map token ids to numbers") from None
    else:
        put("logit_bias", ())


def _tuple(values: Any, message: str) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise TaelError(f"sampling: {message}, not {values!r:.60}") from None


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checks(p: SamplingParams) -> Iterator[tuple[bool, str]]:
    """Every rule with what to say when it does not hold; lazily, so that a later one may rely on an earlier one."""
    yield _whole(p.max_tokens, 1), f"max_tokens must be at least 1, not {p.max_tokens!r}"
    yield _number(p.temperature) and p.temperature >= 0, f"temperature must be 0 or more, not {p.temperature!r}"
    yield _number(p.top_p) and 0 < p.top_p <= 1, f"top_p must be in (0, 1], not {p.top_p!r}"
    yield isinstance(p.seed, int), f"seed must be a whole number, not {p.seed!r}"
    yield all(_whole(t, 0) for t in p.stop_ids), f"stop_ids must be token ids of 0 or more, not {p.stop_ids!r:.60}"
    yield _whole(p.top_k, 0), f"top_k must be a whole number of 0 (off) or more, not {p.top_k!r}"
    yield _number(p.min_p) and 0 <= p.min_p <= 1, f"min_p must be in [0, 1], not {p.min_p!r}"
    penalty = p.repetition_penalty
    yield (
        _number(penalty) and 0 < penalty <= 100,
        f"repetition_penalty must be in (0, 100], 1 is off, not {penalty!r}",
    )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(p, name)
        yield _number(value) and -2 <= value <= 2, f"{name} must be in [-2, 2], not {value!r}"
    tokens = [t for t, _ in p.bias_pairs]
    yield all(_whole(t, 0) for t in tokens), "logit_bias must name token ids of 0 or more"
    yield len(set(tokens)) == len(tokens), "logit_bias names a token twice"
    yield all(_number(b) and -100 <= b <= 100 for _, b in p.bias_pairs), "logit_bias must be numbers in [-100, 100]"
    logprobs = p.logprobs
    yield (
        logprobs is None or (_whole(logprobs, 0) and logprobs <= MOST_LOGPROBS),
        f"logprobs must be 0 to {MOST_LOGPROBS}, True or False, not {logprobs!r}",
    )
    stop = p.stop
    yield isinstance(stop, tuple) and all(isinstance(s, str) for s in stop), "stop must be a string or strings"
    yield len(stop) <= MOST_STOP_STRINGS, f"stop may hold {MOST_STOP_STRINGS} strings, not {len(stop)}"
    yield all(stop), "stop holds an empty string, which would end every answer before it starts"
    longest = max(map(len, stop), default=0)
    yield longest <= LONGEST_STOP_STRING, f"stop strings may have {LONGEST_STOP_STRING} characters, not {longest}"
    yield _whole(p.min_tokens, 0), f"min_tokens must be 0 or more, not {p.min_tokens!r}"
    yield p.min_tokens <= p.max_tokens, f"min_tokens {p.min_tokens} is more than max_tokens {p.max_tokens}"
    budget = p.thinking_budget
    yield budget is None or _whole(budget, 0), f"thinking_budget must be 0 or more, or None, not {budget!r}"
    yield isinstance(p.loop_guard, bool), f"loop_guard must be True or False, not {p.loop_guard!r}"
    constraint = p.constraint
    yield constraint is None or isinstance(constraint, Constraint), "constraint must be a Constraint"
    yield (
        constraint is None or p.min_tokens == 0,
        "min_tokens and constraint contradict each other: the constraint says when an answer is complete",
    )
