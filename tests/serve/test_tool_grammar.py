"""Random weights under a tool grammar: deepseek-recipe's parser reads what they say as calls valid by the schemas."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import deepseek_recipe as recipe
import jsonschema_rs
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed import parsed
from tokenizers import AddedToken

from tael.data import Tokenizer, train_tokenizer
from tael.engine.constrain import ConstraintCompiler
from tael.engine.params import SamplingParams
from tael.engine.sampling import SamplerState, sample_rows
from tael.errors import TaelError
from tael.serve.formats.grammar import MOST_CALLS, dsml_grammar, hermes_grammar
from tael.serve.formats.hermes import HermesTranslator

DSML = "｜DSML｜"
TREE = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/Node",
}
SCHEMAS: dict[str, dict[str, Any] | None] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["C", "</F>", "K k"]},
            "mixed": {"enum": ["a", 1, None]},
            "always": {"const": "yes"},
            "short": {"type": "string", "minLength": 1, "maxLength": 3},
            "code": {"type": "string", "pattern": "^[A-C]{2}$"},
            "either": {"type": ["string", "null", "boolean"]},
            "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            'odd na"me</': {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["city", "list", 'odd na"me</', "unlisted"],
        "additionalProperties": {"type": "integer"},
    },
    "tree": TREE,
    "now": None,
    "nothing": {"type": "object", "properties": {}},
    "anything": {"type": "object"},
}
TOOLS = [recipe.ToolDefinition(name, None, schema, strict=True) for name, schema in SCHEMAS.items()]
TEXT = f'The fox. 漢字 {{"name": "cat", "arguments": {{}}}} <{DSML}invoke name="x" string="true">\n</tool_call>'


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([TEXT] * 3, 380)


def changed(tokenizer: Tokenizer, special: tuple[str, ...]) -> Tokenizer:
    """The tokenizer without a ｜DSML｜ token and with `special` ones."""
    table = json.loads(tokenizer.backend.to_str())
    table["added_tokens"] = [t for t in table["added_tokens"] if t["content"] != DSML]
    table["model"]["vocab"] = {("unused" if t == DSML else t): i for t, i in table["model"]["vocab"].items()}
    backend = tokenizers.Tokenizer.from_str(json.dumps(table))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return Tokenizer(backend, tokenizer.config)


@pytest.fixture(scope="module", params=["token", "text"])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    """Markers as special tokens, and as plain text."""
    if request.param == "text":
        return changed(trained, ())
    backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<tool_call>", "</tool_call>")])
    return Tokenizer(backend, trained.config)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, tokenizer.vocab_size)


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` with the markers as special tokens, where they are."""
    markers = [marker for marker in (DSML, "<tool_call>", "</tool_call>") if tokenizer.token_id(marker) is not None]
    parts = re.split(f"({'|'.join(markers)})", text) if markers else [text]
    ids = [[tokenizer.token_id(part)] if part in markers else tokenizer.encode(part) for part in parts]
    return [token for each in ids for token in each if token is not None]


ENDS = (f"</{DSML}", '"', "]", "}", "\n</tool_call>")


def say(compiler: ConstraintCompiler, tokenizer: Tokenizer, constraint: Any, seed: int, urge: str = "") -> str:
    """What random weights say that want to say `urge` first, and now and then to end what is open."""
    stop = tokenizer.eos_id
    assert stop is not None
    params = SamplingParams(seed=seed, stop_ids=(stop,), constraint=constraint)
    grammar = compiler.compile(constraint, params.stop_ids)
    state = SamplerState(params, [], tokenizer.vocab_size, grammar)
    generator, chooser = torch.Generator().manual_seed(seed), random.Random(seed)
    tokens: list[int] = []
    wanted = tokens_of(tokenizer, urge)
    while len(tokens) < 3000:
        logits = torch.randn(tokenizer.vocab_size, generator=generator) * 2
        logits[stop] += 4
        if not wanted and chooser.random() < 0.4:
            wanted = tokens_of(tokenizer, chooser.choice(ENDS))
        if wanted:
            logits[wanted.pop(0)] += 50
        tokens += sample_rows(logits[None], [state]).tokens
        if tokens[-1] == stop:
            return tokenizer.decode(tokens[:-1], skip_special=False)
        state.accept(tokens[-1])
        assert not grammar.fault
    raise AssertionError("the answer did not end")


