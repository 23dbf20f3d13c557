"""A server of the pages over a scripted model, as a process of its own: NiceGUI wants one process an app.

    python tests/browser/pages_server.py STATE [--keys]          prints its port

A question is a small script; each word of it makes the model do something:
    think:TEXT  say:TEXT  call:NAME:JSON  length  fail:MESSAGE  progress:AHEAD,COMPUTED,PROMPT
    gate:NAME   waits until POST /control/open/NAME
Underscores stand for spaces, `\\n` for the end of a line; a question that is no script gets an echo. The last bodies
are at /control/bodies.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from tael.serve.caller import Caller
from tael.serve.errors import ApiError
from tael.serve.history import History
from tael.serve.pages import add_pages
from tael.serve.pages.answering import Answering
from tael.serve.prices import DEFAULT_PRICE, Price


@dataclass
class Card:
    name: str
    aliases: tuple[str, ...] = ()
    loaded: bool = True
    context: int | None = 1000
    thinks: bool | None = True
    price: Price = DEFAULT_PRICE


WORDS = ("think:", "say:", "call:", "length", "fail:", "progress:", "gate:")


class ScriptedService:
    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.bodies: list[dict[str, Any]] = []
        self.cards = [Card("tiny"), Card("other", loaded=False, context=2048, thinks=False)]

    def models(self) -> list[Card]:
        return self.cards

    def gate(self, name: str) -> asyncio.Event:
        return self.gates.setdefault(name, asyncio.Event())

    async def chat(self, body: dict[str, Any], caller: Caller, progress: bool = False):
        self.bodies.append(body)
        question = [m for m in body["messages"] if m["role"] != "assistant"][-1]["content"].split("\n\nFile ")[0]
        steps = [step for step in question.split() if step.startswith(WORDS)] or [f"say:Echo:_{question}"]
        if body["messages"][-1].get("prefix"):
            steps = ["say:_and_so_on."]
        written = thought = 0
        finish = "stop"
        for step in steps:
            kind, _, rest = step.partition(":")
            words = rest.replace("_", " ").replace("\\n", "\n")
            if kind == "gate":
                await self.gate(rest).wait()
            elif kind == "fail":
                raise ApiError(503, words)
            elif kind == "progress":
                ahead, computed, prompt = map(int, rest.split(","))
                yield {"object": "tael.progress", "ahead": ahead, "computed": computed, "prompt_tokens": prompt}
            elif kind == "length":
                finish = "length"
            elif kind == "call":
                name, _, arguments = rest.partition(":")
                function = {"name": name, "arguments": arguments}
                number = sum(step.startswith("call:") for step in steps[: steps.index(step)])
                finish = "tool_calls"
                yield chunk({"tool_calls": [{"index": number, "id": f"call_{number}", "function": function}]})
            else:
                for piece in pieces(words):
                    written += 1
                    thought += kind == "think"
                    yield chunk({"reasoning_content" if kind == "think" else "content": piece})
        yield chunk({}, finish) | {"usage": usage(written, thought)}


def pieces(text: str) -> list[str]:
    return [text[i : i + 5] for i in range(0, len(text), 5)]


def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"delta": delta, "finish_reason": finish}]}


def usage(written: int, thought: int) -> dict[str, Any]:
    return {
        "prompt_tokens": 100,
        "completion_tokens": written,
        "prompt_cache_hit_tokens": 64,
        "completion_tokens_details": {"reasoning_tokens": thought},
        "cost": 0.0000123,
        "tael": {"seconds": 1.5, "first_token_seconds": 0.2, "tokens_per_second": 41.2},
    }


def main() -> None:
    state, keys = Path(sys.argv[1]), "--keys" in sys.argv
    app, service = FastAPI(), ScriptedService()
    history = History(state / "conversations.sqlite")
    answering = Answering(service, history)

    @app.post("/control/open/{name}")
    async def open_gate(name: str) -> None:
        service.gate(name).set()

    @app.get("/control/bodies")
    async def bodies() -> list[dict[str, Any]]:
        return service.bodies

    def authenticate(secret: str) -> Caller | None:
        return {"tael-anna": Caller(1, "anna"), "tael-ben": Caller(2, "ben")}.get(secret)

    add_pages(app, service, history, answering, None, authenticate, keys, state)
    listener = socket.create_server(("localhost", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
