"""What deepseek-recipe's own parser finds in an answer."""

from __future__ import annotations

import json
from typing import Any

import deepseek_recipe as recipe


def parsed(text: str, in_calls: bool = False, step: int | None = None) -> tuple[str, list[tuple[str, Any]]]:
    """Content and tool calls of `text`, handed over whole, or `step` characters at a time."""
    request = recipe.ConversationRequest(
        recipe.Conversation([recipe.UserMessage("Hi")], thinking_mode=False), recipe.ModelVersion.DeepseekV4Pro
    )
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "model")
    processor = recipe.StreamProcessor(generator, recipe.ParsingOptions(starts_in_tool_calls=in_calls))
    size = step or max(len(text), 1)
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [text]
    chunks = [recipe.InferenceChunk.ready(), *(recipe.InferenceChunk.text(piece, 1) for piece in pieces)]
    chunks.append(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
    deltas = [
        choice["delta"]
        for chunk in [*(made for each in chunks for made in processor.push(each)), *processor.finish()]
        for choice in json.loads(chunk.to_json())["choices"]
    ]
    calls: dict[int, list[str]] = {}
    for part in [call for delta in deltas for call in delta.get("tool_calls") or []]:
        call = calls.setdefault(part["index"], ["", ""])
        call[0] += part["function"].get("name") or ""
        call[1] += part["function"].get("arguments") or ""
    content = "".join(delta.get("content") or "" for delta in deltas)
    return content, [(name, json.loads(arguments)) for name, arguments in calls.values()]
