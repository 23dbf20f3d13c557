"""Answers that run by themselves: what is kept, what followers see, how they end. No browser."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from tael.errors import TaelError
from tael.serve.caller import LOCAL
from tael.serve.errors import ApiError
from tael.serve.history import History
from tael.serve.pages.answering import WRITE_SECONDS, Answering


def in_a_loop(work):
    """In a thread of its own: after a test with a browser, this thread has a loop already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """Sends what a test puts in, one after another; an exception is raised, None ends the answer."""

    def __init__(self):
        self.queue: asyncio.Queue = asyncio.Queue()
        self.closed = False
        self.asked = []

    def models(self):
        return []

    async def chat(self, body, caller, progress=False):
        self.asked.append((body, caller, progress))
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


class House:
    def __init__(self, path):
        self.history = History(path / "conversations.sqlite")
        self.service, self.clock = Scripted(), Clock()
        self.answering = Answering(self.service, self.history, self.clock)
        self.head = self.history.create("local", "tiny")
        self.question = self.history.add("local", self.head.id, None, "user", "Hello")

    def start(self, onto=None):
        body = {"model": "tiny", "messages": []}
        return self.answering.start(LOCAL, self.head.id, body, self.question.id, onto)

    async def send(self, running, *items):
        """Send these, and wait until all are taken."""
        wanted = running.version + sum(isinstance(item, dict) for item in items)
        for item in items:
            self.service.queue.put_nowait(item)
        await until(lambda: running.version >= wanted)

    def kept(self, running):
        return self.history.node("local", running.node)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def ended(running):
    await until(lambda: running.state != "running")


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def says(text):
    return {"choices": [{"delta": {"content": text}, "finish_reason": None}]}


def thinks(text):
    return {"choices": [{"delta": {"reasoning_content": text}, "finish_reason": None}]}


def calls(index, **function):
    call = {"index": index, "function": function} | ({"id": f"c{index}"} if "name" in function else {})
    return {"choices": [{"delta": {"tool_calls": [call]}, "finish_reason": None}]}


def last(finish="stop"):
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "prompt_cache_hit_tokens": 4,
        "completion_tokens_details": {"reasoning_tokens": 2},
        "cost": 0.25,
        "tael": {"seconds": 2.0, "first_token_seconds": 0.5, "tokens_per_second": 3.0},
    }
    return {"choices": [{"delta": {}, "finish_reason": finish}], "usage": usage}


def test_an_answer_goes_from_waiting_to_done_and_is_kept(house):
    async def story():
        running = house.start()
        assert (running.phase, house.kept(running).state) == ("waiting", "running")
        await house.send(running, {"object": "tael.progress", "ahead": 2, "prompt_tokens": 9, "computed": 0})
        assert (running.phase, running.ahead) == ("waiting", 2)
        await house.send(running, {"object": "tael.progress", "ahead": 0, "prompt_tokens": 9, "computed": 4})
        assert (running.phase, running.computed, running.prompt_tokens) == ("reading", 4, 9)
        house.clock.now = 1.0
        await house.send(running, thinks("Hm. "))
        assert running.phase == "thinking"
        house.clock.now = 4.0
        await house.send(running, says("Yes"))
        assert (running.phase, running.thought_seconds) == ("answering", 3.0)
        await house.send(running, says(" sir."), last())
        house.service.queue.put_nowait(None)
        await ended(running)
        return running

    running = in_a_loop(story())
    node = house.kept(running)
    assert (node.content, node.reasoning, node.state, node.model) == ("Yes sir.", "Hm. ", "done", "tiny")
    assert node.figures == {
        "finish_reason": "stop",
        "thought_seconds": 3.0,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "reasoning_tokens": 2,
        "cost": 0.25,
        "seconds": 2.0,
        "first_token_seconds": 0.5,
        "tokens_per_second": 3.0,
        "context_tokens": 15,
    }
    assert house.answering.find(running.node) is None
    assert house.service.asked[0][1:] == (LOCAL, True)


