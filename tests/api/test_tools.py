"""Tools with the openai client: calls, streams, choices, strictness, and an agent's loop."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import openai
import pytest
from checks import PLAIN, WEATHER, Json, user
from conftest import call, calls
from scripted import ScriptedModel, loader, scripted_model
from serving import running

from tael.data import Tokenizer
from tael.serve.settings import ModelSpec

TOOL: Any = {"type": "function", "function": WEATHER}
TALK: list[Any] = [{"role": "user", "content": "How is the weather?"}]
WANTED = [{"city": "Paris"}, {"city": "Rome", "days": 3}]


def test_parallel_calls_there_and_back_with_thinking(client: openai.OpenAI, model: ScriptedModel) -> None:
    first = client.chat.completions.create(model="tiny", messages=TALK, tools=[TOOL])
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls" and message.content == "Let me look."
    assert message.reasoning_content == "Let me think."  # type: ignore[attr-defined]
    made: list[Any] = list(message.tool_calls or [])
    assert [json.loads(each.function.arguments) for each in made] == WANTED
    assert len({each.id for each in made}) == 2 and {each.type for each in made} == {"function"}

    talk = [*TALK, message.model_dump(exclude_none=True)]
    talk += [{"role": "tool", "tool_call_id": each.id, "content": "sunny"} for each in made]
    second = client.chat.completions.create(model="tiny", messages=talk, tools=[TOOL])
    assert second.choices[0].message.content == "The result is 42."
    assert first.usage is not None and second.usage is not None
    details = second.usage.prompt_tokens_details
    written = first.usage.prompt_tokens + first.usage.completion_tokens
    assert details is not None and details.cached_tokens is not None
    assert details.cached_tokens > written - 16, "the answer's own tokens are cached too, thoughts included"


def test_calls_in_a_stream(client: openai.OpenAI) -> None:
    """Names and ids come once, at the beginning; arguments piece by piece."""
    made: dict[int, list[Any]] = {}
    stream = client.chat.completions.create(model="tiny", messages=TALK, tools=[TOOL], stream=True)
    reasons = []
    for chunk in stream:
        for choice in chunk.choices:
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for delta in choice.delta.tool_calls or []:
                made.setdefault(delta.index, []).append(delta)
    assert reasons == ["tool_calls"] and sorted(made) == [0, 1]
    for place, parts in made.items():
        assert parts[0].id and parts[0].function.name == "weather" and len(parts) > 2
        assert all(part.id is None and part.function.name is None for part in parts[1:])
        assert json.loads("".join(part.function.arguments or "" for part in parts)) == WANTED[place]


def test_several_choices_each_with_calls(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=TALK, tools=[TOOL], n=2)
    assert [len(choice.message.tool_calls or []) for choice in answer.choices] == [2, 2]
    ids = [each.id for choice in answer.choices for each in choice.message.tool_calls or []]
    assert len(set(ids)) == 4


def test_no_calls_without_tools(client: openai.OpenAI) -> None:
    """What looks like a call is text where no tool was offered."""
    answer = client.chat.completions.create(model="tiny", messages=TALK, tools=[TOOL], tool_choice="none")
    assert not answer.choices[0].message.tool_calls


@pytest.fixture
def obedient(tmp_path: Path, tokenizer: Tokenizer) -> Any:
    """A server whose model calls whatever the prompt has it call."""

    def script(prompt: str) -> str:
        return calls(call("weather", city="Oslo")).split("tool_calls>\n", 1)[1] if "Hi" in prompt else "Hello."

    model = scripted_model(script, tokenizer, 4096)
    with running(tmp_path, [ModelSpec(name="tiny", model="m")], loader({"m": model})) as found:
        yield found


def test_forcing_a_call_leaves_thoughts_out(obedient: Any) -> None:
    """Unless the request speaks of thinking: DeepSeek's format has no thoughts before a forced call."""
    answer = httpx.post(f"{obedient.url}/v1/chat/completions", json=user("Hi", tools=[TOOL], tool_choice="required"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["tool_calls"]


def test_anthropic_forces_no_call_while_thinking(obedient: Any) -> None:
    tool = {"name": "weather", "input_schema": WEATHER["parameters"]}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    body = user("Hi", max_tokens=2000, tools=[tool], tool_choice={"type": "any"}, thinking=thinking)
    answer = httpx.post(f"{obedient.url}/v1/messages", json=body)
    assert answer.status_code == 400 and "tool_choice" in answer.text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_is_forced(obedient: Any, choice: Any) -> None:
    body = user("Hi", tools=[TOOL], tool_choice=choice, **PLAIN)
    answer = httpx.post(f"{obedient.url}/v1/chat/completions", json=body)
    message = answer.json()["choices"][0]["message"]
    assert [json.loads(each["function"]["arguments"]) for each in message["tool_calls"]] == [{"city": "Oslo"}]
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_is_forced_in_anthropics_words(obedient: Any, choice: Json) -> None:
    tool = {"name": "weather", "input_schema": WEATHER["parameters"]}
    body = user("Hi", max_tokens=1000, tools=[tool], tool_choice=choice, **PLAIN)
    answer = httpx.post(f"{obedient.url}/v1/messages", json=body).json()
    assert answer["stop_reason"] == "tool_use", answer
    assert [block["input"] for block in answer["content"]] == [{"city": "Oslo"}]


def test_a_call_is_forced_in_responses(obedient: Any) -> None:
    body = {"model": "tiny", "input": "Hi", "tools": [{"type": "function", **WEATHER}], "tool_choice": "required"}
    answer = httpx.post(f"{obedient.url}/v1/responses", json=body | {"reasoning": {"effort": "none"}}).json()
    assert [json.loads(item["arguments"]) for item in answer["output"]] == [{"city": "Oslo"}], answer


BEHIND = {"type": "string", "pattern": "(?<=x)a"}


def strict(**schema: Any) -> Json:
    return {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"tools": [{"type": "function"}]}, 422, "tools"),
        ({"tools": "none"}, 422, "tools"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, 422, "tools"),
        ({"tool_choice": "always"}, 422, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required", "thinking": {"type": "enabled"}}, 400, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "tools"),
        ({"tools": [strict(type="object", properties={"a": BEHIND})]}, 400, "tools"),
        ({"tools": [strict(type="object", properties={"a": {"type": "nothing"}})]}, 400, "tools"),
        ({"tools": [strict(type="array")]}, 400, "tools"),
        ({"tools": [strict(type="object", properties={"a": {"$ref": "http://localhost/x"}})]}, 400, "tools"),
    ],
)
def test_errors_name_the_field(http: httpx.Client, change: Any, status: int, word: str) -> None:
    answer = http.post("/v1/chat/completions", json=user("Hi", **PLAIN) | change)
    message = answer.json().get("error", {}).get("message", "")
    assert (answer.status_code, word in message) == (status, True), answer.text


