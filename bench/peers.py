"""Other engines in processes of their own, for benchmarks that take turns with them.

    with Peer("llama_cpp", model="model.gguf", threads=2) as peer:
        seconds = peer.do("decode", prompt=128, tokens=64)["seconds"]

A peer sleeps on its pipe while it is not its turn, and times its own work, so neither side pays for the other's
threads or for the pipe. The children are bench/peer_NAME.py; each reads a JSON object a line and answers with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

SETTLE_SECONDS = 0.05
"""Before every turn: the other side's threads spin a while after their last loop."""


class Peer:
    """A child process that runs another engine. Raises RuntimeError with its last words when it fails."""

    def __init__(self, name: str, environment: Mapping[str, str] | None = None, **setup: Any) -> None:
        self.name = name
        program = Path(__file__).with_name(f"peer_{name}.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.described = self.do("setup", **setup)

    def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have the peer do something and return its answer."""
        assert self._process.stdin and self._process.stdout and self._process.stderr
        time.sleep(SETTLE_SECONDS)
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name} ended: {self._process.stderr.read()[-800:]}")
        time.sleep(SETTLE_SECONDS)
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """The child's loop: one JSON object a line in, one out. What libraries print goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        answer = handlers[request.pop("do")](**request)
        out.write(json.dumps(answer) + "\n")
        out.flush()


def prompt_tokens(count: int, seed: int, vocabulary: int = 49152) -> list[int]:
    """The same `count` token ids on every side: a linear congruential sequence, special ids left out."""
    tokens, state = [], seed * 2654435761 % 2**32
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        tokens.append(100 + (state >> 8) % (vocabulary - 200))
    return tokens
