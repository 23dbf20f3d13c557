"""A request as the server's store keeps it."""

from __future__ import annotations

from typing import Any

from tael.serve.store import Served


def served(**changes: Any) -> Served:
    """One of the first of March 2025, with `changes`."""
    values: dict[str, Any] = {
        "request_id": "r1",
        "key_id": None,
        "model": "tiny",
        "endpoint": "/chat/completions",
        "started": "2025-03-01T10:00:00+00:00",
        "seconds": 1.5,
        "first_token_seconds": 0.25,
        "prompt_tokens": 100,
        "cached_tokens": 64,
        "completion_tokens": 20,
        "reasoning_tokens": 5,
        "dollars": 0.125,
        "status": 200,
        "finish_reason": "stop",
    }
    return Served(**values | changes)
