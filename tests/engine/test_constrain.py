"""Constrained answers: random weights say only what the constraint allows, with thoughts first and with rollback."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.data import Tokenizer, train_tokenizer
from tael.engine.constrain import Constraint, ConstraintCompiler
from tael.engine.params import SamplingParams
from tael.engine.sampling import SamplerState, distribution, sample_rows
from tael.errors import TaelError

VOCAB = 400  # more than the tokenizer has
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dög", "漢字"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
CHOICES = ("yes", "no", "yes, sir", '漢字\n"q\\', "<think>")
PATTERN = r"[a-c]+é\d{2}(/x|\n)?"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = 'The quick brown fox. 漢字とかな 🙂 café {"name": "cat", "age": 12, "tags": [true, false]}\n'
    return train_tokenizer([text] * 3, 360)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, VOCAB)


def keeps(constraint: Constraint, text: str) -> bool:
    """Is `text` an answer in the constraint's form? Judged without llguidance."""
    value = constraint.value
    if constraint.kind == "choice":
        return text in value
    if constraint.kind == "regex":
        return re.fullmatch(str(value), text) is not None
    answer = json.loads(text)
    return isinstance(answer, dict) if constraint.kind == "json_object" else fits_schema(answer)


def fits_schema(answer: Any) -> bool:
    """SCHEMA by hand."""
    return (
        isinstance(answer, dict)
        and set(answer) == {"name", "age", "kind", "tags"}
        and isinstance(answer["name"], str)
        and len(answer["name"]) <= 5
        and type(answer["age"]) is int
        and 0 <= answer["age"] <= 150
        and answer["kind"] in SCHEMA["properties"]["kind"]["enum"]
        and 1 <= len(answer["tags"]) <= 3
        and all(type(tag) is bool for tag in answer["tags"])
    )


CONSTRAINTS = [
    Constraint.json_object(),
    Constraint.json_schema(SCHEMA),
    Constraint.regex(PATTERN),
    Constraint.choice(CHOICES),
]
EACH = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.kind)


def state_for(compiler: ConstraintCompiler, constraint: Constraint, seed: int, **options: Any) -> SamplerState:
    eos = compiler._tokenizer.eos_id
    assert eos is not None
    params = SamplingParams(seed=seed, stop_ids=(eos,), constraint=constraint)
    return SamplerState(params, [], VOCAB, compiler.compile(constraint, params.stop_ids), **options)


def logits_at(seed: int, index: int, favoured: tuple[int, ...] = ()) -> torch.Tensor:
    """Random weights; `favoured` tokens a little likelier, so that an answer ends some day."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed * 1000 + index)) * 2
    logits[list(favoured)] += 4
    return logits


def say(state: SamplerState, seed: int, stop: int, favoured: tuple[int, ...], most: int = 400) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < most and stop not in tokens[-1:]:
        tokens += sample_rows(logits_at(seed, len(tokens), favoured)[None], [state]).tokens
        state.accept(tokens[-1])
    return tokens


def closers(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end what is open, so that random JSON does not nest for ever."""
    assert tokenizer.eos_id is not None
    return (tokenizer.eos_id, *(i for c in '}]"' for i in tokenizer.encode(c)))


@EACH
@pytest.mark.parametrize("seed", range(12))
def test_random_weights_keep_the_form(
    tokenizer: Tokenizer, compiler: ConstraintCompiler, constraint: Constraint, seed: int
) -> None:
    stop = tokenizer.eos_id
    assert stop is not None
    tokens = say(state_for(compiler, constraint, seed), seed, stop, closers(tokenizer))
    assert tokens[-1] == stop, "the answer did not end"
    assert keeps(constraint, tokenizer.decode(tokens, skip_special=False).removesuffix("<｜end▁of▁sentence｜>"))
    assert not set(tokens[:-1]) & tokenizer.special_ids


@EACH
def test_greedy_and_filters(tokenizer: Tokenizer, compiler: ConstraintCompiler, constraint: Constraint) -> None:
    stop = tokenizer.eos_id
    assert stop is not None
    for options in ({"temperature": 0}, {"top_k": 2}, {"top_p": 0.5, "temperature": 3.0}):
        params = SamplingParams(constraint=constraint, stop_ids=(stop,), **options)
        state = SamplerState(params, [], VOCAB, compiler.compile(constraint, (stop,)))
        tokens = say(state, 77, stop, closers(tokenizer))
        assert tokens[-1] == stop and keeps(constraint, tokenizer.decode(tokens))


