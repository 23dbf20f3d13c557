"""Search: every word somewhere in the conversation, the same with and without an index, whatever is typed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tael.serve.history import Head, History, Node, Tree, database


@pytest.fixture(params=[True, False], ids=["fts5", "without"])
def history(request, tmp_path, monkeypatch):
    if not request.param:
        monkeypatch.setattr(database, "has_fts5", lambda connection: False)
    elif not database.has_fts5(sqlite3.connect(":memory:")):
        pytest.skip("this SQLite has no FTS5")
    history = History(tmp_path / "conversations.sqlite")
    assert history._database.indexed == request.param
    yield history
    history.close()


def keep(history: History, title: str, *texts: str) -> int:
    id = history.create("local", "m", title=title).id
    for text in texts:
        history.add("local", id, None, "user", text)
    return id


def found(history: History, search: str) -> set[int]:
    return {head.id for head in history.heads("local", search)}


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ("", {1, 2, 3}),
        ("  ", {1, 2, 3}),
        ("world", {1}),
        ("WORLD peace", {1}),  # one word in the title, one in a message
        ("wor", {1}),
        ("orld", {1}),
        ("你好", {2}),
        ("世界和平", {2}),
        ("ÜBER", {2}),
        ("c++", {3}),
        ("50%", {3}),
        ("%", {3}),
        ("_", set()),
        ("say \"hi\"", {3}),
        ("world 你好", set()),
    ],
)  # fmt: skip
def test_words_are_found(history, search, expected):
    keep(history, "Peace", "Hello World", "other")
    keep(history, "你好", "世界和平 über alles")
    keep(history, "", 'C++ costs 50% more, he would say "hi"')
    assert found(history, search) == expected


def test_a_message_is_found_as_it_is_now(history):
    id = history.create("local", "m").id
    node = history.add("local", id, None, "assistant", "", state="running").id
    history.update("local", node, content="streaming words")
    assert found(history, "streaming") == {id}  # before it is finished
    history.update("local", node, content="finished words", state="done")
    assert found(history, "streaming") == set() and found(history, "finished") == {id}
    history.update("local", node, content="edited words")
    assert found(history, "finished") == set() and found(history, "edited") == {id}
    history.update("local", node, state="running")  # goes on
    history.update("local", node, content="edited words and more", state="stopped")
    assert found(history, "more") == {id}
    history.delete("local", id)
    assert found(history, "words") == set()
    with history._database.writing() as connection:
        if history._database.indexed:
            connection.execute("INSERT INTO words (words) VALUES ('integrity-check')")


def indexed(history: History) -> list[bool]:
    with history._database.reading() as connection:
        return [bool(row[0]) for row in connection.execute("SELECT indexed FROM nodes ORDER BY id")]


def test_an_import_is_found_before_and_after_it_is_indexed(history, monkeypatch):
    nodes = [Node(i, 0, i - 1 if i else None, "user", f"imported{i}") for i in range(120)]
    with monkeypatch.context() as patch:
        patch.setattr(history, "_index", lambda: None)  # killed after the rows were written
        (head,) = history.insert("local", [Tree(Head(0, ""), nodes)])
    assert not any(indexed(history))
    running = history.add("local", head.id, None, "assistant", "streams", state="running").id
    assert found(history, "imported77") == {head.id} == found(history, "streams")
    history.update("local", running, content="streams on")
    history._index()
    assert indexed(history) == [True] * 120 + [False]
    assert history.recover() == 1 and all(indexed(history))
    assert found(history, "imported77") == {head.id} == found(history, "streams on")
    assert found(history, "imported777") == set()


HOSTILE = ['"', "'", "a\"b", "* NEAR(", "NOT", "title:x", "{a b}:", "(((", "^x", "-x", "a\0b", "%_\\", "x" * 100_000,
           "words " * 5_000, "'; DROP TABLE nodes; --", "\ud800abc", "\u202e", "OR OR OR"]  # fmt: skip


@pytest.mark.parametrize("search", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_searches_only_find_nothing(history, search):
    keep(history, "title", "some text")
    assert found(history, search) == set()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("abcAB\"'*%_ äÄ世", max_size=12), min_size=1, max_size=4),
    search=st.text("abcAB\"'*%_ äÄ世", max_size=6),
)
def test_the_index_finds_what_reading_everything_finds(history, texts, search):
    for head in history.heads("local"):
        history.delete("local", head.id)
    ids = [keep(history, "", text) for text in texts]
    words = search.casefold().split()
    expected = {id for id, text in zip(ids, texts, strict=True) if all(word in text.casefold() for word in words)}
    assert found(history, search) == expected


def test_a_file_goes_from_sqlite_with_fts5_to_one_without_and_back(tmp_path, monkeypatch):
    path: Path = tmp_path / "conversations.sqlite"
    history = History(path)
    with_index = history._database.indexed
    first = keep(history, "", "before")
    history.close()
    with monkeypatch.context() as patch:
        patch.setattr(database, "has_fts5", lambda connection: False)
        history = History(path)
        assert not history._database.indexed
        history.add("local", first, None, "user", "between")
        assert found(history, "between") == {first}
        history.close()
    history = History(path)
    assert history._database.indexed == with_index
    assert found(history, "before between") == {first}
