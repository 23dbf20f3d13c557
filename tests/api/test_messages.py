"""Messages with the official anthropic client: answers, streams, thinking, stop sequences, tools, errors."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest
from checks import WEATHER, events
from serving import Running

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
THINK: Any = {"type": "enabled", "budget_tokens": 1024}
OFF: Any = {"type": "disabled"}
TOOL: Any = {
    "name": "weather",
    "description": WEATHER["description"],
    "input_schema": WEATHER["parameters"],
}


def test_an_answer(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="tiny", max_tokens=100, messages=HELLO, thinking=OFF)
    assert [block.type for block in answer.content] == ["text"] and answer.content[0].text == "Hello there."
    assert answer.stop_reason == "end_turn" and answer.role == "assistant" and answer.id.startswith("msg_")
    assert answer.model == "tiny" and answer.stop_sequence is None


def test_thinking(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="tiny", max_tokens=2000, messages=HELLO, thinking=THINK)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == "Let me think." and answer.content[1].text == "Hello there."


@pytest.mark.parametrize("base", ["", "/anthropic"])
def test_both_addresses(server: Running, base: str) -> None:
    with anthropic.Anthropic(base_url=server.url + base, api_key="none", max_retries=0) as client:
        answer = client.messages.create(model="tiny", max_tokens=100, messages=HELLO, system="Be brief.")
        assert answer.content[-1].text == "Hello there."
        assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve(
            "tiny"
        ).id == "tiny"


def test_a_stream_says_what_the_whole_answer_says(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model="tiny", max_tokens=2000, messages=HELLO, thinking=THINK) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop" and "thinking" in kinds and "text" in kinds
    whole = claude.messages.create(model="tiny", max_tokens=2000, messages=HELLO, thinking=THINK)
    assert [block.type for block in final.content] == [block.type for block in whole.content]
    assert final.content[0].thinking == whole.content[0].thinking == "Let me think."
    assert final.content[1].text == whole.content[1].text and final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens == whole.usage.input_tokens


def test_a_stream_on_the_wire(http: httpx.Client) -> None:
    body = {"model": "tiny", "max_tokens": 100, "messages": HELLO, "stream": True}
    answer = http.post("/v1/messages", json=body)
    assert all(name == data["type"] for name, data in events(answer.text))
    assert "[DONE]" not in answer.text


def test_usage_and_cost(http: httpx.Client) -> None:
    """Anthropic counts what was cached apart from input_tokens."""
    body = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "Nobody asked this. " * 9}]}
    first, second = (http.post("/v1/messages", json=body).json()["usage"] for _ in range(2))
    assert first["input_tokens"] + first["cache_read_input_tokens"] == (
        second["input_tokens"] + second["cache_read_input_tokens"]
    )
    assert second["cache_read_input_tokens"] > 40 > first["cache_read_input_tokens"]
    assert 0 < second["cost"] < first["cost"]
    streamed = events(http.post("/v1/messages", json=body | {"stream": True}).text)
    [usage] = [data["usage"] for name, data in streamed if name == "message_delta"]
    assert usage["cost"] == pytest.approx(second["cost"])


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_ended_it_is_told(claude: anthropic.Anthropic, stream: bool) -> None:
    options: Any = {"model": "tiny", "max_tokens": 2000, "messages": HELLO, "stop_sequences": ["zzz", "there"]}
    if stream:
        with claude.messages.stream(**options) as found:
            answer = found.get_final_message()
    else:
        answer = claude.messages.create(**options)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "there")
    assert answer.content[-1].text == "Hello "


def test_a_limit_ends_the_answer(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="tiny", max_tokens=3, messages=HELLO, thinking=OFF)
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 3


def test_tools_there_and_back_with_thinking(claude: anthropic.Anthropic) -> None:
    talk: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    first = claude.messages.create(model="tiny", max_tokens=3000, messages=talk, tools=[TOOL], thinking=THINK)
    assert first.stop_reason == "tool_use"
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    made = [block for block in first.content if block.type == "tool_use"]
    assert [block.input for block in made] == [{"city": "Paris"}, {"city": "Rome", "days": 3}]
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "sunny"} for block in made]
    talk += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    second = claude.messages.create(model="tiny", max_tokens=2000, messages=talk, tools=[TOOL], thinking=THINK)
    assert second.content[-1].text == "The result is 42." and second.stop_reason == "end_turn"
    assert (second.usage.cache_read_input_tokens or 0) > 0.7 * first.usage.input_tokens


def test_tools_in_a_stream(claude: anthropic.Anthropic) -> None:
    talk: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    with claude.messages.stream(model="tiny", max_tokens=3000, messages=talk, tools=[TOOL]) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    made = [block for block in final.content if block.type == "tool_use"]
    assert [block.input for block in made] == [{"city": "Paris"}, {"city": "Rome", "days": 3}]
    assert len(parts) > 4 and final.stop_reason == "tool_use"


def test_counting_tokens(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    counted = claude.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.").input_tokens
    body = {"model": "tiny", "max_tokens": 4, "messages": HELLO, "system": "Be brief."}
    usage = http.post("/v1/messages", json=body).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_more_tokens_than_the_context_has_are_what_is_left_of_it(http: httpx.Client) -> None:
    body = {"model": "tiny", "max_tokens": 10**6, "messages": HELLO}
    answer = http.post("/anthropic/v1/messages", json=body)
    assert answer.status_code == 200 and answer.json()["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("change", "kind", "status", "word"),
    [
        ({"model": "huge"}, "not_found_error", 404, "huge"),
        ({"temperature": "hot"}, "invalid_request_error", 422, "temperature"),
        ({"messages": []}, "invalid_request_error", 400, "messages"),
        ({"max_tokens": 4095}, "invalid_request_error", 400, "max_tokens"),
        ({"top_k": "many"}, "invalid_request_error", 422, "top_k"),
    ],
)
def test_errors_in_anthropics_words(http: httpx.Client, change: Any, kind: str, status: int, word: str) -> None:
    body = {"model": "tiny", "max_tokens": 10, "messages": HELLO} | change
    answer = http.post("/anthropic/v1/messages", json={k: v for k, v in body.items() if v is not None})
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert error["type"] == "error" and error["error"]["type"] == kind and word in error["error"]["message"]


def test_the_client_raises_its_own_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="huge"):
        claude.messages.create(model="huge", max_tokens=10, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="tiny", max_tokens=0, messages=HELLO)


def test_a_limit_beyond_the_context_is_lowered(claude: anthropic.Anthropic) -> None:
    """Clients have to name a number, and name large ones."""
    answer = claude.messages.create(model="tiny", max_tokens=64_000, messages=HELLO, timeout=60)
    assert answer.stop_reason == "end_turn" and answer.content[-1].text == "Hello there."


def test_images_are_refused_by_place(http: httpx.Client) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    body = {"model": "tiny", "max_tokens": 9, "messages": [*HELLO, {"role": "user", "content": [image]}]}
    answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 400 and "messages[1].content[0]" in json.dumps(answer.json())
