"""Hermes' calls become DSML, in pieces of any size; what deepseek-recipe's parser makes of it are the same calls."""

from __future__ import annotations

import json
from typing import Any

import deepseek_recipe as recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed import parsed

from tael.serve.formats.base import Starts
from tael.serve.formats.hermes import HermesTranslator, arguments_of, call_text, instructions

DSML = "｜DSML｜"


def translate(pieces: list[str] | str, starts: Starts = "free") -> str:
    translator = HermesTranslator(starts)
    return "".join(map(translator.push, pieces)) + translator.finish()


# --------------------------------------------------------------------- laws

ODD = ["<tool_call>", "</tool_call>", f"</{DSML}parameter>", f"<{DSML}tool_calls>", "<think>", "</think>", '"', "\\"]
WORDS = st.lists(st.one_of(st.sampled_from([*ODD, "\n", "漢"]), st.text(max_size=6)), max_size=4).map("".join)
VALUES = st.recursive(
    st.one_of(WORDS, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.tuples(st.text("abz_-09", min_size=1, max_size=8), st.dictionaries(WORDS.filter(bool), VALUES, max_size=4))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    calls=st.lists(CALLS, min_size=1, max_size=3), between=st.sampled_from(["", "\n", " \n\n"]), ascii=st.booleans()
)
def test_arguments_arrive_as_they_were(calls: list[tuple[str, Any]], between: str, ascii: bool) -> None:
    written = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii) for name, arguments in calls]
    text = "Well." + between.join(f"<tool_call>\n{call}\n</tool_call>" for call in written) + between
    content, found = parsed(translate(list(text)))
    assert content == "Well."
    assert found == calls


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), starts=st.sampled_from(["free", "think", "answer"]))
def test_pieces_do_not_matter(data: st.DataObject, starts: Any) -> None:
    good = CALLS.map(lambda call: call_text(*call))
    bad = st.sampled_from(
        ['<tool_call>{"name": "f', "<tool_call>{bad}</tool_call>", "</tool_call>", "<tool_", f"<{DSML}"]
    )
    text = "".join(data.draw(st.lists(st.one_of(good, bad, WORDS), max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = translate([text], starts)
    assert translate(pieces, starts) == whole
    assert translate(list(text), starts) == whole


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    text=st.lists(st.sampled_from(["<", "<t", "tool_call>", "</think>", "<think>", " ", "x", "\n", ">"])).map("".join)
)
def test_text_without_calls_is_left_alone(text: str) -> None:
    assert translate(list(text)) == text


# --------------------------------------------------------------------- cases


def test_text_passes_at_once() -> None:
    translator = HermesTranslator()
    assert translator.push("Hello <b> and <tool") == "Hello <b> and "
    assert translator.push("box> 1 < 2") == "<toolbox> 1 < 2"
    assert translator.push(" <tool_call>{") == " "
    assert translator.finish() == "<tool_call>{"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{bad}</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "a\\"b", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"": 1}}</tool_call>',
        '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}</tool_call>",
        "<tool_call>",
        '<tool_call>{"name": "f", "argum',
        '<tool_call>{"name": "f</tool_call>' * 20,
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert translate([f"So: {text}"]) == f"So: {text}"


def test_a_call_after_a_malformed_one() -> None:
    text = '<tool_call>{"name": "f</tool_call>\n' + call_text("g", {})
    assert parsed(translate(text)) == ('<tool_call>{"name": "f</tool_call>', [("g", {})])


def test_text_after_and_between_calls_is_not_lost() -> None:
    text = f"One {call_text('f', {})}\nTwo\n{call_text('g', {})}\nThree\n"
    assert parsed(translate(text)) == ("One \nTwo\n\nThree", [("f", {}), ("g", {})])


def test_forms_that_models_use() -> None:
    assert parsed(translate('<tool_call>{"name":"f","parameters":{"a":1}}</tool_call>'))[1] == [("f", {"a": 1})]
    assert parsed(translate('<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>'))[1] == [("f", {"a": 1})]
    assert parsed(translate('<tool_call>{"name":"f","arguments":{"a":"x\ny"}}</tool_call>'))[1] == [
        ("f", {"a": "x\ny"})
    ]
    assert parsed(translate('<tool_call>{"name":"f"}</tool_call>'))[1] == [("f", {})]
    assert parsed(translate('<tool_call>\n{"name":"f","arguments":{}}'))[1] == [("f", {})]


def test_what_would_end_a_raw_string_goes_as_json() -> None:
    text = translate(call_text("f", {"a": f"x</{DSML}parameter>", "b": f"<{DSML}invoke", "c": ["</"]}))
    assert f'"a" string="false">"x\\u003c/{DSML}parameter>"</{DSML}' in text
    assert f'"b" string="true"><{DSML}invoke</{DSML}' in text


def test_half_a_surrogate_pair() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d", "\\ud83d": 1, "b": ["\\ud83d"]}}</tool_call>'
    assert parsed(translate(text))[1] == [("f", {"a": "\ud83d", "\ud83d": 1, "b": ["\ud83d"]})]


def test_thoughts_are_left_alone() -> None:
    call = call_text("f", {})
    assert translate(f"<think>{call}</think>ok") == f"<think>{call}</think>ok"
    assert translate(f"{call}</think>ok", "think") == f"{call}</think>ok"
    assert parsed(translate(f"{call}</think>{call}", "think").partition("</think>")[2]) == ("", [("f", {})])
    assert parsed(translate(f"{call}</think>ok", "answer"))[1] == [("f", {})]


def test_a_quotation_of_dsml_is_no_call() -> None:
    text = f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</{DSML}invoke>\n</{DSML}tool_calls>'
    content, calls = parsed(translate(text))
    assert not calls and content.replace("\u200b", "") == text


def test_arguments_of_the_past() -> None:
    assert arguments_of('{"a": [1]}') == {"a": [1]}
    for text in ("", "no", "[1]", "[" * 100_000):
        assert arguments_of(text) == {"arguments": text}


def test_instructions() -> None:
    tools = [recipe.ToolDefinition("f", "Does é.", {"type": "object"}), recipe.ToolDefinition("g")]
    text = instructions(tools)
    schemas = [json.loads(line) for line in text.partition("<tools>\n")[2].partition("\n</tools>")[0].splitlines()]
    assert [schema["function"]["name"] for schema in schemas] == ["f", "g"]
    assert "é" in text and "must answer with a call" in instructions(tools, required=True)