def test_what_comes_is_written_some_times_a_second_and_no_oftener(house, monkeypatch):
    writes = []
    update = house.history.update
    monkeypatch.setattr(house.history, "update", lambda *a, **k: (writes.append(k), update(*a, **k)))

    async def story():
        running = house.start()
        for place in range(50):
            house.clock.now = place * WRITE_SECONDS / 10
            await house.send(running, says("x"))
        kept = len(house.kept(running).content)
        assert 30 < kept < 50
        house.service.queue.put_nowait(None)
        await ended(running)

    in_a_loop(story())
    assert len(writes) == 4 + 1  # and the last
    assert writes[-1]["content"] == "x" * 50


@pytest.mark.parametrize("how", ["stop", "close"])
def test_ended_from_outside_it_keeps_its_text_and_stops_the_model(house, how):
    async def story():
        running = house.start()
        await house.send(running, says("Half"))
        if how == "stop":
            house.answering.stop(running.node)
            house.answering.stop(running.node)
        else:
            await house.answering.close()
        await ended(running)
        return running

    running = in_a_loop(story())
    node = house.kept(running)
    assert (node.content, node.state) == ("Half", {"stop": "stopped", "close": "interrupted"}[how])
    assert node.figures["estimated"] and node.figures["completion_tokens"] == 1
    assert house.service.closed


def test_stopped_before_it_began_it_ends_too(house):
    async def story():
        running = house.start()
        house.answering.stop(running.node)
        await ended(running)
        return running

    node = house.kept(in_a_loop(story()))
    assert (node.content, node.state, house.service.asked) == ("", "stopped", [])


@pytest.mark.parametrize(
    "failure, line",
    [
        (ApiError(429, "too many"), "too many"),
        (TaelError("no room"), "no room"),
        (KeyError("x"), "something went wrong"),
    ],
)
def test_a_failure_is_a_line_and_keeps_the_text(house, failure, line):
    async def story():
        running = house.start()
        await house.send(running, says("Half"))
        house.service.queue.put_nowait(failure)
        await ended(running)
        return running

    node = house.kept(in_a_loop(story()))
    assert (node.content, node.state) == ("Half", "error") and line in node.error


def test_going_on_adds_to_the_same_answer_and_its_figures_add_up(house):
    async def story():
        running = house.start()
        await house.send(running, thinks("a"), says("One"), last("length"))
        house.service.queue.put_nowait(None)
        await ended(running)
        again = house.start(onto=house.kept(running))
        assert house.kept(again).state == "running"
        await house.send(again, says(" two"), last())
        house.service.queue.put_nowait(None)
        await ended(again)
        return running, again

    first, again = in_a_loop(story())
    node = house.kept(again)
    assert first.node == again.node
    assert (node.content, node.reasoning, node.state) == ("One two", "a", "done")
    assert (node.figures["cost"], node.figures["completion_tokens"], node.figures["context_tokens"]) == (0.5, 10, 15)
    assert node.figures["finish_reason"] == "stop"
    assert len(house.history.nodes("local", house.head.id)) == 2


def test_parts_of_tool_calls_are_joined(house):
    async def story():
        running = house.start()
        await house.send(
            running,
            calls(0, name="add", arguments='{"a"'),
            calls(1, name="now", arguments=""),
            calls(0, arguments=":1}"),
            calls(1, arguments="{}"),
            last("tool_calls"),
        )
        house.service.queue.put_nowait(None)
        await ended(running)
        return running

    node = house.kept(in_a_loop(story()))
    assert node.tool_calls == [
        {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}},
        {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
    ]


def test_followers_are_told_of_beginnings_and_ends(house):
    async def story():
        before = house.answering.changes(house.head.id)
        running = house.start()
        begun = house.answering.changes(house.head.id)
        assert begun > before and house.answering.of(house.head.id) == [running]
        await house.send(running, says("x"))
        house.service.queue.put_nowait(None)
        await ended(running)
        assert house.answering.changes(house.head.id) > begun and house.answering.of(house.head.id) == []
        assert house.answering.changes(house.head.id + 1) == 0

    in_a_loop(story())


def test_a_conversation_deleted_meanwhile_ends_the_answer_without_a_traceback(house, caplog):
    async def story():
        running = house.start()
        await house.send(running, says("x"))
        house.answering.stop(running.node)
        house.history.delete("local", house.head.id)
        await ended(running)
        assert running.state == "error"

    in_a_loop(story())
    assert caplog.records == []
