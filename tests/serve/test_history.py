"""History: trees of messages whole and each owner's own, under threads too; bad files and bad input are one line."""

from __future__ import annotations

import itertools
import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.cost.ledger import Entry, Ledger
from tael.errors import TaelError
from tael.serve.history import Head, History, Node, Tree, leaf_below, path_to, siblings


@pytest.fixture
def history(tmp_path):
    history = History(tmp_path / "conversations.sqlite")
    yield history
    history.close()


def talk(history: History, *texts: str, owner: str = "local") -> int:
    """A conversation of one branch; returns its id."""
    head = history.create(owner, "small")
    parent = None
    for i, text in enumerate(texts):
        parent = history.add(owner, head.id, parent, ("user", "assistant")[i % 2], text).id
    return head.id


def test_what_goes_in_comes_back(tmp_path):
    history = History(tmp_path / "deep" / "conversations.sqlite")
    head = history.create(
        "local", "small", title="'; DROP TABLE nodes; --", folder="F", system="Be brief", settings={"t": 1.5}
    )
    question = history.add("local", head.id, None, "user", "Wie heißt\0du?\r\n")
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    answer = history.add("local", head.id, question.id, "assistant", state="running", model="small")
    assert answer.state == "running" and answer.parent == question.id and answer.conversation == head.id
    history.update(
        "local", answer.id, content="Ta", reasoning="Hm", tool_calls=calls, figures={"tokens": 2}, error="odd"
    )
    history.update("local", answer.id, content="Tael", state="done", error="")
    history.close()

    again = History(history._database.path)
    read = again.head("local", head.id)
    assert (read.title, read.folder, read.system, read.settings) == (head.title, "F", "Be brief", {"t": 1.5})
    assert read.leaf == answer.id and read.updated > read.created
    first, second = again.nodes("local", head.id)
    assert first == question and first.content == "Wie heißt\0du?\r\n"
    assert second == again.node("local", answer.id)
    assert (second.content, second.reasoning, second.state, second.error) == ("Tael", "Hm", "done", None)
    assert (second.tool_calls, second.figures, second.model) == (calls, {"tokens": 2}, "small")


def test_the_file_is_in_wal_and_for_its_owner_only(history):
    path = history._database.path
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 1
    assert history._database._connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_branches(history):
    head = history.create("local", "small")
    question = history.add("local", head.id, None, "user", "q")
    first = history.add("local", head.id, question.id, "assistant", "a1")
    follow = history.add("local", head.id, first.id, "user", "q2")
    second = history.add("local", head.id, question.id, "assistant", "a2")
    edited = history.add("local", head.id, None, "user", "q'")
    nodes = history.nodes("local", head.id)
    assert path_to(nodes, follow.id) == [question, first, follow]
    assert path_to(nodes, history.head("local", head.id).leaf) == [edited]
    assert path_to(nodes, None) == []
    assert siblings(nodes, second) == [first, second]
    assert siblings(nodes, edited) == [question, edited]
    assert leaf_below(nodes, first) == follow
    assert leaf_below(nodes, question) == second  # the newest
    assert leaf_below(nodes, edited) == edited
    assert history.change("local", head.id, leaf=first.id).leaf == first.id
    with pytest.raises(TaelError, match="no message 99"):
        path_to(nodes, 99)


@given(st.lists(st.integers(0, 9), max_size=30))
def test_every_branch_of_a_tree_ends_in_one_leaf(choices):
    """What a path begins and ends with, and that the newest branch below a node runs through it."""
    nodes: list[Node] = []
    for id, choice in enumerate(choices):
        nodes.append(Node(id, 1, choice if choice < id else None, "user"))
    for node in nodes:
        path = path_to(nodes, node.id)
        assert path[0].parent is None and path[-1] == node
        assert all(child.parent == parent.id for parent, child in itertools.pairwise(path))
        leaf = leaf_below(nodes, node)
        assert node in path_to(nodes, leaf.id) and not any(other.parent == leaf.id for other in nodes)
        assert [other for other in nodes if other.parent == node.parent] == siblings(nodes[::-1], node)


