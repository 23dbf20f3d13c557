"""What several tests of the API do: wait with a deadline, read streams, look whether everything was given back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from serving import DEADLINE, Running

from tael.serve.prices import DEFAULT_PRICE

Json = dict[str, Any]

WEATHER: Json = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
PLAIN: Json = {"thinking": {"type": "disabled"}}


def until(holds: Callable[[], Any], what: str = "") -> Any:
    """What `holds` gives once that is true."""
    deadline = time.monotonic() + DEADLINE
    while not (found := holds()):
        assert time.monotonic() < deadline, what or "it never came to hold"
        time.sleep(0.002)
    return found


def user(text: str, **more: Any) -> Json:
    """The least body of a chat request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def chat(http: httpx.Client, text: str, **more: Any) -> Json:
    """A chat answer, whole."""
    answer = http.post("/v1/chat/completions", json=user(text, **more))
    assert answer.status_code == 200, answer.text
    return answer.json()


def lines(response: httpx.Response) -> Iterator[str]:
    """Lines of a stream, one by one as they come."""
    return (line for line in response.iter_lines() if line)


def events(text: str) -> list[tuple[str | None, Json]]:
    """(event, data) of a whole stream of server-sent events; comments and [DONE] are left out."""
    found, name = [], None
    for line in text.splitlines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: ") and line != "data: [DONE]":
            found.append((name, json.loads(line.removeprefix("data: "))))
            name = None
    return found


def content(found: Iterable[str]) -> str:
    """What a chat stream of these lines says, thoughts left out."""
    chunks = [data for _, data in events("\n".join(found))]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@contextmanager
def open_stream(running: Running, path: str, body: Json, **headers: str) -> Iterator[httpx.Response]:
    """A response that streams; leaving hangs up."""
    with (
        httpx.Client(base_url=running.url, timeout=DEADLINE, headers=headers) as client,
        client.stream("POST", path, json=body | {"stream": True}) as response,
    ):
        yield response


def read_last(running: Running) -> list[int]:
    """The prompt that the (scripted, only) model was last given."""
    runner: Any = running.service.host.loaded()[0].engine.pool.runner
    return runner.prompts[-1]


def check_all_free(running: Running) -> None:
    """Wait until nobody is in the house; then every block of every cache must be free, and the books in order."""
    until(lambda: not running.service.visits and not running.service.worker.running, "somebody never left")
    for hosted in running.service.host.loaded():
        pool = hosted.engine.pool
        until(lambda pool=pool: not pool.scheduler.busy, "the scheduler is never idle")
        assert pool.blocks.available == pool.blocks.usable
        pool.blocks.check_integrity([])
        pool.scheduler.check_integrity()
        assert hosted.users == 0
    assert running.service.gate.inside == 0


def price_of(usage: Json) -> float:
    """What a chat answer's usage has to cost."""
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    return DEFAULT_PRICE.cost(hit, miss, usage["completion_tokens"]).total
