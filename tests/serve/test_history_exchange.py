"""Export and import: what goes out comes back the same, whatever the texts hold; bad files change nothing."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tael.errors import TaelError
from tael.serve.history import (
    Head,
    History,
    Node,
    Tree,
    exchange,
    from_json,
    from_markdown,
    path_to,
    preferences,
    read_export,
    to_json,
    to_markdown,
)

NOW = "2026-01-01T00:00:00.000000+00:00"
NASTY = st.sampled_from([
    "<!-- tael:end -->", "\\<!-- tael:end -->", "\n<!-- tael:message {} -->\n",
    "\n\\\\<!-- tael:", "<!-- tael:content -->",
    "-->", "```\n", "~~~", "# A heading", "## User\n", "</details>", "<script>alert(1)</script>", "\r", "\r\n", "\n",
    "\n\n", "\0", "\u2028", "\x85", "\\", " ", "$x$", "| a |\n|---|", "🙂", "你好",
])  # fmt: skip
TEXT = st.one_of(st.text(max_size=30), st.lists(st.one_of(NASTY, st.text(max_size=4)), max_size=8).map("".join))
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
OBJECT = st.dictionaries(TEXT, VALUE, max_size=3)
TIME = st.datetimes().map(lambda moment: exchange.utc(moment.isoformat()))
STATE = st.sampled_from(["done", "stopped", "interrupted", "error"])
ROLE = st.sampled_from(["user", "assistant", "tool"])


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    nodes: list[Node] = []
    for i in range(draw(st.integers(0, 6))):
        parent = draw(st.one_of(st.none(), st.integers(0, i - 1))) if i else None
        texts = {"content": draw(TEXT), "reasoning": draw(st.none() | TEXT), "error": draw(st.none() | TEXT)}
        values = {"tool_calls": draw(st.lists(OBJECT, max_size=2)), "figures": draw(OBJECT), "model": draw(TEXT)}
        nodes.append(
            Node(id=i, conversation=0, parent=parent, role=draw(ROLE), created=draw(TIME), state=draw(STATE), **texts,
                 **values)
        )  # fmt: skip
    leaf = draw(st.integers(0, len(nodes) - 1)) if nodes else None
    texts = {name: draw(TEXT) for name in ("title", "folder", "model", "system")}
    head = Head(0, "", **texts, settings=draw(OBJECT), created=draw(TIME), updated=draw(TIME), leaf=leaf)
    return Tree(head, nodes)


def whole(history: History, heads: list[Head]) -> str:
    """Everything of these conversations as JSON."""
    return to_json(heads, [node for head in heads for node in history.nodes(head.owner, head.id)])


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    history = History(tmp_path_factory.mktemp("history") / "conversations.sqlite")
    yield history
    history.close()


fast = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])


@fast
@given(st.lists(trees(), max_size=3))
def test_json_to_history_to_json_is_exact(history, these):
    heads = history.insert("local", these)
    text = whole(history, heads)
    assert from_json(text) == these
    again = history.insert("key:1", from_json(text.encode()))
    assert whole(history, again) == text
    assert {head.owner for head in again} <= {"key:1"}


@fast
@given(trees())
def test_markdown_to_history_to_markdown_is_exact_on_the_branch_on_show(history, tree):
    (head,) = history.insert("local", [tree])
    text = to_markdown(head, history.nodes("local", head.id))
    (read,) = from_markdown(text.encode())
    branch = [
        replace(node, id=i, parent=i - 1 if i else None) for i, node in enumerate(path_to(tree.nodes, tree.head.leaf))
    ]
    assert read.nodes == branch
    assert replace(read.head, leaf=None) == replace(tree.head, leaf=None)
    (again,) = history.insert("local", [read])
    assert to_markdown(again, history.nodes("local", again.id)) == text


def test_titles_models_and_errors_are_no_html_and_no_comments_of_ours():
    bad = "\n<!-- tael:message {} -->\n<script>x</script>"
    node = Node(
        0,
        0,
        None,
        "assistant",
        "x",
        model=bad,
        created=NOW,
        state="error",
        error=bad,
        figures={bad: 1, "odd": 10**400},
    )
    tree = Tree(Head(0, "", title=bad, model=bad, created=NOW, updated=NOW, leaf=0), [node])
    text = to_markdown(tree.head, tree.nodes)
    assert "<script>" not in text and from_markdown(text) == [tree]


def test_markdown_reads_well(tmp_path):
    history = History(tmp_path / "conversations.sqlite")
    head = history.create("local", "small", title="Sums <b>", system="Be brief.")
    question = history.add("local", head.id, None, "user", "What is 2+2?")
    answer = history.add("local", head.id, question.id, "assistant", "4", reasoning="Two and two.", model="small")
    history.update("local", answer.id, figures={"tokens": 12, "tokens_per_second": 3.25, "cost": 0.0000125})
    tree = history.head("local", head.id)
    shown = [line for line in to_markdown(tree, history.nodes("local", head.id)).split("\n") if line[:4] != "<!--"]
    assert [line for line in shown if line] == [
        "# Sums &lt;b&gt;",
        f"small · {head.created[:10]}",
        "<details><summary>System prompt</summary>", "Be brief.", "</details>",
        "## User", "What is 2+2?",
        "## Assistant (small)",
        "<details><summary>Thoughts</summary>", "Two and two.", "</details>",
        "4",
        "*tokens 12 · tokens per second 3.25 · cost 1.25e-05*",
    ]  # fmt: skip


def test_markdown_from_an_editor_that_ends_lines_differently(tmp_path):
    tree = Tree(Head(0, "", created=NOW, updated=NOW, leaf=0), [Node(0, 0, None, "user", "a\nb", created=NOW)])
    text = to_markdown(tree.head, tree.nodes)
    assert from_markdown(text.replace("\n", "\r\n")) == [tree] == from_markdown("\ufeff".encode() + text.encode())


def test_what_runs_is_exported_and_imported_as_interrupted(history):
    head = history.create("key:2", "m")
    history.add("key:2", head.id, None, "assistant", "so f", state="running")
    text = whole(history, history.heads("key:2"))
    assert from_json(text)[0].nodes[0].state == "interrupted"
    (again,) = history.insert("key:2", from_json(text.replace("interrupted", "running")))
    assert history.nodes("key:2", again.id)[0].state == "interrupted"


# ---------------------------------------------------------------------- other systems


def test_messages_as_openai_writes_them(history):
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    messages = [
        {"role": "system", "content": "Be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "2+2?"}, {"type": "image_url", "image_url": {"url": "x"}}],
        },
        {"role": "assistant", "content": None, "reasoning_content": "use the tool", "tool_calls": calls},
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "4"},
    ]
    for text in (
        json.dumps({"messages": messages, "model": "m"}),
        json.dumps([{"messages": messages}]),
        json.dumps(messages),
    ):
        (tree,) = from_json(text)
        (head,) = history.insert("key:3", [tree])
        nodes = path_to(history.nodes("key:3", head.id), head.leaf)
        assert head.system == "Be brief" and head.created and nodes[0].created
        assert [(node.role, node.content) for node in nodes] == [
            ("user", "2+2?\n\n[attachment]"), ("assistant", ""), ("tool", "4"), ("assistant", "4"),
        ]  # fmt: skip
        assert nodes[1].tool_calls == calls and nodes[1].reasoning == "use the tool"
        assert nodes[2].tool_calls == [{"id": "c1"}] and nodes[3].reasoning is None
    assert len(from_json(json.dumps([{"messages": messages}] * 3))) == 3


def test_arguments_as_objects_become_text():
    messages = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é"}}}, {"id": 5}]}
    ]
    ((node,),) = (tree.nodes for tree in from_json(json.dumps(messages)))
    assert node.tool_calls == [
        {"id": "", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}},
        {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
    ]


def chatgpt(message: dict | None, parent: str | None) -> dict:
    return {"message": message, "parent": parent, "children": []}


def said(role: str, text: str, kind: str = "text", **more: object) -> dict:
    content = {"content_type": kind, "parts": [text]}
    return {"author": {"role": role}, "content": content, "create_time": 1_700_000_000.5, "recipient": "all", **more}


def test_chatgpts_export(history):
    thoughts = {
        "content_type": "thoughts",
        "thoughts": [{"summary": "Sum", "content": "2 and 2"}, {"summary": "So 4"}],
    }
    mapping = {
        "root": chatgpt(None, None),
        "sys": chatgpt(said("system", "hidden", metadata={"is_visually_hidden_from_conversation": True}), "root"),
        "q": chatgpt(said("user", "2+2?"), "sys"),
        "t": chatgpt({"author": {"role": "assistant"}, "content": thoughts}, "q"),
        "recap": chatgpt({"author": {"role": "assistant"}, "content": {"content_type": "reasoning_recap"}}, "t"),
        "call": chatgpt(said("assistant", "print(2+2)", recipient="python"), "recap"),
        "tool": chatgpt(said("tool", "4"), "call"),
        "a1": chatgpt(said("assistant", "4", metadata={"model_slug": "gpt-x"}), "tool"),
        "a2": chatgpt(said("assistant", "four"), "q"),
        "q2": chatgpt(said("user", "And 3+3?"), "a1"),
        "image": chatgpt(
            {"author": {"role": "user"}, "content": {"content_type": "multimodal_text", "parts": [{"x": 1}, "see"]}},
            "a2",
        ),
    }
    item = {"title": "Sums", "create_time": 1.7e9, "update_time": 1.7e9, "mapping": mapping, "current_node": "q2"}
    (head,) = history.insert("key:4", from_json(json.dumps([item])))
    nodes = history.nodes("key:4", head.id)
    assert head.title == "Sums" and head.created == "2023-11-14T22:13:20.000000+00:00" and head.model == "gpt-x"
    assert [(n.content, n.reasoning, n.model) for n in path_to(nodes, head.leaf)] == [
        ("2+2?", None, ""), ("4", "2 and 2\n\nSo 4", "gpt-x"), ("And 3+3?", None, ""),
    ]  # fmt: skip
    assert {n.content for n in nodes} == {"2+2?", "4", "four", "And 3+3?", "[attachment]\n\nsee"}
    assert next(n for n in nodes if n.content == "four").reasoning is None


def test_deepseeks_export(history):
    def entry(parent: str, *fragments: tuple[str, str]) -> dict:
        parts = [{"type": kind, "content": content} for kind, content in fragments]
        message = {
            "model": "deepseek-reasoner",
            "inserted_at": "2025-04-29T11:59:13.202000+08:00",
            "fragments": parts,
        }
        return {"id": "x", "parent": parent, "children": [], "message": message}

    mapping = {
        "root": {"id": "root", "parent": None, "children": ["1"], "message": None},
        "1": entry("root", ("REQUEST", "2+2?")),
        "2": entry("1", ("THINK", "hm"), ("RESPONSE", "4")),
        "3": entry("1", ("RESPONSE", "four")),
    }
    item = {"id": "x", "title": "求和", "inserted_at": "2025-04-29T11:59:11+08:00", "mapping": mapping}
    (head,) = history.insert("key:5", from_json(json.dumps([item], ensure_ascii=False)))
    question, first, second = history.nodes("key:5", head.id)
    assert (question.role, question.content, question.created) == ("user", "2+2?", "2025-04-29T03:59:13.202000+00:00")
    assert (first.reasoning, first.content, first.model) == ("hm", "4", "deepseek-reasoner")
    assert (second.content, second.parent, head.title) == ("four", question.id, "求和")


# --------------------------------------------------------------------------- refusals


def file(**changes: object) -> str:
    message = {"parent": None, "role": "user", "created": NOW, "content": "x"} | changes.pop("message", {})  # type: ignore[operator]
    conversation = {"title": "", "created": NOW, "updated": NOW, "leaf": 0, "messages": [message]} | changes
    return json.dumps({"format": "tael.conversations", "version": 1, "conversations": [conversation]})


MARKDOWN = to_markdown(
    Head(0, "", title="T", created=NOW, updated=NOW, leaf=0), [Node(0, 0, None, "user", "x", created=NOW)]
)
BAD = {
    "empty": "",
    "text": "hello",
    "no JSON": "{",
    "a number": "[1]",
    "nothing": "[]",
    "another object": '{"a": 1}',
    "deep": "[" * 100_000,
    "deep settings": file(settings={"x": json.loads("[" * 80 + "]" * 80)}),
    "not a number": file(message={"figures": {"x": float("nan")}}),
    "too great": file(message={"figures": {"x": 1}}).replace('{"x": 1}', '{"x": 1e999}'),
    "too many digits": file(message={"figures": {"x": 1}}).replace('{"x": 1}', '{"x": ' + "9" * 10_000 + "}"),
    "newer": file().replace('"version": 1', '"version": 2'),
    "role": file(message={"role": "system"}),
    "state": file(message={"state": "finished"}),
    "content": file(message={"content": ["x"]}),
    "surplus": file(message={"id": 1}),
    "own parent": file(message={"parent": 0}),
    "negative parent": file(message={"parent": -1}),
    "leaf": file(leaf=1),
    "huge leaf": file(leaf=2**70),
    "time": file(created="zzzz"),
    "year": file(created="0001-01-01T00:00:00+14:00"),
    "title": file(title=1),
    "tool calls": file(message={"tool_calls": ["x"]}),
    "function": file(message={"tool_calls": [{"function": "x"}]}),
    "arguments": file(message={"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}),
    "call id": file(message={"tool_calls": [{"id": [1]}]}),
    "figure": file(message={"figures": {"completion_tokens": "x"}}),
    "figure none": file(message={"figures": {"cost": None}}),
    "figure negative": file(message={"figures": {"seconds": -1}}),
    "figure huge": file(message={"figures": {"tokens": 10**400}}),
    "messages": '{"messages": [{"role": "wizard", "content": "x"}]}',
    "message": '{"messages": [1]}',
    "calls": '{"messages": [{"role": "assistant", "tool_calls": "x"}]}',
    "content number": '{"messages": [{"role": "user", "content": 5}]}',
    "cycle": json.dumps({"mapping": {"a": {"parent": "b"}, "b": {"parent": "a"}}}),
    "entry": '{"mapping": {"a": 1}}',
    "markdown": "# Title\n\n## User\n\nHello",
    "no end": MARKDOWN.replace("<!-- tael:end -->", ""),
    "no content": MARKDOWN.replace("tael:content", "tael:reasoning"),
    "markdown role": MARKDOWN.replace('"role": "user"', '"role": "root"'),
    "markdown version": MARKDOWN.replace('"version": 1', '"version": 9'),
    "markdown object": MARKDOWN.replace("tael:content", 'tael:content {"a": 1}'),
    "no head": MARKDOWN.partition("\n")[2],
    "bytes": b"\xff\xfe\x00",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_malformed_files_are_refused_in_one_line_and_change_nothing(history, text):
    before = history.heads("local")
    good = from_json(file())
    with pytest.raises(TaelError) as caught:
        history.insert("local", [*good, *read_export(text)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert history.heads("local") == before


def spoiled(draw: st.DrawFn, value: Any) -> Any:
    """`value` with one thing in it, anywhere, put in another's place."""
    places = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if not places or draw(st.integers(0, 5)) == 0:
        return draw(VALUE)
    key, inner = draw(st.sampled_from(places))
    copy = value.copy()
    copy[key] = spoiled(draw, inner)
    return copy


