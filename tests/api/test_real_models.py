"""Real models of random weights behind the server, of both kinds of attention: whatever they say is valid, the same
seed says the same, and log-probabilities are the engine's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import torch
from checks import PLAIN, Json, chat, check_all_free, user
from pydantic import BaseModel, ConfigDict, Field
from scripted import make_tokenizer
from serving import Running, running

from tael.data import Tokenizer
from tael.engine import EngineSettings, SamplingParams
from tael.loading import Loaded
from tael.model import ModelConfig, build_model
from tael.serve.settings import ModelSpec

CONTEXT = 4096
SHAPES: dict[str, dict[str, Any]] = {
    "mla": {
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
    },
    "gqa": {"model_type": "llama", "num_key_value_heads": 1, "intermediate_size": 48},
}


def random_model(shape: str, tokenizer: Tokenizer) -> Loaded:
    """Weights large enough that it says something."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **size, **SHAPES[shape])
    model = build_model(config, seed=3, zero_residual=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return Loaded(shape, model, tokenizer, Path(shape), EngineSettings(backend="torch", block_size=8))


@pytest.fixture(scope="module", params=SHAPES)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return random_model(request.param, make_tokenizer())


@pytest.fixture(scope="module")
def real(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    spec = ModelSpec(name="tiny", model="m", context=CONTEXT, sequences=4)
    with running(tmp_path_factory.mktemp("state"), [spec], lambda spec, notify: loaded) as found:
        yield found


@pytest.fixture(scope="module")
def http(real: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real.url, timeout=60) as client:
        yield client


class Place(BaseModel):
    """Of few words, so that random weights come to its end."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome", "漢字"]
    days: int = Field(ge=0, le=99)
    sunny: bool
    tags: list[Literal["a", "b"]] = Field(max_length=3)


SCHEMA = Place.model_json_schema()
FORMAT: Json = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}
STRICT: Json = {
    "type": "function",
    "function": {"name": "visit", "description": "Go there.", "strict": True, "parameters": SCHEMA},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("thinking", [PLAIN["thinking"], {"type": "enabled", "budget_tokens": 12}])
def test_answers_follow_the_schema(http: httpx.Client, seed: int, thinking: Json) -> None:
    """Thoughts are free; the answer after them is not."""
    answer = chat(http, "Say JSON", seed=seed, thinking=thinking, response_format=FORMAT, max_tokens=400)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    Place.model_validate_json(choice["message"]["content"])


def test_answers_follow_the_schema_in_all_protocols(http: httpx.Client) -> None:
    text = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}
    body: Json = {"model": "tiny", "input": "Say JSON", "text": text, "reasoning": {"effort": "none"}}
    answer = http.post("/v1/responses", json=body).json()
    Place.model_validate_json(answer["output"][-1]["content"][0]["text"])
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    body = user("Say JSON", max_tokens=400, output_config=form, **PLAIN)
    answer = http.post("/v1/messages", json=body).json()
    Place.model_validate_json(answer["content"][-1]["text"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"output_format": 3}, "output_format"),
        ({"output_format": {"type": "json_schema", "schema": {"type": "nothing"}}}, "output_"),
    ],
)
def test_a_schema_in_messages_that_is_none(http: httpx.Client, change: Json, word: str) -> None:
    answer = http.post("/v1/messages", json=user("Say JSON", max_tokens=9, **change))
    assert answer.status_code in (400, 422) and word in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("seed", range(4))
def test_json_objects_are_objects(http: httpx.Client, seed: int) -> None:
    answer = chat(
        http, "Say JSON", seed=seed, response_format={"type": "json_object"}, max_tokens=300, temperature=0.3, **PLAIN
    )
    [choice] = answer["choices"]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    else:
        assert choice["message"]["content"].lstrip().startswith("{")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "visit"}}])
def test_forced_calls_are_valid(http: httpx.Client, seed: int, choice: Any) -> None:
    body: Json = {"tools": [STRICT], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 1000}
    answer = chat(http, "Go", seed=seed, **body, **PLAIN)
    assert answer["choices"][0]["finish_reason"] == "tool_calls", answer
    [made] = answer["choices"][0]["message"]["tool_calls"]
    assert made["function"]["name"] == "visit"
    Place.model_validate_json(made["function"]["arguments"])


def test_forced_calls_are_valid_in_anthropics_words(http: httpx.Client) -> None:
    tool = {"name": "visit", "input_schema": SCHEMA, "strict": True}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    body = user("Go", max_tokens=1000, tools=[tool], tool_choice=choice)
    answer = http.post("/v1/messages", json=body).json()
    assert answer["stop_reason"] == "tool_use", answer
    [made] = [block for block in answer["content"] if block["type"] == "tool_use"]
    Place.model_validate(made["input"])


@pytest.mark.parametrize("seed", range(2))
def test_strict_tools_are_strict_when_they_are_called(http: httpx.Client, loaded: Loaded, seed: int) -> None:
    """A bias lures the model into calling, which it may do or leave; inside a call the grammar has the last word."""
    [opened], dsml = loaded.tokenizer.encode("<"), loaded.tokenizer.token_id("｜DSML｜")
    bias = {str(opened): 60, str(dsml): 100}
    body: Json = {"tools": [STRICT], "logit_bias": bias, "max_tokens": 500, "parallel_tool_calls": False}
    answer = chat(http, "Go", seed=seed, **body, **PLAIN)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls", answer
    [made] = choice["message"]["tool_calls"]
    Place.model_validate_json(made["function"]["arguments"])


def said(http: httpx.Client, **more: Any) -> list[str]:
    return [choice["message"]["content"] for choice in chat(http, "Hi", max_tokens=16, **PLAIN, **more)["choices"]]


def test_the_same_seed_says_the_same(http: httpx.Client) -> None:
    assert said(http, seed=5) == said(http, seed=5) != said(http, seed=6)
    assert said(http) != said(http)
    assert said(http, temperature=0) == said(http, temperature=0, seed=9)


def test_choices_count_up_from_the_seed(http: httpx.Client) -> None:
    assert said(http, seed=5, n=3) == [*said(http, seed=5), *said(http, seed=6), *said(http, seed=7)]


def test_a_stream_and_company_change_nothing(real: Running, http: httpx.Client) -> None:
    """Alone and whole, or streamed beside others."""
    import asyncio

    async def one(client: httpx.AsyncClient, seed: int) -> str:
        body = user("Hi", max_tokens=16, seed=seed, stream=True, **PLAIN)
        text = (await client.post("/v1/chat/completions", json=body)).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        return "".join(each["delta"].get("content") or "" for chunk in chunks for each in chunk["choices"])

    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=real.url, timeout=60) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(6)))

    assert asyncio.run(together()) == [said(http, seed=seed)[0] for seed in range(6)]
    check_all_free(real)


def test_logprobs_are_the_engines(http: httpx.Client, loaded: Loaded) -> None:
    tokenizer = loaded.tokenizer
    prompt = tokenizer.encode_with_special("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>")
    params = SamplingParams(max_tokens=12, seed=5, logprobs=3, stop_ids=tokenizer.stop_ids)
    engine = loaded.engine(CONTEXT)
    wanted = engine.submit(prompt, params)
    while engine.busy:
        engine.step()
    body: Json = {"logprobs": True, "top_logprobs": 3, "seed": 5, "max_tokens": 12}
    found = chat(http, "Hi", **body, **PLAIN)["choices"][0]["logprobs"]["content"]
    silent = tokenizer.special_ids
    shown = [place for place, token in enumerate(wanted.output) if token not in silent]
    assert [each["logprob"] for each in found] == pytest.approx([wanted.logprobs[place] for place in shown], abs=1e-4)
    for each, place in zip(found, shown, strict=True):
        top = [value for _, value in wanted.top[place]]
        assert [value["logprob"] for value in each["top_logprobs"]] == pytest.approx(top[:3], abs=1e-4)

    plain: Json = {"model": "tiny", "prompt": prompt, "logprobs": 3, "seed": 5, "max_tokens": 12}
    legacy = http.post("/v1/completions", json=plain).json()["choices"][0]["logprobs"]
    assert legacy["token_logprobs"] == pytest.approx(wanted.logprobs, abs=1e-4)


def test_stop_strings_from_real_text(http: httpx.Client) -> None:
    """Whatever letter its greedy answer has in the middle ends it there."""
    [whole] = said(http, temperature=0)
    stop = whole[len(whole) // 2]
    assert said(http, temperature=0, stop=[stop]) == [whole.split(stop)[0]]