def check_calls(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        schema = SCHEMAS[name]
        assert isinstance(arguments, dict)
        if schema is None:
            assert arguments == {}
        else:
            jsonschema_rs.validate(schema, arguments)


FORMS = {"dsml": (dsml_grammar, f"\n\n<{DSML}"), "hermes": (hermes_grammar, "<tool_call>")}
EACH = pytest.mark.parametrize("form", FORMS)


def calls_in(form: str, text: str, required: bool, step: int) -> tuple[str, list[tuple[str, Any]]]:
    if form == "dsml":
        return parsed(text, required, step)
    translator = HermesTranslator("answer")
    pieces = [translator.push(text[i : i + step]) for i in range(0, len(text), step)]
    return parsed("".join(pieces) + translator.finish(), False, 10_000)


@EACH
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls(tokenizer: Tokenizer, compiler: ConstraintCompiler, form: str, parallel: bool) -> None:
    seen: set[str] = set()
    for place, tool in enumerate([*TOOLS, None] * 2):
        tools = TOOLS if tool is None else [tool]
        constraint = FORMS[form][0](tokenizer, tools, True, parallel)
        text = say(compiler, tokenizer, constraint, place)
        content, calls = calls_in(form, text, True, 1 + place)
        assert content == "" and 1 <= len(calls) <= (MOST_CALLS if parallel else 1)
        check_calls(calls)
        seen |= {name for name, _ in calls}
    assert seen == set(SCHEMAS)


@EACH
def test_one_tool_many_times(tokenizer: Tokenizer, compiler: ConstraintCompiler, form: str) -> None:
    """Every property in every way: short answers of many seeds, the properties one by one."""
    weather = SCHEMAS["weather"]
    assert weather is not None
    for name, schema in weather["properties"].items():
        seen = set()
        tool = recipe.ToolDefinition(
            "weather", None, {"properties": {name: schema}, "additionalProperties": False}, strict=True
        )
        constraint = FORMS[form][0](tokenizer, [tool], True, False)
        for seed in range(5):
            text = say(compiler, tokenizer, constraint, seed)
            [(_, arguments)] = calls_in(form, text, True, 5)[1]
            jsonschema_rs.validate(tool.parameters, arguments)
            seen |= set(arguments)
        assert seen == {name}


@EACH
def test_free_text_that_may_end_in_calls(tokenizer: Tokenizer, compiler: ConstraintCompiler, form: str) -> None:
    make, opening = FORMS[form]
    constraint = make(tokenizer, TOOLS[2:], False, True)
    with_calls = 0
    for seed in range(12):
        urge = opening if seed % 2 else ""
        text = say(compiler, tokenizer, constraint, seed, urge)
        content, calls = calls_in(form, text, False, 3)
        check_calls(calls)
        assert ("<tool_call>" in text or f"<{DSML}" in text) == bool(calls)
        with_calls += bool(calls)
        assert content or calls or not text.strip()
    assert with_calls >= 3


@EACH
def test_free_text_is_free(tokenizer: Tokenizer, compiler: ConstraintCompiler, form: str) -> None:
    grammar = compiler.compile(FORMS[form][0](tokenizer, TOOLS, False, True))
    for token in tokenizer.encode(f'1 < 2, {{"name": </tool_call> <tool_ <{DSML[:-1]} 漢字\n\n'):
        assert grammar.allows(token)
        grammar.accept(token)
    assert grammar.is_complete and not grammar.is_done


@EACH
def test_markers_in_the_text(tokenizer: Tokenizer, compiler: ConstraintCompiler, form: str) -> None:
    """The opening, in tokens of any kind, has to go on with a call."""
    grammar = compiler.compile(FORMS[form][0](tokenizer, TOOLS, False, True))
    opening = {"dsml": f"a<{DSML}", "hermes": "a<tool_call>"}[form] + "rubbish"
    for token in tokenizer.encode(opening):
        grammar.accept(token)
    assert not grammar.is_complete


def test_a_raw_string_cannot_end_its_call(tokenizer: Tokenizer, compiler: ConstraintCompiler) -> None:
    tool = recipe.ToolDefinition("f", None, {"properties": {"a": {"type": "string"}}, "required": ["a"]})
    grammar = compiler.compile(dsml_grammar(tokenizer, [tool], True, False))
    for token in tokens_of(
        tokenizer, f'<{DSML}invoke name="f">\n<{DSML}parameter name="a" string="true">1 < 2 </ <{DSML[:-1]}'
    ):
        assert grammar.allows(token)
        grammar.accept(token)
    plain = tokenizer.encode(f"</{DSML}invoke>")
    for token in plain:
        grammar.accept(token)
    assert grammar.is_done and not grammar.is_complete  # not allowed: nothing may follow
    grammar.rollback(len(plain))
    for token in tokens_of(tokenizer, f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"):
        assert grammar.allows(token)
        grammar.accept(token)
    assert grammar.is_complete


def tool(parameters: Any, name: str = "f", strict: bool = True) -> recipe.ToolDefinition:
    return recipe.ToolDefinition(name, None, parameters, strict=strict)


@EACH
def test_what_cannot_be_enforced_is_told(trained: Tokenizer, form: str) -> None:
    compiler = ConstraintCompiler(trained, trained.vocab_size)
    unknown = {"properties": {"a": {"type": "string", "format": "unheard-of"}}}
    nested = json.loads('{"properties": {"a": ' * 60 + "{}" + "}}" * 60)
    cases = [
        (tool({}, 'a"b'), "is no name for a tool"),
        (tool({}, "a b"), "is no name for a tool"),
        (tool([1]), "must be a JSON schema"),
        (tool(unknown), "cannot use this grammar: at"),
        (tool({"properties": {"a": {"$ref": "http://example.com/x"}}}), "cannot use this grammar: at"),
        (tool({"properties": {"a": {"type": "strng"}}}), "cannot use this grammar: at"),
    ]
    if form == "dsml":
        cases += [
            (tool({"anyOf": [{}]}), "'anyOf' at the top; list them in 'properties'"),
            (tool({"type": "array"}), "type 'array'"),
            (tool({"$ref": "#/$defs/x"}), "'\\$ref' at the top"),
            (tool({"properties": [1]}), "are no JSON schema"),
            (tool({"properties": {"": {}}}), "empty name"),
        ]
    for bad, words in cases:
        with pytest.raises(TaelError, match=words) as error:
            compiler.compile(FORMS[form][0](trained, [bad], True, True))
        assert "\n" not in str(error.value)
    compiler.compile(FORMS[form][0](trained, [tool(unknown, strict=False)], True, True))
    compiler.compile(FORMS[form][0](trained, [tool(nested)], True, True))


def test_schemas_are_not_read_as_grammar(trained: Tokenizer) -> None:
    compiler = ConstraintCompiler(trained, trained.vocab_size)
    evil = '"\nstart: /.*/ // %json {} <[0-9]> | \\'
    schema = {"type": "object", "properties": {evil: {"enum": [evil]}}, "required": [evil]}
    said = say(compiler, trained, dsml_grammar(trained, [tool(schema)], True, False), 1)
    assert parsed(said, True, 4)[1] == [("f", {evil: evil})]
    said = say(compiler, trained, hermes_grammar(trained, [tool(schema)], True, False), 1)
    assert calls_in("hermes", said, True, 4)[1] == [("f", {evil: evil})]


KEYWORDS = (
    *("type", "properties", "required", "additionalProperties", "enum", "const", "$ref", "$defs", "items", "anyOf"),
    *("minLength", "maxLength", "pattern", "format", "minimum", "x-guidance", "a"),
)
WORDS = ("string", "object", "array", "integer", "null", "a", "#/$defs/a", "#", "(", "date", "</", '"')
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 9), st.sampled_from(WORDS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYWORDS), inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    schema=st.dictionaries(st.sampled_from(KEYWORDS), JUNK, max_size=6),
    properties=st.none() | st.dictionaries(st.sampled_from(WORDS), JUNK, max_size=3),
    strict=st.booleans(),
)
def test_any_schema_is_used_or_refused(trained: Tokenizer, schema: Any, properties: Any, strict: bool) -> None:
    """A schema may be any rubbish: one line says so, or what it allows can be said."""
    if properties is not None:
        schema = schema | {"properties": properties}
    compiler = ConstraintCompiler(trained, trained.vocab_size)
    for make, _ in FORMS.values():
        try:
            grammar = compiler.compile(make(trained, [tool(schema, strict=strict)], True, True))
        except TaelError as error:
            assert "\n" not in str(error)
        else:
            assert grammar.allowed().any()


def test_many_tools_compile(trained: Tokenizer) -> None:
    draw = random.Random(0)
    kinds = [
        {"type": "string"},
        {"type": "integer"},
        {"enum": ["a", "b"]},
        {"type": "array", "items": {"type": "string"}},
    ]
    tools = [
        recipe.ToolDefinition(f"tool-{i}", None, {"properties": {f"p{j}": draw.choice(kinds) for j in range(5)}})
        for i in range(64)
    ]
    compiler = ConstraintCompiler(trained, trained.vocab_size)
    for make, _ in FORMS.values():
        for required in (True, False):
            assert compiler.compile(make(trained, tools, required, True)).allowed().any()
