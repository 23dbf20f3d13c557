"""Models with a chat template of their own, as SmolLM2, and base models with none, behind the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import tokenizers
from checks import PLAIN, WEATHER, chat, check_all_free, user
from scripted import ScriptedModel, loader, make_tokenizer, scripted_model
from serving import Running, running
from tokenizers import AddedToken

from tael.data import Tokenizer
from tael.serve.settings import ModelSpec

CHATML = """\
{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
TOOL: Any = {"type": "function", "function": WEATHER}


def foreign(template: str | None) -> Tokenizer:
    """A small tokenizer without DeepSeek's tokens."""
    table = json.loads(make_tokenizer().backend.to_str())
    words = table["model"]["vocab"]
    for added in table["added_tokens"]:
        words[f"unused{added['id']}"] = words.pop(added["content"])
    table["added_tokens"] = []
    backend = tokenizers.Tokenizer.from_str(json.dumps(table))
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    config = {"eos_token": "<|im_end|>" if template else "<|endoftext|>"}
    return Tokenizer(backend, config | ({"chat_template": template} if template else {}))


def hermes(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def script(prompt: str) -> str:
    if "<|im_start|>" not in prompt:
        return " Paris."
    said = prompt.rsplit("<|im_start|>user\n", 1)[-1]
    if "sunny" in prompt:
        return "It is sunny."
    if "must" in said:
        return hermes("weather", city="Oslo")
    if "weather" in said:
        return "Let me look.\n" + hermes("weather", city="Paris") + "\n" + hermes("weather", city="Rome", days=3)
    return '{"name": "Paris", "value": 2}' if "JSON" in said else "Hello there."


@pytest.fixture(scope="module")
def template() -> ScriptedModel:
    return scripted_model(script, foreign(CHATML), 4096)


@pytest.fixture(scope="module")
def models(template: ScriptedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    found = {"t": template, "b": scripted_model(script, foreign(None), 1024)}
    specs = [ModelSpec(name="tiny", model="t"), ModelSpec(name="base", model="b")]
    with running(tmp_path_factory.mktemp("state"), specs, loader(found)) as server:
        yield server


@pytest.fixture(scope="module")
def http(models: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=models.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def client(models: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{models.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


def test_it_reads_its_own_template(http: httpx.Client, template: ScriptedModel) -> None:
    body = user("Hi <|im_end|>", system="x")
    body["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    ids = template.runners[-1].prompts[-1]
    text = template.tokenizer.decode(ids, skip_special=False)
    wanted = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == wanted
    assert [
        text for text in map(template.tokenizer.decode, ([i] for i in ids if i in template.tokenizer.special_ids))
    ]
    assert sum(i in template.tokenizer.special_ids for i in ids) == 5, "what the user spells is no special token"


@pytest.mark.parametrize("thinking", [None, {"type": "enabled"}, {"type": "disabled"}, {"type": "auto"}])
@pytest.mark.parametrize("stream", [False, True])
def test_chat_with_a_model_that_cannot_think(client: openai.OpenAI, thinking: Any, stream: bool) -> None:
    """Whatever is asked of it."""
    options: Any = {"extra_body": {"thinking": thinking} if thinking else {}}
    messages: Any = [{"role": "user", "content": "Hi"}]
    if not stream:
        [choice] = client.chat.completions.create(model="tiny", messages=messages, **options).choices
        assert choice.message.content == "Hello there." and choice.finish_reason == "stop"
        assert getattr(choice.message, "reasoning_content", None) is None
        return
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True, **options))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "Hello there."


@pytest.mark.parametrize("stop", ["there", " t"])
def test_stop(http: httpx.Client, stop: str) -> None:
    [choice] = chat(http, "Hi", stop=stop)["choices"]
    assert choice["message"]["content"] == "Hello there.".split(stop)[0] and choice["finish_reason"] == "stop"
    answer = http.post("/v1/messages", json=user("Hi", max_tokens=99, stop_sequences=[stop])).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["content"][-1]["text"] == "Hello there.".split(stop)[0]


def test_logprobs(http: httpx.Client) -> None:
    found = chat(http, "Hi", logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in found) == "Hello there."
    assert all(len(each["top_logprobs"]) == 2 for each in found)


def test_logprobs_beside_tools_are_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=user("Hi", logprobs=True, tools=[TOOL]))
    assert answer.status_code == 400 and "logprobs" in answer.json()["error"]["message"]


def test_json(http: httpx.Client) -> None:
    answer = chat(http, "JSON", response_format={"type": "json_object"})
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"name": "Paris", "value": 2}


def test_tools_there_and_back(client: openai.OpenAI) -> None:
    """Hermes' calls come out as anybody's."""
    talk: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    message = client.chat.completions.create(model="tiny", messages=talk, tools=[TOOL]).choices[0].message
    made: list[Any] = list(message.tool_calls or [])
    assert [json.loads(each.function.arguments) for each in made] == [{"city": "Paris"}, {"city": "Rome", "days": 3}]
    assert (message.content or "").strip() == "Let me look."
    talk.append(message.model_dump(exclude_none=True))
    talk += [{"role": "tool", "tool_call_id": each.id, "content": "sunny"} for each in made]
    again = client.chat.completions.create(model="tiny", messages=talk, tools=[TOOL])
    assert again.choices[0].message.content == "It is sunny."


def test_tools_in_a_stream(client: openai.OpenAI) -> None:
    talk: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    arguments = ["", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=talk, tools=[TOOL], stream=True):
        for choice in chunk.choices:
            for delta in choice.delta.tool_calls or []:
                arguments[delta.index] += (delta.function and delta.function.arguments) or ""
    assert [json.loads(each) for each in arguments] == [{"city": "Paris"}, {"city": "Rome", "days": 3}]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_call_is_forced(http: httpx.Client, path: str) -> None:
    if path == "/v1/messages":
        tool = {"name": "weather", "input_schema": WEATHER["parameters"]}
        body = user("You must", max_tokens=900, tools=[tool], tool_choice={"type": "any"})
        answer = http.post(path, json=body).json()
        assert [block.get("input") for block in answer["content"]] == [{"city": "Oslo"}]
        return
    [choice] = chat(http, "You must", tools=[TOOL], tool_choice="required", **PLAIN)["choices"]
    [made] = choice["message"]["tool_calls"]
    assert json.loads(made["function"]["arguments"]) == {"city": "Oslo"} and choice["finish_reason"] == "tool_calls"


def test_prefix(http: httpx.Client, template: ScriptedModel) -> None:
    body = user("Hi")
    body["messages"].append({"role": "assistant", "content": "Well: ", "prefix": True})
    answer = http.post("/beta/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "Hello there."
    text = template.tokenizer.decode(template.runners[-1].prompts[-1], skip_special=False)
    assert text.endswith("<|im_start|>assistant\nWell: ")


# ---------------------------------------------------------------- base models


def test_a_base_model_completes(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": "base", "prompt": "The capital is"}).json()
    assert answer["choices"][0]["text"] == " Paris."


def test_a_base_model_does_not_converse_and_says_so(models: Running, http: httpx.Client) -> None:
    for path, more in (("/v1/chat/completions", {}), ("/v1/messages", {"max_tokens": 9})):
        answer = http.post(path, json=user("Hi", **more) | {"model": "base"})
        assert answer.status_code == 400
        assert "no chat format" in answer.text and "/v1/completions" in answer.text
    answer = http.post("/v1/responses", json={"model": "base", "input": "Hi"})
    assert answer.status_code == 400 and "/v1/completions" in answer.text
    answer = http.post("/v1/completions", json={"model": "base", "prompt": "x", "suffix": "y"})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("suffix:")
    check_all_free(models)


def test_both_are_listed(http: httpx.Client) -> None:
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert set(cards) == {"tiny", "base"} and not cards["base"]["thinks"]
