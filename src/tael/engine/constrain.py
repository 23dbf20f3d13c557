"""Answers in a given form: JSON, JSON of a schema, a regular expression, one of some choices, a whole grammar.

    compiler = ConstraintCompiler(tokenizer, model.config.vocab_size)
    grammar = compiler.compile(Constraint.json_schema({...}), params.stop_ids)     # one a sequence
    grammar.apply(logits); grammar.accept(token); grammar.rollback(2)

The grammars are llguidance's (Earley parser over a lexer of derivatives, tens of microseconds a mask). Nothing in a
constraint is executed or fetched: schemas with a remote $ref are refused, size and work are bounded.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tael.data import Tokenizer
from tael.errors import TaelError, did_you_mean

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark"]

LONGEST_SCHEMA = 256 * 1024
LONGEST_REGEX = 8 * 1024
MOST_CHOICES = 1024
LONGEST_CHOICES = 64 * 1024
"""Characters of all choices together."""
LONGEST_GRAMMAR = 512 * 1024
"""Characters; a grammar holds the schemas of many tools."""

WHITE_SPACE = r"[ \t\n\r]{1,32}"
"""Between JSON's tokens; bounded, else a weak model says nothing but white space for ever."""
_CACHED = 32  # compiled grammars kept
_FUEL = (
    200_000  # of llguidance's lexer for compiling: at most some tenths of a second; its own limit allows 3 seconds
)

_BARRED = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0.0, -math.inf)
_BARRED = _BARRED.astype(np.float32)  # [256, 8]: what a byte of a mask adds to the logits of its eight tokens


