"""The request log: one JSON object a line, without what was said unless the user asks for that too."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from tael.serve.errors import ApiError
from tael.serve.store import Served


class Journal:
    """Writes to `out` (None: nowhere)."""

    def __init__(self, out: TextIO | None = sys.stderr) -> None:
        self._out = out

    def write(self, served: Served, caller: str, said: dict[str, Any] | None = None) -> None:
        """One request that was answered, or broken off; `said` only where contents are to be kept."""
        line = {
            "time": served.started,
            "id": served.request_id,
            "key": caller,
            "endpoint": served.endpoint,
            "model": served.model,
            "status": served.status,
            "finish_reason": served.finish_reason,
            "prompt_tokens": served.prompt_tokens,
            "cached_tokens": served.cached_tokens,
            "completion_tokens": served.completion_tokens,
            "seconds": round(served.seconds, 4),
            "first_token_seconds": None
            if served.first_token_seconds is None
            else round(served.first_token_seconds, 4),
            "dollars": round(served.dollars, 12),
        }
        self._line(line | ({"said": said} if said else {}))

    def refused(self, endpoint: str, caller: str | None, error: ApiError, contents: bool) -> None:
        """One that was turned away; why in words only with `contents`, since messages quote what was sent."""
        line = {"time": datetime.now(UTC).isoformat(), "endpoint": endpoint, "key": caller, "status": error.status}
        self._line(line | {"code": error.body()["error"]["code"]} | ({"error": error.message} if contents else {}))

    def _line(self, value: dict[str, Any]) -> None:
        """In ASCII: what clients send may be no text that can be written (half a pair of surrogates)."""
        if self._out is not None:
            print(json.dumps(value), file=self._out, flush=True)
