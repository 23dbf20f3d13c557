"""Two answers to one prompt: which stands where, what may be voted on, and that a vote is given once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from tael.errors import TaelError
from tael.serve.caller import Caller
from tael.serve.errors import ApiError
from tael.serve.history import History, Vote, standings
from tael.serve.pages.contest import Contest

T = TypeVar("T")
CALLER = Caller(7, "anna")
SECRET = "a stack trace's words"


class Models:
    """`wait` never ends, `broken` and `bug` fail, `silent` says nothing, others say their name."""

    def __init__(self) -> None:
        self.open = 0

    def models(self) -> list[Any]:
        return []

    async def chat(
        self, body: dict[str, Any], caller: Caller, progress: bool = False
    ) -> AsyncIterator[dict[str, Any]]:
        assert caller == CALLER
        self.open += 1
        try:
            name = body["model"]
            if name == "broken":
                raise ApiError(503, "no memory")
            if name == "bug":
                raise RuntimeError(SECRET)
            yield {"choices": [{"delta": {"content": "" if name == "silent" else f"I am {name}"}}]}
            if name == "wait":
                await asyncio.Event().wait()
            yield {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
        finally:
            self.open -= 1


@pytest.fixture
def history(tmp_path):
    history = History(tmp_path / "conversations.sqlite")
    yield history
    history.close()


def body(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Who are you?"}]}


def in_a_loop(work: Coroutine[Any, Any, T]) -> T:
    """In a thread of its own: after a test with a browser, this thread has a loop already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def ended(contest: Contest) -> None:
    async with asyncio.timeout(30):
        while contest.running:
            await asyncio.sleep(0)


def contest_of(history: History, models: Models, seed: int = 0) -> Contest:
    return Contest(models, history, CALLER, random.Random(seed))


def test_a_vote_keeps_what_was_seen(history):
    async def run() -> None:
        contest = contest_of(history, Models())
        contest.begin(body("a"), body("b"), blind=False)
        assert contest.running and not contest.votable and not contest.hidden
        await ended(contest)
        assert [side.model for side in contest.sides] == ["a", "b"]
        assert [side.running.figures["completion_tokens"] for side in contest.sides] == [3, 3]
        assert contest.votable
        await contest.vote("right")
        assert not contest.votable

    in_a_loop(run())
    (vote,) = history.votes("key:7")
    assert (vote.chosen_model, vote.rejected_model) == ("b", "a")
    assert (vote.chosen, vote.rejected, vote.tie, vote.note) == ("I am b", "I am a", False, "open, right")
    assert vote.prompt == body("a")["messages"] and history.votes("local") == []


def test_a_blind_pair_is_drawn_by_lot_and_hidden_until_the_vote(history):
    async def run(seed: int) -> str:
        contest = contest_of(history, Models(), seed)
        contest.begin(body("a"), body("b"), blind=True)
        assert contest.hidden
        await ended(contest)
        assert contest.hidden and [side.running.content for side in contest.sides] == [
            f"I am {side.model}" for side in contest.sides
        ]
        await contest.vote("tie")
        assert not contest.hidden
        return contest.sides[0].model

    assert {in_a_loop(run(seed)) for seed in range(8)} == {"a", "b"}
    assert all(vote.tie and vote.note == "blind, tie" for vote in history.votes("key:7"))


def test_of_two_clicks_one_counts(history):
    async def run() -> list[Any]:
        contest = contest_of(history, Models())
        contest.begin(body("a"), body("b"), blind=True)
        await ended(contest)
        return await asyncio.gather(contest.vote("left"), contest.vote("right"), return_exceptions=True)

    first, second = in_a_loop(run())
    assert first is None and isinstance(second, TaelError) and len(history.votes("key:7")) == 1


@pytest.mark.parametrize(
    ("other", "error"), [("broken", "no memory"), ("bug", "something went wrong"), ("silent", None)]
)
def test_there_is_no_vote_without_two_whole_answers(history, other, error):
    async def run() -> None:
        contest = contest_of(history, Models())
        with pytest.raises(TaelError):
            await contest.vote("left")
        contest.begin(body("a"), body(other), blind=True)
        await ended(contest)
        failed = next(side for side in contest.sides if side.model == other)
        assert (failed.running.error or "").startswith(error or "") and SECRET not in str(failed.running.error)
        assert not contest.votable and contest.hidden == (error is None)
        with pytest.raises(TaelError, match="two whole answers"):
            await contest.vote("left")

    in_a_loop(run())
    assert history.votes("key:7") == []


def test_stop_and_a_new_beginning_end_what_runs(history):
    models = Models()

    async def run() -> None:
        contest = contest_of(history, models)
        contest.begin(body("wait"), body("wait"), blind=False)
        while not all(side.running.content for side in contest.sides):
            await asyncio.sleep(0)
        first = contest.sides
        contest.begin(body("wait"), body("a"), blind=False)
        while not contest.sides[0].running.content:
            await asyncio.sleep(0)
        assert [side.running.state for side in first] == ["stopped", "stopped"] and models.open == 1
        contest.stop()
        await ended(contest)
        assert [side.running.state for side in contest.sides] == ["stopped", "done"]
        assert not contest.votable and models.open == 0

    in_a_loop(run())


def test_a_vote_that_cannot_be_kept_may_be_given_again(history):
    async def run() -> None:
        contest = contest_of(history, Models())
        contest.begin(body("a"), body("b"), blind=True)
        await ended(contest)
        contest.sides[0].messages[0]["x"] = float("nan")
        with pytest.raises(TaelError, match="prompt"):
            await contest.vote("left")
        assert contest.votable and contest.hidden
        contest.sides[0].messages[0].pop("x")
        await contest.vote("left")

    in_a_loop(run())
    assert len(history.votes("key:7")) == 1


def test_standings_count_every_model():
    def vote(chosen: str, rejected: str, tie: bool = False) -> Vote:
        return Vote(0, "local", "", [], "", "", chosen, rejected, tie, "")

    ranked = standings([vote("a", "b"), vote("a", "c"), vote("b", "c"), vote("c", "a", tie=True), vote("b", "b")])
    assert [(each.model, each.won, each.lost, each.even) for each in ranked] == [
        ("a", 2, 0, 1), ("b", 2, 2, 0), ("c", 0, 2, 1),
    ]  # fmt: skip
