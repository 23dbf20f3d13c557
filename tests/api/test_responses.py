"""Responses (stateless) with the official openai client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from checks import WEATHER, events
from pydantic import BaseModel

TOOL: Any = {"type": "function", **WEATHER}


def test_an_answer(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="Hi", instructions="Be brief.")
    assert answer.output_text == "Hello there." and answer.status == "completed" and answer.id.startswith("resp_")
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.instructions == "Be brief." and answer.model == "tiny"
    assert answer.usage is not None and answer.usage.output_tokens_details.reasoning_tokens > 0


def test_no_thoughts_on_request(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="Hi", reasoning={"effort": "none"})
    assert [item.type for item in answer.output] == ["message"] and answer.output_text == "Hello there."


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="Hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    whole = client.responses.create(model="tiny", input="Hi")
    assert final.output_text == whole.output_text
    assert final.usage is not None and whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens == whole.usage.input_tokens


def test_a_stream_on_the_wire(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json={"model": "tiny", "input": "Hi", "stream": True})
    found = events(answer.text)
    assert all(name == data["type"] for name, data in found)
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    usage = found[-1][1]["response"]["usage"]
    assert usage["cost"] > 0 and usage["cost"] == pytest.approx(sum(usage["cost_details"].values()))


def test_a_limit_leaves_it_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="Hi", max_output_tokens=3, reasoning={"effort": "none"})
    assert answer.status == "incomplete" and answer.output_text == "Hel"
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"


def test_tools_there_and_back_with_thinking(client: openai.OpenAI) -> None:
    talk: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    first = client.responses.create(model="tiny", input=talk, tools=[TOOL])
    made = [item for item in first.output if item.type == "function_call"]
    assert [item.arguments for item in made] == ['{"city": "Paris"}', '{"city": "Rome", "days": 3}']
    talk += [item.model_dump(exclude_none=True) for item in first.output]
    talk += [{"type": "function_call_output", "call_id": item.call_id, "output": "sunny"} for item in made]
    second = client.responses.create(model="tiny", input=talk, tools=[TOOL])
    assert second.output_text == "The result is 42."
    assert second.usage is not None and first.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0.7 * first.usage.input_tokens


def test_tools_in_a_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="How is the weather?", tools=[TOOL]) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert len(deltas) > 4
    assert [item.name for item in final.output if item.type == "function_call"] == ["weather", "weather"]


class City(BaseModel):
    name: str
    value: int


def test_a_schema_with_the_clients_parser(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model="tiny", input="Say it as JSON", text_format=City)
    assert answer.output_parsed == City(name="Paris", value=2)


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"model": "huge"}, 404, "huge"),
        ({"input": 7}, 422, "input"),
        ({"input": []}, 400, "input"),
        ({"temperature": "hot"}, 422, "temperature"),
        ({"temperature": 9}, 400, "temperature"),
        ({"max_output_tokens": 10**6}, 400, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ],
)
def test_errors_name_the_field(http: httpx.Client, change: Any, status: int, word: str) -> None:
    answer = http.post("/v1/responses", json={"model": "tiny", "input": "Hi"} | change)
    assert (answer.status_code, word in answer.text) == (status, True), answer.text