WHOLE = [
    json.loads(file(message={"tool_calls": [{"id": "c", "function": {"name": "f"}}], "figures": {"tokens": 1}})),
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": [{"text": "x"}]}]},
    [{"mapping": {"q": chatgpt(said("user", "x"), None), "a": chatgpt(said("assistant", "y", metadata={}), "q")}}],
    [{"mapping": {"q": {"parent": None, "message": {"fragments": [{"type": "REQUEST", "content": "x"}]}}}}],
]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_spoiled_file_is_read_or_refused(history, data):
    value = spoiled(data.draw, data.draw(st.sampled_from(WHOLE)))
    with contextlib.suppress(TaelError):
        for head in history.insert("key:6", from_json(json.dumps(value))):
            to_markdown(head, history.nodes("key:6", head.id))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(MARKDOWN.split("\n")), max_size=12), st.integers(0, 200), st.text(max_size=3))
def test_spoiled_markdown_is_read_or_refused(lines, place, text):
    for each in ("\n".join(lines), MARKDOWN[:place] + text + MARKDOWN[place:], MARKDOWN[:place]):
        with contextlib.suppress(TaelError):
            from_markdown(each)


def test_the_good_ones_of_those_are_read(history):
    assert len(read_export(file())) == len(read_export(MARKDOWN)) == 1
    assert read_export('{"messages": []}')[0].nodes == []


