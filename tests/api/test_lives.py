"""Requests that end otherwise than by an answer: clients that hang up, engines that break, servers that stop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from checks import Json, chat, check_all_free, content, events, lines, open_stream, until, user
from conftest import script
from scripted import ScriptedModel, ScriptedRunner, loader, scripted_model
from serving import DEADLINE, Running, running

from tael.data import Tokenizer
from tael.serve.settings import ModelSpec

PATHS: dict[str, Json] = {
    "/v1/chat/completions": user("count"),
    "/v1/messages": user("count", max_tokens=2000),
    "/v1/responses": {"model": "tiny", "input": "count"},
    "/v1/completions": {"model": "tiny", "prompt": "<count>"},
}
SHORT: dict[str, Json] = {
    "/v1/chat/completions": {"max_tokens": 9},
    "/v1/messages": {"max_tokens": 9},
    "/v1/responses": {"max_output_tokens": 9},
    "/v1/completions": {"max_tokens": 9},
}
Start = Callable[..., Running]


def endless(prompt: str) -> str:
    """As the usual script, but plain completions go on for long, too."""
    return " ".join(map(str, range(900))) if "<count>" in prompt or "forever" in prompt else script(prompt)


@pytest.fixture
def model(tokenizer: Tokenizer) -> ScriptedModel:
    return scripted_model(endless, tokenizer, 4096)


@pytest.fixture
def start(model: ScriptedModel, tmp_path: Path) -> Iterator[Start]:
    """Starts a server over `model`; it stops at the end."""
    with ExitStack() as stack:

        def start(**options: Any) -> Running:
            specs = [ModelSpec(name="tiny", model="m", context=4096)]
            found = stack.enter_context(running(tmp_path, specs, loader({"m": model}), **options))
            until(lambda: found.service.host.loaded())
            stack.callback(runner(model).gate.set)  # before the server stops: it would wait for the engine
            return found

        yield start


def runner(model: ScriptedModel) -> ScriptedRunner:
    """That of the engine that was opened last."""
    return model.runners[-1]


def hang_up(server: Running, path: str, body: Json, when: Callable[[], Any], before: Callable[[], Any]) -> None:
    """Ask for a whole answer, and close the connection once `when` holds, after `before`."""

    async def work() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE) as client:
            asking = asyncio.ensure_future(client.post(path, json=body))
            while not when():
                await asyncio.sleep(0.002)
            before()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(asyncio.wait_for(work(), DEADLINE))


# -------------------------------------------------------------- hanging up


@pytest.mark.parametrize("path", PATHS)
def test_hanging_up_in_mid_stream(start: Start, model: ScriptedModel, path: str) -> None:
    server = start()
    with open_stream(server, path, PATHS[path]) as response:
        found = lines(response)
        for _ in range(8):
            next(found)
        hosted = server.service.host.loaded()[0]
        assert hosted.engine.pool.blocks.available < hosted.engine.pool.blocks.usable
    check_all_free(server)
    assert runner(model).passes < 700, "it went on to the end"


@pytest.mark.parametrize("path", PATHS)
def test_hanging_up_on_a_whole_answer(start: Start, model: ScriptedModel, path: str) -> None:
    server = start()
    passes = runner(model).passes
    hang_up(server, path, PATHS[path], lambda: runner(model).passes > passes + 4, lambda: None)
    check_all_free(server)
    assert runner(model).passes < passes + 700


def test_hanging_up_while_queued(start: Start, model: ScriptedModel) -> None:
    """The engine is in the middle of a pass for another when the second comes and goes."""
    server = start()
    with open_stream(server, "/v1/chat/completions", user("count")) as response:
        found = lines(response)
        next(found)
        runner(model).gate.clear()
        until(lambda: runner(model).standing)
        body = user("The secret is out of reach")
        hang_up(server, "/v1/chat/completions", body, lambda: len(server.service.visits) == 2, lambda: None)
        until(lambda: len(server.service.visits) == 1)
        runner(model).gate.set()
        assert content(found).endswith(" 199"), "the first is not disturbed"
    check_all_free(server)
    assert len(runner(model).prompts) == 1, "nobody read the second"


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_while_the_prompt_is_read(start: Start, model: ScriptedModel, stream: bool) -> None:
    server = start()
    runner(model).gate.clear()
    body = user("a long story " * 250)

    def reading() -> bool:
        return bool(server.service.host.loaded()[0].engine.pool.scheduler.running)

    if stream:
        with open_stream(server, "/v1/chat/completions", body):
            until(reading)
    else:
        hang_up(server, "/v1/chat/completions", body, reading, lambda: None)
    until(lambda: not server.service.visits)
    runner(model).gate.set()
    check_all_free(server)
    assert runner(model).passes <= 2


def test_hanging_up_frees_all_choices(start: Start, model: ScriptedModel) -> None:
    server = start()
    with open_stream(server, "/v1/chat/completions", user("count", n=5)) as response:
        found = lines(response)
        until(lambda: server.service.worker.running == 5)
        next(found)
    check_all_free(server)


def test_one_of_many_hangs_up_and_the_others_go_on(start: Start) -> None:
    server = start()
    with ExitStack() as stack:
        streams = [stack.enter_context(open_stream(server, "/v1/chat/completions", user("count"))) for _ in range(4)]
        found = [lines(stream) for stream in streams]
        for each in found:
            next(each)
        streams[1].close()
        for place in (0, 2, 3):
            assert content(found[place]).endswith(" 199")
    check_all_free(server)


def test_slow_readers_hold_nobody_up(start: Start) -> None:
    server = start()
    with ExitStack() as stack, httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        for _ in range(8):
            stack.enter_context(open_stream(server, "/v1/chat/completions", user("forever")))
        assert chat(client, "Hi")["choices"][0]["message"]["content"] == "Hello there."
    check_all_free(server)


def test_who_hung_up_is_charged_for_what_was_written(start: Start) -> None:
    server = start()
    with open_stream(server, "/v1/chat/completions", user("count")) as response:
        found = lines(response)
        for _ in range(8):
            next(found)
    check_all_free(server)
    total = until(lambda: server.service.store.totals("model"))[0]
    assert total.requests == 1 and total.output_tokens >= 6 and total.dollars > 0


# ---------------------------------------------------------------- keep-alive


def test_comments_while_nothing_comes(start: Start, model: ScriptedModel) -> None:
    server = start(keep_alive=0.05)
    runner(model).gate.clear()
    with open_stream(server, "/v1/chat/completions", user("Hi")) as response:
        found = lines(response)
        assert [next(found) for _ in range(3)] == [": keep-alive"] * 3
        runner(model).gate.set()
        rest = [line for line in found if line != ": keep-alive"]
    assert rest[0].startswith("data: ") and rest[-1] == "data: [DONE]"


@pytest.mark.parametrize("path", PATHS)
def test_comments_disturb_no_protocol(start: Start, model: ScriptedModel, path: str) -> None:
    server = start(keep_alive=0.05)
    runner(model).gate.clear()
    with open_stream(server, path, PATHS[path]) as response:
        found = lines(response)
        assert next(found) == ": keep-alive"
        runner(model).gate.set()
        assert events("\n".join(next(found) for _ in range(20)))


# ------------------------------------------------------- engines that break

ERRORS: dict[str, Callable[[str | None, Json], str]] = {
    "/v1/chat/completions": lambda name, data: data["error"]["message"],
    "/v1/messages": lambda name, data: data["error"]["message"] if name == data["type"] == "error" else "",
    "/v1/responses": lambda name, data: data["message"] if name == data["type"] == "error" else "",
    "/v1/completions": lambda name, data: data["error"]["message"],
}


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_breaks_in_mid_stream(start: Start, model: ScriptedModel, path: str) -> None:
    """The stream ends in an error of its protocol, and the next request is answered by the model loaded anew."""
    server = start()
    with open_stream(server, path, PATHS[path]) as response:
        found = lines(response)
        for _ in range(4):
            next(found)
        runner(model).failing = True
        rest = list(found)
    name, data = events("\n".join(rest[-2:]))[-1]
    assert "engine failed" in ERRORS[path](name, data), data
    assert "data: [DONE]" not in rest
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        assert chat(client, "Hi")["choices"][0]["message"]["content"] == "Hello there."
    assert len(model.runners) == 2
    check_all_free(server)


@pytest.mark.parametrize("path", PATHS)
def test_an_engine_that_breaks_before_a_whole_answer(start: Start, model: ScriptedModel, path: str) -> None:
    server = start()
    runner(model).failing = True
    with httpx.Client(base_url=server.url, timeout=DEADLINE) as client:
        answer = client.post(path, json=PATHS[path])
        assert answer.status_code == 500 and "engine failed" in answer.json()["error"]["message"]
        assert client.post(path, json=PATHS[path] | SHORT[path]).status_code == 200
    check_all_free(server)


def test_all_who_were_with_the_engine_are_told(start: Start, model: ScriptedModel) -> None:
    server = start()
    runner(model).gate.clear()
    runner(model).failing = True

    async def work() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE) as client:
            asking = [client.post("/v1/chat/completions", json=user(f"n{i}", n=1 + i % 2)) for i in range(6)]
            gathered = asyncio.gather(*asking)
            while len(server.service.visits) < 6:
                await asyncio.sleep(0.002)
            runner(model).gate.set()
            return await gathered

    answers = asyncio.run(work())
    found = {answer.status_code for answer in answers}
    assert 500 in found and found <= {500, 503, 200}, "503: came when the engine was lost; 200: came later"
    check_all_free(server)


# ------------------------------------------------------------------ stopping


def test_nobody_comes_in_while_it_stops_and_who_is_in_finishes(start: Start, model: ScriptedModel) -> None:
    server = start()
    runner(model).gate.clear()
    with (
        httpx.Client(base_url=server.url, timeout=DEADLINE) as client,
        open_stream(server, "/v1/chat/completions", user("Hi")) as response,
    ):
        server.on_loop(server.service.begin_stop)
        until(lambda: server.service.stopping)
        for path, body in PATHS.items():
            answer = client.post(path, json=body)
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        runner(model).gate.set()
        text = "\n".join(lines(response))
    assert text.endswith("data: [DONE]") and '"finish_reason":"stop"' in text
    check_all_free(server)


@pytest.mark.parametrize("path", PATHS)
def test_after_the_grace_what_there_is_is_returned(start: Start, path: str) -> None:
    """As if max_tokens had been reached: with a finish reason, usage and the stream's end."""
    server = start(grace=0.0)
    body = json.loads(json.dumps(PATHS[path]).replace("count", "forever"))
    with open_stream(server, path, body) as response:
        found = lines(response)
        for _ in range(6):
            next(found)
        server.on_loop(server.server.stop)
        text = "\n".join(found)
    reasons = {"/v1/messages": '"stop_reason":"max_tokens"', "/v1/responses": '"response.incomplete"'}
    assert reasons.get(path, "length") in text
    assert '"cost"' in text
    server.thread.join(DEADLINE)
    assert not server.thread.is_alive() and not server.failures