@dataclass(frozen=True)
class Constraint:
    """What an answer has to look like; make one with `json_object`, `json_schema`, `regex`, `choice` or
    `grammar`.

    Raises TaelError for a value of the wrong kind or size; whether a schema or an expression can be used is told when
    it is compiled.
    """

    kind: Kind
    value: str | tuple[str, ...] = ""
    """The schema as JSON text, the expression, the choices, or the grammar."""

    def __post_init__(self) -> None:
        kind, value = self.kind, self.value
        if kind not in get_args(Kind):
            raise TaelError(f"constraint: unknown kind {kind!r:.40}{did_you_mean(str(kind), get_args(Kind))}")
        if kind == "choice":
            self._check_choices()
        elif not isinstance(value, str):
            raise TaelError(f"constraint: the value of kind {kind} must be text, not {type(value).__name__}")
        elif kind == "json_object" and value:
            raise TaelError("constraint: kind json_object takes no value; for a schema use json_schema")
        elif kind == "regex" and not 1 <= len(value) <= LONGEST_REGEX:
            raise TaelError(f"constraint: a regex must have 1 to {LONGEST_REGEX} characters, not {len(value)}")
        elif kind == "lark" and not 1 <= len(value) <= LONGEST_GRAMMAR:
            raise TaelError(f"constraint: a grammar must have 1 to {LONGEST_GRAMMAR} characters, not {len(value)}")
        elif kind == "json_schema":
            _check_schema(value)

    def _check_choices(self) -> None:
        value = self.value
        if not isinstance(value, tuple) or not all(isinstance(choice, str) and choice for choice in value):
            raise TaelError("constraint: choices must be a tuple of strings that are not empty")
        if not 1 <= len(value) <= MOST_CHOICES or sum(map(len, value)) > LONGEST_CHOICES:
            limits = f"1 to {MOST_CHOICES} choices of at most {LONGEST_CHOICES} characters together"
            raise TaelError(f"constraint: there must be {limits}, not {len(value)}")

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """JSON of a JSON schema, given parsed or as text."""
        if not isinstance(schema, str):
            try:
                schema = json.dumps(schema, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise TaelError(f"constraint: the schema is not JSON: {_one_line(error)}") from None
        return cls("json_schema", schema)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text all of which matches `pattern` (Rust's syntax: no look-around, no back-references)."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """Exactly one of `choices`."""
        return cls("choice", (choices,) if isinstance(choices, str) else tuple(choices))

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """What llguidance's dialect of Lark describes; special tokens stand in it as <[id]>.

        For grammars made here. JSON schemas of strangers may be part of one (%json), a stranger's grammar may not:
        what it is allowed to do is not bounded by anything but the fuel.
        """
        return cls("lark", text)


def _check_schema(text: str) -> None:
    if len(text) > LONGEST_SCHEMA:
        raise TaelError(f"constraint: the schema has {len(text)} characters; at most {LONGEST_SCHEMA} are allowed")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaelError(f"constraint: the schema is not JSON: {_one_line(error)}") from None
    if not isinstance(schema, dict):
        raise TaelError(f"constraint: a schema is a JSON object, not {type(schema).__name__}")


def _one_line(error: object) -> str:
    text = " ".join(str(error).replace("<non-verbose/>", "").split())
    return "no text can satisfy it" if text.startswith("NoExtension") else text[:200]


class Grammar:
    """A constraint at work on one answer. Stop tokens may follow where the answer is complete, and only there.

    Where a grammar turns out too complex in the middle, `fault` says so and only a stop token may follow: one request
    must not stop the batch it is in.
    """

    def __init__(
        self, matcher: LLMatcher, known: int, vocab_size: int, stop_ids: Sequence[int], eos_id: int | None
    ) -> None:
        """`known`: tokens the matcher's tokenizer has; `vocab_size`: rows of the model's logits."""
        self._matcher, self._known, self._vocab_size = matcher, known, vocab_size
        self._stop_ids = frozenset(stop_ids)
        self._ends = tuple(i for i in {*stop_ids, eos_id} if i is not None and i < vocab_size)
        self._after = 0  # tokens accepted after those: a stop token, or a draft the grammar does not allow

    @property
    def fault(self) -> str:
        """Why the constraint cannot go on, in one line; empty while it can. Rollback does not bring it back."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    @property
    def is_done(self) -> bool:
        """True when nothing but a stop token may follow."""
        return self._after > 0 or self._matcher.is_stopped()

    @property
    def is_complete(self) -> bool:
        """True when the text so far is an answer in the constraint's form (more may follow unless `is_done`)."""
        return self._after == 0 and self._matcher.is_accepting() and not self._matcher.is_error()

    def mask(self) -> NDArray[np.uint8]:
        """Which tokens may come next, one bit a token, lowest bit first, [V / 8] rounded up."""
        packed = np.zeros(-(-self._vocab_size // 8), dtype=np.uint8)
        if not self.is_done:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if not self._matcher.is_error():
                packed[: len(bits)] = bits[: len(packed)]
        # What the matcher takes for the end is the tokenizer's token; what ends this answer are its stop tokens.
        ends = self.is_done or self._matcher.is_accepting()
        for token in self._ends:
            byte, bit = token // 8, 1 << token % 8
            packed[byte] = packed[byte] | bit if ends and token in self._stop_ids else packed[byte] & (255 - bit)
        return packed

    def allowed(self) -> NDArray[np.bool_]:
        """`mask` as booleans [V]."""
        return np.unpackbits(self.mask(), count=self._vocab_size, bitorder="little").view(np.bool_)

    def apply(self, logits: Tensor) -> None:
        """Set the fp32 logits [V] of all tokens that may not come next to -inf, in place.

        Adding 0 or -inf from a table of bytes takes 40 us for 129,280 tokens; a masked fill takes 200 to 600.
        """
        barred = torch.from_numpy(np.take(_BARRED, self.mask(), axis=0).reshape(-1)[: self._vocab_size])
        logits.add_(barred.to(logits.device))

    def allows(self, token: int) -> bool:
        """May `token` come next?"""
        if token in self._stop_ids:
            return self.is_done or self._matcher.is_accepting()
        known = 0 <= token < self._known and token not in self._ends  # the matcher breaks on ids it does not know
        return known and not self.is_done and self._matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> None:
        """`token` joins the answer. One that is not allowed (a draft) is held too: after it only a stop token is."""
        if self._after == 0 and token not in self._stop_ids and self.allows(token):
            self._matcher.consume_token(token)
        else:
            self._after += 1

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens."""
        beyond = min(count, self._after)
        self._after -= beyond
        if count > beyond and not self._matcher.is_error():
            self._matcher.rollback(count - beyond)


class ConstraintCompiler:
    """Makes grammars for one tokenizer and model; keeps the last ones compiled."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's, which may have more rows than the tokenizer has tokens: those are barred."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ll_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def compile(self, constraint: Constraint, stop_ids: Sequence[int] = ()) -> Grammar:
        """A grammar at its beginning, for one answer that ends with one of `stop_ids` (end-of-sentence unless given).

        Raises TaelError for a constraint that cannot be used.
        """
        stop_ids = tuple(stop_ids) or tuple(i for i in (self._tokenizer.eos_id,) if i is not None)
        if not stop_ids:
            raise TaelError(
                "constraint: nothing could end the answer: give stop_ids, this tokenizer has no end token"
            )
        matcher = self._compiled.get(constraint)
        if matcher is None:
            matcher = self._compiled[constraint] = self._matcher(constraint)
            if len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return Grammar(
            matcher.deep_copy(), self._tokenizer.vocab_size, self._vocab_size, stop_ids, self._tokenizer.eos_id
        )

    def _matcher(self, constraint: Constraint) -> LLMatcher:
        import llguidance

        if self._ll_tokenizer is None:
            self._ll_tokenizer = _ll_tokenizer(self._tokenizer)
        limits = llguidance.LLParserLimits(initial_lexer_fuel=_FUEL, verbose_errors=False)
        matcher, fault = None, ""
        try:
            matcher = llguidance.LLMatcher(self._ll_tokenizer, _grammar(constraint), log_level=0, limits=limits)
            fault = matcher.get_error() or _fault_at_start(matcher.deep_copy())
        except Exception as error:  # llguidance raises ValueError, UnicodeError and others for what it cannot read
            fault = str(error) or type(error).__name__
        if matcher is None or fault:
            what = str(constraint.kind)
            if what == "lark":
                what, fault = "grammar", fault.partition("\n")[0]  # after it comes the grammar itself
            raise TaelError(f"constraint: cannot use this {what}: {_one_line(fault)}")
        return matcher


def _fault_at_start(matcher: LLMatcher) -> str:
    """What goes wrong with the first token: some grammars are found impossible, or too complex, only then."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    if not matcher.is_error() and bits.any():
        matcher.try_consume_tokens([int(bits.argmax())])
        matcher.compute_bitmask()
    elif not matcher.is_error() and not matcher.is_accepting():
        return "no text can satisfy it"
    return matcher.get_error()


def _grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own notation."""
    from llguidance import LLMatcher, regex_to_lark

    kind, value = constraint.kind, constraint.value
    if isinstance(value, tuple):
        options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
        return LLMatcher.grammar_from_lark(f"start: {options}")
    if kind == "lark":
        return LLMatcher.grammar_from_lark(value)
    if kind == "regex":
        # \d as 0-9, which is what is meant and is a \d in every dialect
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(value, 'd')}/")
    schema = '{"type": "object"}' if kind == "json_object" else value
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})


def _ll_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """llguidance's view of the tokenizer: every token that stands for no text is special to it, `<think>` too."""
    from llguidance import LLTokenizer

    table = json.loads(tokenizer.backend.to_str())
    for token in table.get("added_tokens", []):
        token["special"] = token["special"] or token["id"] in tokenizer.special_ids
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else min(tokenizer.special_ids, default=0)
    try:
        return LLTokenizer(json.dumps(table), eos_token=eos)
    except Exception as error:
        raise TaelError(f"constraint: this tokenizer cannot be used for constraints: {_one_line(error)}") from None
