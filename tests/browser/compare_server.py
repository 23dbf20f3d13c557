"""The side-by-side page over models that say what the test wants: `python compare_server.py HISTORY`.

An answer begins, then waits until the test posts to /go, so that what is shown in between can be looked at.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from nicegui import ui

from tael.serve.caller import LOCAL
from tael.serve.errors import ApiError
from tael.serve.history import History
from tael.serve.pages.compare import compare_page
from tael.serve.pages.frame import frame, serve_static

EVIL = "<script>document.title='stolen'</script><img src=x onerror=\"document.title='stolen'\">"


@dataclass
class Card:
    name: str
    thinks: bool | None
    loaded: bool = True
    context: int = 4096


class Scripted:
    """Models by name: big thinks first, small does not, evil writes HTML, broken fails."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.bodies: list[dict[str, Any]] = []
        self.open = 0

    def models(self) -> list[Card]:
        return [Card("big", True), Card("small", False), Card(EVIL, None), Card("broken", False)]

    async def chat(self, body: dict[str, Any], caller: Any, progress: bool = False) -> AsyncIterator[dict[str, Any]]:
        self.bodies.append(body)
        name, asked = body["model"], body["messages"][-1]["content"]
        if name == "broken":
            raise ApiError(503, "the model is out of <b>memory</b>")
        self.open += 1
        try:
            yield {"object": "tael.progress", "ahead": 0, "prompt_tokens": 7, "computed": 7}
            if name == "big":
                yield piece(reasoning_content="Let me see, ")
            yield piece(**{"reasoning_content" if name == "big" else "content": f"{asked} begins"})
            await self.go.wait()
            yield piece(content=f"\n\n{name.title()} says **done** {EVIL if name == EVIL else ''}")
            yield piece("stop") | {"usage": usage(12 if name == "big" else 34)}
        finally:
            self.open -= 1


def piece(finish: str | None = None, **delta: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice], "usage": None}


def usage(tokens: int) -> dict[str, Any]:
    speed = {"seconds": 1.5, "first_token_seconds": 0.2, "tokens_per_second": tokens / 1.5}
    return {
        "prompt_tokens": 7,
        "completion_tokens": tokens,
        "prompt_cache_hit_tokens": 4,
        "cost": 0.00012,
        "tael": speed,
    }


def main(path: str) -> None:
    history, app = History(path), FastAPI()
    scripted = Scripted()

    @ui.page("/compare")
    def page() -> None:
        with frame("Compare", "/compare"):
            compare_page(scripted, history, LOCAL, random.Random(1))

    @app.post("/go")
    async def go() -> None:
        scripted.go.set()

    @app.post("/hold")
    async def hold() -> None:
        scripted.go.clear()

    @app.get("/state")
    async def state() -> dict[str, Any]:
        return {"bodies": scripted.bodies, "open": scripted.open}

    serve_static()
    ui.run_with(app, title="Tael", tailwind=False, reconnect_timeout=0.2)
    listener = socket.create_server(("localhost", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
