"""Streaming clients over bare sockets, cheap enough to share two cores with the server they load.

    answers = asyncio.run(load(port, prompts, clients=32, seconds=60))

Each client asks one question after another; with `mischief` some hang up in mid-answer, send bodies that are broken,
or prompts that are too long.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

MALFORMED = (
    b"{",
    b"[]",
    b'{"model": "smol"}',
    b'{"model": "smol", "messages": []}',
    b'{"model": "smol", "messages": [{"role": "user"}]}',
    b'{"model": "smol", "messages": [{"role": "user", "content": "hi"}], "temperature": "warm"}',
    b'{"model": "nobody", "messages": [{"role": "user", "content": "hi"}]}',
    b'{"model": "smol", "messages": [{"role": "user", "content": "\xff"}]}',
    b'{"model": "smol", "messages": [{"role": "user", "content": "hi"}], "max_tokens": -1}',
    b'{"a":' * 50_000,
)


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    hung_up: int = 0
    refused: dict[int, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    seconds: float = 0.0


async def ask(port: int, body: bytes, leave_after: int | None = None) -> tuple[int, str, int, float, float]:
    """Status, text, tokens, seconds to the first token and to the last; hangs up after `leave_after` events."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("localhost", port, limit=1 << 20)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        if status != 200:
            return status, "", 0, 0.0, 0.0
        text, tokens, first, events = [], 0, 0.0, 0
        async for line in reader:
            if not line.startswith(b"data: {"):
                if line.startswith(b"data: [DONE]"):
                    break
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                return 500, chunk["error"]["message"], 0, 0.0, 0.0
            text.append(chunk["choices"][0]["delta"].get("content") or "")
            first = first or time.perf_counter() - began
            events += 1
            if leave_after is not None and events >= leave_after:
                return -1, "".join(text), events, first, 0.0
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
        return (200 if tokens else -2), "".join(text), tokens, first, time.perf_counter() - began
    finally:
        writer.close()


def question(prompt: str, tokens: int) -> bytes:
    body = {"model": "smol", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    return json.dumps(body | {"max_tokens": tokens, "stream": True}).encode()


async def references(port: int, prompts: list[str], tokens: int) -> dict[str, str]:
    """Every prompt's answer when nobody else asks."""
    return {prompt: (await ask(port, question(prompt, tokens)))[1] for prompt in prompts}


async def load(
    port: int,
    prompts: list[str],
    tokens: int,
    clients: int,
    seconds: float,
    mischief: float,
    expected: dict[str, str],
) -> Tally:
    """`clients` at once for so long; answers are compared with `expected`."""
    tally, until = Tally(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.perf_counter() < until:
            roll = chance.random()
            prompt = chance.choice(prompts)
            if roll < mischief / 3:
                status, *_ = await ask(port, chance.choice(MALFORMED))
                tally.refused[status] = tally.refused.get(status, 0) + 1
            elif roll < 2 * mischief / 3:
                status, *_ = await ask(port, question("word " * chance.choice((9_000, 200_000)), tokens))
                tally.refused[status] = tally.refused.get(status, 0) + 1
            elif roll < mischief:
                status, text, *_ = await ask(port, question(prompt, tokens), chance.randrange(1, tokens // 2))
                tally.hung_up += 1
                if not expected[prompt].startswith(text):
                    tally.wrong.append(f"{text!r} does not begin {expected[prompt]!r}")
            else:
                status, text, count, first, whole = await ask(port, question(prompt, tokens))
                if status != 200 or text != expected[prompt]:
                    tally.wrong.append(f"{status}: {text!r} instead of {expected[prompt]!r}")
                tally.answered, tally.tokens = tally.answered + 1, tally.tokens + count
                tally.first.append(first)
                tally.whole.append(whole)

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    tally.seconds = time.perf_counter() - began
    return tally
