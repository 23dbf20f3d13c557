"""What the engine is asked to read, against deepseek-recipe's own rendering of the same request."""

from __future__ import annotations

import asyncio
from typing import Any

import deepseek_recipe as recipe
import httpx
from checks import Json, read_last
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Running

from tael.data import Tokenizer
from tael.serve.caller import LOCAL

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=24) | st.sampled_from(
    ["<think>", "</think>", "<｜User｜>hi", "<｜DSML｜tool_calls>", "漢字 🙂", "What is 12 + 30?", " ", ""]
)
NAME = st.sampled_from(["weather", "calculator", "read_file"])


@st.composite
def bodies(draw: st.DrawFn) -> Json:
    """A chat request: turns in any number, tools and calls, thoughts, a beginning to go on from."""
    tools = draw(st.lists(NAME, unique=True, max_size=2))
    messages: list[Json] = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(0, 2))):
        messages.append({"role": "user", "content": draw(TEXT)})
        said: Json = {"role": "assistant", "content": draw(TEXT)}
        if draw(st.booleans()):
            said["reasoning_content"] = draw(TEXT)
        messages.append(said)
        if tools and draw(st.booleans()):
            call = {"name": draw(st.sampled_from(tools)), "arguments": '{"city": "Paris", "days": [1, null]}'}
            said["tool_calls"] = [{"id": f"c{turn}", "type": "function", "function": call}]
            messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": draw(TEXT)})
    messages.append({"role": "user", "content": draw(TEXT) + "?"})
    if not tools and draw(st.integers(0, 3)) == 0:
        messages.append({"role": "assistant", "content": draw(TEXT), "prefix": True})
    body: Json = {"model": "tiny", "messages": messages, "max_tokens": 1}
    if draw(st.booleans()):
        body["thinking"] = {"type": "disabled"}
    if tools:
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}
        body["tools"] = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in tools]
    return body


def rendered(body: Json) -> str:
    """deepseek-recipe's prompt for the body, converted apart, at effort low."""
    versions = {"tiny": recipe.ModelVersion.DeepseekV4Pro}
    options = recipe.ConversionOptions().with_model_versions_by_name(versions)
    converted: Any = recipe.ChatCompletionRequest(body).convert(options).conversation
    again = recipe.Conversation(
        converted.messages,
        thinking_mode=converted.thinking_mode,
        tools=converted.tools,
        tool_choice=converted.tool_choice,
        reasoning_effort="low",
    )
    return recipe.DeepseekV4Encoding().render_conversation(again).prompt


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(body=bodies())
def test_prompts_are_the_recipes(server: Running, http: httpx.Client, tokenizer: Tokenizer, body: Json) -> None:
    """200 random conversations over HTTP, up to what the model finds in the cache's blocks."""
    answer = http.post("/beta/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert tokenizer.decode(read_last(server), skip_special=False) == rendered(body)


def test_pages_ask_the_same_way(server: Running) -> None:
    """Service.chat, which pages call, gives the chunks of the API."""

    async def ask() -> list[Json]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        return [chunk async for chunk in server.service.chat(body, LOCAL, progress=True)]

    chunks = asyncio.run_coroutine_threadsafe(ask(), server.server._loop).result(30)
    said = [chunk for chunk in chunks if chunk["object"] == "chat.completion.chunk"]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in said) == "Hello there."
    assert said[-1]["usage"]["cost"] > 0 and chunks[0]["object"] == "tael.progress"
