"""What goes wrong with a request, as the protocols say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Dialect = Literal["openai", "anthropic"]
"""DeepSeek's and OpenAI's errors look alike; Anthropic's are of their own kind."""

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_balance",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "api_error",
    503: "overloaded_error",
}
_ANTHROPIC_KINDS = _KINDS | {402: "billing_error"}


@dataclass
class ApiError(Exception):
    """Ends a request with an HTTP status; `message` names the field where there is one (`param`)."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    """Seconds after which it may go better."""

    def __str__(self) -> str:
        return self.message

    def body(self, dialect: Dialect = "openai") -> dict[str, Any]:
        """The JSON body of the answer."""
        if dialect == "anthropic":
            kind = _ANTHROPIC_KINDS.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = _KINDS.get(self.status, "api_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code or kind}
        return {"error": error}