@EACH
@pytest.mark.parametrize("free", [False, True])
def test_thoughts_are_free(
    tokenizer: Tokenizer, compiler: ConstraintCompiler, constraint: Constraint, free: bool
) -> None:
    """The grammar waits for `</think>`; thoughts may not end the sequence, since the answer is owed."""
    think, end_think, stop = tokenizer.think_id, tokenizer.end_think_id, tokenizer.eos_id
    assert think is not None and end_think is not None and stop is not None
    ids: dict[str, Any] = {"think_id": think, "end_think_id": end_think}
    state = state_for(compiler, constraint, 5, thinking=not free, free=free, **ids)
    if free:
        allowed = {i for i in range(VOCAB) if state.process(torch.zeros(VOCAB))[i] == 0}
        assert {think, end_think} <= allowed and state.constrained
        state.accept(think)
    thoughts = tokenizer.encode("} whatever {{")
    for token in thoughts:
        processed = state.process(torch.zeros(VOCAB))
        assert state.thinking and not state.constrained
        assert processed[stop] == -math.inf and int((processed == 0).sum()) == VOCAB - 1
        state.accept(token)
    state.accept(end_think)
    assert not state.thinking and state.constrained
    tokens = say(state, 5, stop, closers(tokenizer))
    assert tokens[-1] == stop and keeps(constraint, tokenizer.decode(tokens))
    state.rollback(len(tokens) + 1)
    assert state.thinking  # back inside thoughts, the grammar at its beginning
    state.accept(end_think)
    assert say(state, 5, stop, closers(tokenizer)) == tokens


def test_free_answer_without_thoughts(tokenizer: Tokenizer, compiler: ConstraintCompiler) -> None:
    """`</think>` first, or at once the answer: both are what a free model may do."""
    think, end_think = tokenizer.think_id, tokenizer.end_think_id
    for first in ([end_think], []):
        state = state_for(compiler, Constraint.choice(["no"]), 0, free=True, think_id=think, end_think_id=end_think)
        for token in [*first, *tokenizer.encode("no")]:
            assert token is not None
            state.accept(token)
        assert state.is_done
        state.rollback(1)
        assert not state.is_done