# ------------------------------------------------------------------- an agent


def agent_script(prompt: str) -> str:
    """Read the file, multiply what it says, tell the result."""
    if "<tool_result>42" in prompt:
        return "I have it.</think>The answer is 42."
    if "<tool_result>6 7" in prompt:
        return "Now multiply.</think>" + calls(call("calculator", expression="6 * 7"))
    return "First read it.</think>" + calls(call("read_file", name="numbers.txt"))


@pytest.fixture(scope="module")
def agent() -> ModuleType:
    """examples/agent.py."""
    path = Path(__file__).parents[2] / "examples" / "agent.py"
    spec = importlib.util.spec_from_file_location("agent", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_agents_loop(
    agent: ModuleType, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The example with the plain client, thinking on: two tools, one after the other; each turn finds the one before
    in the cache."""
    (tmp_path / "numbers.txt").write_text("6 7")
    monkeypatch.chdir(tmp_path)
    model = scripted_model(agent_script, tokenizer, 8192)
    with (
        running(tmp_path / "state", [ModelSpec(name="agent", model="m")], loader({"m": model})) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        talk = agent.run(client, "agent", "Multiply the numbers in numbers.txt")
    assert talk[-1]["content"] == "The answer is 42."
    assert [said["content"] for said in talk if said["role"] == "tool"] == ["6 7", "42"]
    thoughts = [said["reasoning_content"] for said in talk if said["role"] == "assistant"]
    assert thoughts == ["First read it.", "Now multiply.", "I have it."]
    found = re.findall(r"turn \d: (\d+) tokens read, (\d+) of them from the cache, \$0\.0", capsys.readouterr().out)
    read, cached = zip(*((int(a), int(b)) for a, b in found), strict=True)
    assert len(read) == 3 and cached[0] == 0
    assert all(hit > before - 16 for hit, before in zip(cached[1:], read, strict=False))


@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("calculator", '{"expression": "-(2 + 3) * 4 / 8"}', "-2.5"),
        ("calculator", '{"expression": "1 / 0"}', "error: "),
        ("calculator", '{"expression": "__import__(\'os\')"}', "error: only numbers"),
        ("calculator", '{"expression": "2 ** 99999"}', "error: only numbers"),
        ("read_file", '{"name": "../secret"}', "error: only files of the current folder"),
        ("read_file", '{"name": "missing"}', "error: "),
        ("calculator", "not JSON", "error: "),
        ("shell", "{}", "error: "),
    ],
)
def test_the_agents_tools_trust_nobody(
    agent: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, arguments: str, answer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert agent.run_tool(name, arguments).startswith(answer)