def test_a_whole_answer_after_the_grace(start: Start, model: ScriptedModel) -> None:
    server = start(grace=0.0)

    async def work() -> httpx.Response:
        async with httpx.AsyncClient(base_url=server.url, timeout=DEADLINE) as client:
            asking = asyncio.ensure_future(client.post("/v1/chat/completions", json=user("forever")))
            while runner(model).passes < 12:
                await asyncio.sleep(0.002)
            server.on_loop(server.server.stop)
            return await asking

    answer = asyncio.run(work()).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] >= 10


# ---------------------------------------------------------------- a full house


def test_a_full_house(start: Start, model: ScriptedModel) -> None:
    server = start(max_queue=2)
    runner(model).gate.clear()

    def full() -> None:
        for path, body in PATHS.items():
            answer = httpx.post(server.url + path, json=body)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1, answer.text
            assert "busy" in answer.json()["error"]["message"]

    with open_stream(server, "/v1/chat/completions", user("Hi")):
        two = lambda: len(server.service.visits) == 2  # noqa: E731
        hang_up(server, "/v1/chat/completions", user("Hi", n=2), two, full)
        runner(model).gate.set()
    check_all_free(server)
    assert httpx.post(f"{server.url}/v1/chat/completions", json=user("Hi")).status_code == 200