def test_change_and_folders(history):
    id = talk(history, "a", "b")
    before = history.head("local", id)
    after = history.change("local", id, title="T", folder="work", model="big", system="S", settings={"x": [1]})
    assert (after.title, after.folder, after.model, after.system, after.settings) == (
        "T",
        "work",
        "big",
        "S",
        {"x": [1]},
    )
    assert after.updated == before.updated  # a new name does not make it newer
    talk(history, "c")
    assert history.folders("local") == ["work"]
    assert [head.id for head in history.heads("local", folder="work")] == [id]
    assert len(history.heads("local", folder="")) == 1 and len(history.heads("local")) == 2
    assert history.change("local", id, folder="").folder == "" and history.folders("local") == []


def test_the_last_used_comes_first(history):
    first, second = talk(history, "a"), talk(history, "b")
    assert [head.id for head in history.heads("local")] == [second, first]
    history.update("local", history.nodes("local", first)[0].id, content="c")
    assert [head.id for head in history.heads("local")] == [first, second]


def test_delete_leaves_nothing(history):
    chain = [Node(i, 0, i - 1 if i else None, "user", "xxx") for i in range(1500)]  # over SQLite's limit of recursion
    (head,) = history.insert("local", [Tree(Head(0, ""), chain)])
    id, other = head.id, talk(history, "kept")
    assert path_to(history.nodes("local", id), history.nodes("local", id)[-1].id)[0].parent is None
    history.delete("local", id)
    assert [head.id for head in history.heads("local")] == [other]
    with sqlite3.connect(history._database.path) as connection:
        assert connection.execute("SELECT count(*) FROM nodes").fetchone()[0] == 1
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert history.heads("local", "xxx") == []


