"""What OpenAPI says of the bodies. The protocols' own checks decide; this tells people and tools what to send."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties}


def _nullable(kind: str, **more: Any) -> Schema:
    return {"type": [kind, "null"], **more}


_TEXT: Schema = {"type": "string"}
_MODEL: Schema = {"type": "string", "description": "A name or alias that GET /v1/models lists."}
_STOP: Schema = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 16}, {"type": "null"}]}
_SAMPLING: dict[str, Schema] = {
    "temperature": _nullable("number", minimum=0, maximum=2),
    "top_p": _nullable("number", exclusiveMinimum=0, maximum=1),
    "top_k": _nullable("integer", minimum=0, description="Draw from so many of the likeliest; 0 is off."),
    "min_p": _nullable("number", minimum=0, maximum=1),
    "seed": _nullable("integer", minimum=0),
    "presence_penalty": _nullable("number", minimum=-2, maximum=2),
    "frequency_penalty": _nullable("number", minimum=-2, maximum=2),
    "repetition_penalty": _nullable("number", exclusiveMinimum=0),
    "logit_bias": _nullable("object", additionalProperties={"type": "number"}),
    "loop_guard": _nullable("boolean", description="End an answer that repeats itself; on unless said."),
}
_FUNCTION = _object(
    ["name"], name=_TEXT, description=_TEXT, parameters={"type": "object"}, strict={"type": "boolean"}
)
_TOOL = _object(["type", "function"], type={"const": "function"}, function=_FUNCTION)
_CALL = _object(
    ["id", "type", "function"],
    id=_TEXT,
    type={"const": "function"},
    function=_object(["name", "arguments"], name=_TEXT, arguments=_TEXT),
)
_CHAT_MESSAGE = _object(
    ["role"],
    role={"enum": ["system", "user", "assistant", "tool"]},
    content={"anyOf": [_TEXT, {"type": "null"}]},
    reasoning_content={"anyOf": [_TEXT, {"type": "null"}]},
    tool_calls={"type": "array", "items": _CALL},
    tool_call_id=_TEXT,
    prefix={"type": "boolean", "description": "The answer goes on from here (last message, the assistant's)."},
)
_THINKING = _object(
    ["type"],
    type={"enum": ["enabled", "disabled", "auto"], "description": "auto: as the model likes."},
    budget_tokens={"type": "integer", "minimum": 0, "description": "At most so many tokens of thought."},
)
_FORMAT = _object(["type"], type={"enum": ["text", "json_object", "json_schema"]}, json_schema={"type": "object"})
_BODIES: dict[str, Schema] = {
    "chat": _object(
        ["model", "messages"],
        model=_MODEL,
        messages={"type": "array", "items": _CHAT_MESSAGE, "minItems": 1},
        thinking=_THINKING,
        reasoning_effort={"enum": ["low", "medium", "high"]},
        max_tokens=_nullable("integer", minimum=1),
        max_completion_tokens=_nullable("integer", minimum=1),
        stream=_nullable("boolean"),
        stream_options=_object([], include_usage={"type": "boolean"}),
        stop=_STOP,
        n=_nullable("integer", minimum=1, maximum=16),
        response_format=_FORMAT,
        tools={"type": "array", "items": _TOOL},
        tool_choice={"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}]},
        parallel_tool_calls={"type": "boolean"},
        logprobs=_nullable("boolean"),
        top_logprobs=_nullable("integer", minimum=0, maximum=20),
        **_SAMPLING,
    ),
    "messages": _object(
        ["model", "messages", "max_tokens"],
        model=_MODEL,
        messages={
            "type": "array",
            "minItems": 1,
            "items": _object(
                ["role", "content"],
                role={"enum": ["user", "assistant"]},
                content={"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
            ),
        },
        system=_TEXT,
        max_tokens={"type": "integer", "minimum": 1},
        thinking=_THINKING,
        stream={"type": "boolean"},
        stop_sequences={"type": "array", "items": _TEXT},
        tools={
            "type": "array",
            "items": _object(["name", "input_schema"], name=_TEXT, input_schema={"type": "object"}),
        },
        tool_choice={"type": "object"},
        temperature=_SAMPLING["temperature"],
        top_p=_SAMPLING["top_p"],
        top_k=_SAMPLING["top_k"],
    ),
    "responses": _object(
        ["model", "input"],
        model=_MODEL,
        input={"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}}]},
        instructions=_nullable("string"),
        max_output_tokens=_nullable("integer", minimum=1),
        reasoning=_object([], effort={"enum": ["none", "low", "medium", "high"]}),
        stream={"type": "boolean"},
        text={"type": "object"},
        tools={"type": "array", "items": {"type": "object"}},
        temperature=_SAMPLING["temperature"],
        top_p=_SAMPLING["top_p"],
    ),
    "completions": _object(
        ["model", "prompt"],
        model=_MODEL,
        prompt={"anyOf": [_TEXT, {"type": "array", "items": {"type": "integer", "minimum": 0}}]},
        suffix={"type": ["string", "null"], "description": "What comes after the gap: fill in the middle."},
        max_tokens=_nullable("integer", minimum=1),
        stream=_nullable("boolean"),
        echo=_nullable("boolean"),
        stop=_STOP,
        n=_nullable("integer", minimum=1, maximum=16),
        logprobs=_nullable("integer", minimum=0, maximum=20),
        **_SAMPLING,
    ),
    "model": _object(["model"], model=_MODEL),
}
SUMMARIES = {
    "chat": "Chat completion, as DeepSeek's and OpenAI's API.",
    "messages": "Messages, as Anthropic's API.",
    "responses": "Responses (stateless), as OpenAI's API.",
    "completions": "Completion of text, or of the middle between prompt and suffix.",
}
_ERRORS = {
    400: "A value that cannot be.",
    401: "No key, or an unknown one.",
    402: "The key's budget is spent.",
    403: "From a web page that may not ask.",
    404: "No such model.",
    409: "The model is in use.",
    413: "The body is too large.",
    422: "A field of the wrong type.",
    429: "Too many requests; see Retry-After.",
    500: "The engine failed.",
    503: "Not now; see Retry-After.",
}


def request_body(name: str) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": _BODIES[name]}}}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route; all of them unless some are named."""
    return {status: {"description": text} for status, text in _ERRORS.items() if not statuses or status in statuses}