@settings(max_examples=25, deadline=None, derandomize=True)
@given(which=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_rollback_equals_no_rollback(
    tokenizer: Tokenizer, compiler: ConstraintCompiler, which: int, seed: int
) -> None:
    """At random points drafts go ahead, allowed ones and others, and are taken back: the answer is the same."""
    stop, end_think = tokenizer.eos_id, tokenizer.end_think_id
    assert stop is not None and end_think is not None
    thoughts, generator = 3, random.Random(seed)

    def answer(speculate: bool) -> list[int]:
        state = state_for(compiler, CONSTRAINTS[which], seed, thinking=True, end_think_id=end_think)
        tokens: list[int] = []
        while len(tokens) < 120 and stop not in tokens[-1:]:
            if speculate and generator.random() < 0.5:
                ahead = generator.randrange(1, 6)
                for _ in range(ahead):
                    law = distribution(logits_at(generator.randrange(99), 0, (stop,)), state)
                    likely = int(law.argmax()) if generator.random() < 0.7 else generator.randrange(VOCAB)
                    state.accept(end_think if generator.random() < 0.2 else likely)
                state.rollback(ahead)
            drawn = sample_rows(logits_at(seed, len(tokens), closers(tokenizer))[None], [state]).tokens[0]
            tokens.append(end_think if len(tokens) == thoughts and state.thinking else drawn)
            state.accept(tokens[-1])
        return tokens

    plain = answer(False)
    assert answer(True) == plain
    if plain[-1] == stop:
        assert keeps(CONSTRAINTS[which], tokenizer.decode(plain[plain.index(end_think) :]))


def test_only_a_stop_token_after_the_end(tokenizer: Tokenizer, compiler: ConstraintCompiler) -> None:
    """The request's own stop tokens, not the tokenizer's end where that is not among them."""
    eos, user = tokenizer.eos_id, tokenizer.user_id
    assert eos is not None and user is not None
    for stop in ((eos,), (user,), (eos, user)):
        grammar = compiler.compile(Constraint.choice(["no"]), stop)
        assert not set(stop) & set(np.flatnonzero(grammar.allowed()).tolist()) and not grammar.is_complete
        for token in tokenizer.encode("no"):
            assert grammar.allows(token) and not grammar.allows(stop[0])
            grammar.accept(token)
        assert grammar.is_done and grammar.is_complete and grammar.allows(stop[0])
        assert np.flatnonzero(grammar.allowed()).tolist() == sorted(stop)
        grammar.accept(stop[0])
        assert grammar.is_done and not grammar.is_complete
        grammar.rollback(2)
        assert not grammar.is_done


def test_rows_beyond_the_tokenizer_and_special_tokens_are_barred(tokenizer: Tokenizer) -> None:
    for size in (tokenizer.vocab_size, tokenizer.vocab_size + 1, 1000):
        grammar = ConstraintCompiler(tokenizer, size).compile(Constraint.regex(r"(.|\n)+"))
        allowed = grammar.allowed()
        assert len(allowed) == size and not allowed[tokenizer.vocab_size :].any()
        assert not set(np.flatnonzero(allowed).tolist()) & tokenizer.special_ids
        assert allowed[tokenizer.encode("fox")[0]]
        logits = torch.zeros(size)
        grammar.apply(logits)
        assert torch.equal(logits == 0, torch.from_numpy(allowed.copy()))
        grammar.accept(
            size - 1 if size > tokenizer.vocab_size else 0
        )  # not allowed: held, and only an end may follow
        assert np.flatnonzero(grammar.allowed()).tolist() == [tokenizer.eos_id]


def test_a_grammar_with_special_tokens(tokenizer: Tokenizer, compiler: ConstraintCompiler) -> None:
    """They come only where the grammar has them, by their ids; spelled out they are text like any other."""
    user, eos = tokenizer.user_id, tokenizer.eos_id
    assert user is not None and eos is not None
    constraint = Constraint.grammar(f"start: /[a-z]*/ <[{user}]> %json {json.dumps(SCHEMA['properties']['tags'])}")
    for seed in range(4):
        tokens = say(state_for(compiler, constraint, seed), seed, eos, (user, *closers(tokenizer)))
        assert tokens[-1] == eos and tokens.count(user) == 1
        at = tokens.index(user)
        assert re.fullmatch("[a-z]*", tokenizer.decode(tokens[:at]))
        assert set(json.loads(tokenizer.decode(tokens[at:]))) <= {True, False}
    grammar = compiler.compile(constraint)
    assert not grammar.allows(tokenizer.encode("<｜User｜>")[0]) and grammar.allows(user)


def test_grammars_of_one_constraint_do_not_meet(tokenizer: Tokenizer, compiler: ConstraintCompiler) -> None:
    constraint = Constraint.choice(["no", "yes"])
    first, second = compiler.compile(constraint), compiler.compile(constraint)
    for token in tokenizer.encode("yes"):
        first.accept(token)
    assert first.is_done and not second.is_done and second.allows(tokenizer.encode("no")[0])


def test_digits_are_ascii(tokenizer: Tokenizer, compiler: ConstraintCompiler) -> None:
    r"""\d is 0 to 9, as in JSON Schema: Arabic-Indic digits would break most programs that read the answer."""
    allowed = np.flatnonzero(compiler.compile(Constraint.regex(r"\d+")).allowed())
    assert {tokenizer.decode([i]) for i in allowed.tolist()} <= {str(n) for n in range(100)}


def test_a_fault_in_the_middle_ends_the_answer(tokenizer: Tokenizer, compiler: ConstraintCompiler) -> None:
    """Without an exception, since others are in the batch; brought about here by a token that is not allowed."""
    stop = tokenizer.eos_id
    assert stop is not None
    state = state_for(compiler, Constraint.regex("abcdef"), 0)
    grammar = state.grammar
    assert grammar is not None
    for token in [i for c in "abc" for i in tokenizer.encode(c)]:
        state.accept(token)
    assert grammar.fault == "" and not state.is_done
    grammar._matcher.consume_token(stop)
    assert grammar.fault and "\n" not in grammar.fault
    assert sample_rows(torch.randn(1, VOCAB), [state]).tokens == [stop]
    state.rollback(3)
    assert grammar.fault and state.is_done and not grammar.is_complete


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraint("yaml"), "unknown kind 'yaml'"),  # type: ignore[arg-type]
        (lambda: Constraint("json_object", "{}"), "json_object takes no value"),
        (lambda: Constraint("regex", ("a",)), "the value of kind regex must be text"),
        (lambda: Constraint.regex(""), "a regex must have 1 to 8192 characters, not 0"),
        (lambda: Constraint.regex("a" * 9000), "not 9000"),
        (lambda: Constraint.choice([]), "there must be 1 to 1024 choices"),
        (lambda: Constraint.choice(["a", ""]), "strings that are not empty"),
        (lambda: Constraint.choice([1]), "strings that are not empty"),  # type: ignore[list-item]
        (lambda: Constraint.choice(["x" * 100] * 1024), "at most 65536 characters together"),
        (lambda: Constraint.grammar(""), "a grammar must have 1 to 524288 characters, not 0"),
        (lambda: Constraint.grammar("#" * 600_000), "not 600000"),
        (lambda: Constraint.json_schema("{nope"), "the schema is not JSON: Expecting property name"),
        (lambda: Constraint.json_schema("[1]"), "a schema is a JSON object, not list"),
        (lambda: Constraint.json_schema({"a": {1}}), "the schema is not JSON: Object of type set"),
        (lambda: Constraint.json_schema('{"a":' * 100_000), "the schema has 500000 characters"),
        (lambda: Constraint.json_schema("[" * 200_000), "the schema is not JSON"),
    ],
)
def test_constraints_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(TaelError, match=message) as error:
        make()
    assert "\n" not in str(error.value) and str(error.value).startswith("constraint: ")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint.regex("(a"), "cannot use this regex: .*unclosed group"),
        (Constraint.regex(r"(?=a)b"), "look-around.* not supported"),
        (Constraint.regex(r"(a)\1"), "backreferences are not supported"),
        (Constraint.regex("[z-a]"), "invalid character class range"),
        (Constraint.regex("(a{1000}){1000}"), "too many expressions"),
        (Constraint.regex("a{100000000}"), "too many expressions"),
        (Constraint.regex("\ud800"), "cannot use this regex"),
        (Constraint.choice(["\ud800"]), "cannot use this choice"),
        (Constraint.grammar("start: /(a/"), "cannot use this grammar"),
        (Constraint.grammar("start: nowhere"), "cannot use this grammar: .*nowhere"),
        (Constraint.grammar("start: <[9999]>"), "cannot use this grammar"),
        (Constraint.grammar("start: /(a{1000}){1000}/"), "cannot use this grammar: .*"),
        (Constraint.json_schema({"type": "strng"}), "cannot use this json_schema: Invalid type: strng"),
        (Constraint.json_schema({"not": {}}), "Unimplemented keys"),
        (Constraint.json_schema({"$ref": "http://example.com/schema"}), "does not fetch resources"),
        (Constraint.json_schema({"$ref": "#"}), "no text can satisfy it"),
        (Constraint.json_schema({"type": "integer", "minimum": 3, "maximum": 1}), "Unsatisfiable schema"),
        (Constraint.json_schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (Constraint.json_schema(nested(200)), "recursion limit"),
    ],
)
def test_constraints_that_cannot_be_used(compiler: ConstraintCompiler, constraint: Constraint, message: str) -> None:
    """Told when compiled, in one line (and in little time: without limits some of these take minutes)."""
    with pytest.raises(TaelError, match=message) as error:
        compiler.compile(constraint)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_nothing_could_end_the_answer(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "eos_id", None)
    compiler = ConstraintCompiler(tokenizer, VOCAB)
    with pytest.raises(TaelError, match="nothing could end the answer"):
        compiler.compile(Constraint.json_object())
    assert compiler.compile(Constraint.choice(["no"]), (0,)).allowed().any()