def test_another_owner_sees_and_changes_nothing(history):
    id = talk(history, "secret")
    node = history.nodes("local", id)[0].id
    mine = talk(history, "mine", owner="key:1")
    attempts = [
        lambda: history.head("key:1", id),
        lambda: history.nodes("key:1", id),
        lambda: history.node("key:1", node),
        lambda: history.change("key:1", id, title="x"),
        lambda: history.change("key:1", mine, leaf=node),
        lambda: history.delete("key:1", id),
        lambda: history.add("key:1", id, None, "user", "x"),
        lambda: history.add("key:1", mine, node, "user", "x"),
        lambda: history.update("key:1", node, content="x"),
    ]
    for attempt in attempts:
        with pytest.raises(TaelError, match=r"there is no (conversation|message) \d"):
            attempt()
    assert history.heads("key:1", "secret") == [] and len(history.heads("key:1")) == 1
    assert history.node("local", node).content == "secret" and history.head("key:1", mine).leaf != node


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda h, id, node: h.add("local", id, None, "system", "x"), "no role 'system'"),
        (lambda h, id, node: h.update("local", node, state="finished"), "no state 'finished'"),
        (lambda h, id, node: h.update("local", node, figures={"x": float("nan")}), "figures cannot be"),
        (lambda h, id, node: h.update("local", node, tool_calls=[{"x": {1, 2}}]), "tool calls cannot be"),
        (lambda h, id, node: h.change("local", id, settings={"x": nested(100)}), "more than 64 levels"),
        (lambda h, id, node: h.change("local", id, settings={"x": nested(100_000)}), "more than 64 levels"),
        (lambda h, id, node: h.head("local", 2**80), "no conversation"),
        (lambda h, id, node: h.node("local", "1 OR 1"), "no message"),
        (lambda h, id, node: h.add("local", id, 999, "user", "x"), "no message 999 in this"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_changes_nothing(history, attempt, says):
    id = talk(history, "a")
    before = history.heads("local"), history.nodes("local", id)
    with pytest.raises(TaelError, match=says) as caught:
        attempt(history, id, before[1][0].id)
    assert "\n" not in str(caught.value)
    assert (history.heads("local"), history.nodes("local", id)) == before


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def test_a_lone_surrogate_is_kept_as_a_question_mark(history):
    id = talk(history, "a\ud800b")
    assert history.nodes("local", id)[0].content == "a?b"
    assert history.heads("local", "\udfffx") == []
    node = history.add("local", id, None, "assistant", tool_calls=[{"x": "\ud800"}])
    assert history.node("local", node.id).tool_calls == node.tool_calls


def test_recover_marks_what_was_running(history):
    id = talk(history, "a")
    node = history.add("local", id, history.nodes("local", id)[0].id, "assistant", "so f", state="running")
    assert history.recover() == 1 and history.recover() == 0
    assert [(n.content, n.state) for n in history.nodes("local", id)] == [("a", "done"), ("so f", "interrupted")]
    history.update("local", node.id, content="so far", state="done")


def test_threads_write_and_read_at_once(history):
    errors: list[Exception] = []

    def work(owner: str) -> None:
        try:
            id = history.create(owner, "m").id
            parent = None
            for step in range(20):
                parent = history.add(owner, id, parent, "user", f"{owner} {step}", state="running").id
                history.update(owner, parent, content=f"{owner} {step} done", state="done")
                assert len(history.nodes(owner, id)) == step + 1 and len(history.heads(owner, "done")) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"key:{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for i in range(6):
        nodes = history.nodes(f"key:{i}", history.heads(f"key:{i}")[0].id)
        assert [node.content for node in nodes] == [f"key:{i} {step} done" for step in range(20)]
        assert path_to(nodes, nodes[-1].id) == nodes


def test_several_may_open_a_new_file_at_once(tmp_path):
    histories: list[History] = []
    start = threading.Barrier(6)

    def open_it() -> None:
        start.wait()
        histories.append(History(tmp_path / "new.sqlite"))

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(histories) == 6
    talk(histories[0], "seen")
    assert len(histories[5].heads("local", "seen")) == 1


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE x (y)")


def newer(path: Path) -> None:
    History(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 2")


def damaged(path: Path) -> None:
    history = History(path)
    talk(history, *["text " * 200] * 30)
    history.close()
    data = bytearray(path.read_bytes())
    data[len(data) // 3 :] = b"\x5a" * len(data[len(data) // 3 :])
    path.write_bytes(data)


def ledger(path: Path) -> None:
    Ledger(path).add(
        Entry(run="r", stage="s", kind="rl", started="2025-01-01", tokens=1, flops=1, seconds=1, peak_memory_bytes=1,
              price_per_hour=1, dollars=1, steps=1)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text("no database, just text " * 100), "not a file of Tael's conversations"),
        (foreign, "not a file of Tael's conversations"),
        (ledger, "not a file of Tael's conversations"),
        (newer, "schema 2, this Tael reads 1"),
        (damaged, "damaged"),
        (lambda path: path.mkdir(), "cannot be opened"),
    ],
)
def test_a_bad_file_is_one_line_and_stays_as_it_was(tmp_path, make, says):
    path = tmp_path / "conversations.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(TaelError, match=says) as caught:
        History(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_an_impossible_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TaelError, match="cannot be made"):
        History(tmp_path / "file" / "conversations.sqlite")


def test_votes_are_kept_for_good(history):
    prompt = [{"role": "user", "content": "2+2?"}]
    first = history.vote("local", prompt, "4", "5", "big", "small", note="blind")
    second = history.vote("local", prompt, "4", "four", "big", "small", tie=True)
    history.vote("key:1", prompt, "x", "y", "a", "b")
    votes = history.votes("local")
    assert [vote.id for vote in votes] == [first, second] and [vote.tie for vote in votes] == [False, True]
    vote = votes[0]
    assert (vote.prompt, vote.chosen, vote.rejected) == (prompt, "4", "5")
    assert (vote.chosen_model, vote.rejected_model, vote.note) == ("big", "small", "blind")
    for change in ("UPDATE votes SET chosen = 'x'", "DELETE FROM votes", "REPLACE INTO votes SELECT * FROM votes"):
        with history._database.reading() as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(change)
    assert history.votes("local") == votes