def test_what_is_no_json_is_refused_when_read():
    with pytest.raises(TaelError, match="NaN is no JSON"):
        from_json(BAD["not a number"])


def test_too_large_a_file_is_refused(monkeypatch):
    monkeypatch.setattr(exchange, "MAX_BYTES", 1000)
    with pytest.raises(TaelError, match="MB"):
        read_export(file(title="x" * 1000))
    with pytest.raises(TaelError, match="MB"):
        from_markdown(b"x" * 1001)


def test_thoughts_are_not_multiplied(history):
    """A file of n thoughts and n answers after them stays as large as it is."""
    mapping: dict[str, dict] = {}
    for i in range(2000):
        content = {"content_type": "thoughts", "thoughts": [{"content": "x" * 50}]}
        mapping[f"t{i}"] = chatgpt({"author": {"role": "assistant"}, "content": content}, f"t{i - 1}")
        mapping[f"a{i}"] = chatgpt(said("assistant", "a"), "t1999")
    text = json.dumps({"mapping": mapping})
    assert len(to_json([Head(0, "", leaf=None)], from_json(text)[0].nodes)) < 2 * len(text)


# ------------------------------------------------------------------------ preferences


def test_preferences_are_trls_conversational_format(tmp_path: Path):
    from trl.data_utils import is_conversational

    history = History(tmp_path / "conversations.sqlite")
    prompt = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "2+2?\u2028"}]
    history.vote("local", prompt, "4\n", "5", "big", "small", note="blind")
    history.vote("local", prompt, "4", "four", "big", "small", tie=True)
    lines = preferences(history.votes("local")).split("\n")
    assert lines.pop() == "" and len(lines) == 1  # the tie is left out
    row = json.loads(lines[0])
    assert row["prompt"] == prompt
    assert row["chosen"] == [{"role": "assistant", "content": "4\n"}]
    assert row["rejected"] == [{"role": "assistant", "content": "5"}]
    assert (row["chosen_model"], row["rejected_model"], row["note"]) == ("big", "small", "blind") and row["created"]
    assert is_conversational({name: row[name] for name in ("prompt", "chosen", "rejected")})
