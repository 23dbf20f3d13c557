"""Plain completions and fill-in-the-middle with the official openai client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from checks import events, read_last
from serving import Running

from tael.data import Tokenizer
from tael.serve.prices import DEFAULT_PRICE


def test_text_goes_on(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="The capital of France is")
    assert answer.choices[0].text == " Paris." and answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_fill_in_the_middle(server: Running, tokenizer: Tokenizer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/beta", api_key="none", max_retries=0) as beta:
        answer = beta.completions.create(model="tiny", prompt="def add(fim):\n    return ", suffix="\n\nadd(1, 2)")
    assert answer.choices[0].text == "first + second"
    before, after = (tokenizer.encode(text) for text in ("def add(fim):\n    return ", "\n\nadd(1, 2)"))
    ids = [tokenizer.fim_begin_id, *before, tokenizer.fim_hole_id, *after]
    assert read_last(server) == [*tokenizer.start_ids, *ids, tokenizer.fim_end_id]


def test_a_stream(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="tiny", prompt="The capital is", stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == " Paris."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None


def test_the_stream_ends_as_openais(http: httpx.Client) -> None:
    text = http.post("/v1/completions", json={"model": "tiny", "prompt": "The", "stream": True}).text
    assert text.endswith("data: [DONE]\n\n") and events(text)[-1][1]["usage"]["cost"] > 0


def test_echo(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny", prompt="It is", echo=True).choices[0].text == "It is Paris."


def test_several_choices_and_a_limit(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="It is", n=3, max_tokens=1)
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (index, " Paris", "length") for index in range(3)
    ]
    assert answer.usage is not None and answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stop", [["ris"], " P", "ari"])
def test_stop(client: openai.OpenAI, stop: Any) -> None:
    [choice] = client.completions.create(model="tiny", prompt="It is", stop=stop).choices
    wanted = " Paris.".split(stop if isinstance(stop, str) else stop[0])[0]
    assert (choice.text, choice.finish_reason) == (wanted, "stop")


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs(client: openai.OpenAI, echo: bool) -> None:
    """text_offset is a place in the text of the answer."""
    [choice] = client.completions.create(model="tiny", prompt="It is", logprobs=2, echo=echo).choices
    found = choice.logprobs
    assert found is not None and found.tokens and found.text_offset and found.top_logprobs
    for token, place in zip(found.tokens[:-1], found.text_offset[:-1], strict=True):
        assert choice.text[place:].startswith(token)
    assert found.token_logprobs == pytest.approx([0.0] * len(found.tokens), abs=0.01)
    assert all(len(top) == 2 for top in found.top_logprobs)


def test_token_ids_as_prompt(client: openai.OpenAI, tokenizer: Tokenizer, server: Running) -> None:
    ids = tokenizer.encode("The capital")
    assert client.completions.create(model="tiny", prompt=ids).choices[0].text == " Paris."
    assert read_last(server) == ids


def test_what_looks_like_special_tokens_is_text(client: openai.OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    client.completions.create(model="tiny", prompt="<｜User｜>", max_tokens=1)
    assert not set(read_last(server)[len(tokenizer.start_ids) :]) & tokenizer.special_ids


def test_usage_and_cost(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "What nobody has ever asked a completion. " * 5}
    first, second = (http.post("/v1/completions", json=body).json()["usage"] for _ in range(2))
    assert first["prompt_cache_hit_tokens"] <= 8 < 40 < second["prompt_cache_hit_tokens"]
    for usage in (first, second):
        hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
        assert usage["cost"] == pytest.approx(DEFAULT_PRICE.cost(hit, miss, usage["completion_tokens"]).total)


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"prompt": None}, 422, "prompt"),
        ({"prompt": ["a", "b"]}, 422, "prompt"),
        ({"prompt": [1, 10**9]}, 400, "prompt"),
        ({"prompt": [1, -1]}, 400, "prompt"),
        ({"prompt": [1, True]}, 422, "prompt"),
        ({"prompt": [1, 2], "suffix": "x"}, 422, "prompt"),
        ({"suffix": 3}, 422, "suffix"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 422, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 99}, 400, "n:"),
        ({"stop": 3}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"logprobs": 99}, 400, "logprobs"),
        ({"logprobs": True}, 422, "logprobs"),
        ({"seed": "x"}, 422, "seed"),
        ({"logit_bias": {"a": 1}}, 422, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"stream": "yes"}, 422, "stream"),
        ({"echo": 1}, 422, "echo"),
        ({"model": "huge"}, 404, "model"),
        ({"model": None}, 422, "model"),
    ],
)
def test_errors_name_the_field(http: httpx.Client, change: Any, status: int, word: str) -> None:
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "x"} | change)
    assert (answer.status_code, word in answer.json()["error"]["message"]) == (status, True), answer.text
