"""Chat Completions with the official openai client: answers, streams, thoughts, usage, cost, stop, n, logprobs."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from checks import PLAIN, chat, events, price_of, user
from pydantic import BaseModel
from scripted import ScriptedModel

from tael.data import Tokenizer

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


def test_an_answer_with_thoughts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert choice.message.content == "Hello there."
    assert choice.message.reasoning_content == "Let me think."  # type: ignore[attr-defined]
    assert answer.model == "tiny" and answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"


def test_an_answer_without_thoughts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, extra_body=PLAIN)
    assert answer.choices[0].message.content == "Hello there."
    assert getattr(answer.choices[0].message, "reasoning_content", None) is None
    assert answer.usage is not None and answer.usage.completion_tokens_details is None


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    thought, said, reasons, usages = "", "", [], []
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        if chunk.usage is not None:
            usages.append(chunk.usage)
        for choice in chunk.choices:
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            said += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (thought, said, reasons) == ("Let me think.", "Hello there.", ["stop"])
    [usage] = usages
    whole = client.chat.completions.create(model="tiny", messages=HELLO).usage
    assert whole is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert usage.completion_tokens_details == whole.completion_tokens_details


def test_a_stream_on_the_wire(http: httpx.Client) -> None:
    """Each event is `data:` and a blank line; the last is [DONE]; several steps come in several events."""
    answer = http.post("/chat/completions", json=user("Hi", stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: ") for part in parts[:-1])
    found = [data for _, data in events(answer.text)]
    assert len({data["id"] for data in found}) == 1 and {data["object"] for data in found} == {
        "chat.completion.chunk"
    }
    assert found[0]["choices"][0]["delta"]["role"] == "assistant" and len(found) > 8


def test_usage_without_include_usage(http: httpx.Client) -> None:
    """OpenAI's clients add up every usage they see; there is at most one, in the last chunk."""
    found = [data for _, data in events(http.post("/v1/chat/completions", json=user("Hi", stream=True)).text)]
    assert not any(data.get("usage") for data in found[:-1])


def test_tokens_are_counted(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO)
    usage = answer.usage
    assert usage is not None and usage.completion_tokens_details is not None
    prompt = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>"
    assert usage.prompt_tokens == len(tokenizer.encode_with_special(prompt))
    thought = len(tokenizer.encode("Let me think."))
    assert usage.completion_tokens_details.reasoning_tokens == thought
    said = len(tokenizer.encode("Hello there."))
    assert usage.completion_tokens == thought + said + 2  # </think> and the end
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_second_time_the_prompt_is_cached_and_cheaper(http: httpx.Client) -> None:
    text = "What is the capital of a country that nobody has asked about so far? " * 3
    first, second = (chat(http, text)["usage"] for _ in range(2))
    assert first["prompt_cache_hit_tokens"] <= 8  # the words every prompt begins with
    assert second["prompt_cache_hit_tokens"] > 40
    for usage in (first, second):
        assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"]
        assert usage["cost"] == pytest.approx(price_of(usage)) and usage["cost"] > 0
        assert usage["cost"] == pytest.approx(sum(usage["cost_details"].values()))
    assert second["cost"] < first["cost"]


def test_cost_is_in_streams_too(http: httpx.Client) -> None:
    body = user("Hi", stream=True, stream_options={"include_usage": True})
    usage = events(http.post("/v1/chat/completions", json=body).text)[-1][1]["usage"]
    assert usage["cost"] == pytest.approx(price_of(usage)) and usage["cost"] > 0


def test_history_with_thoughts_goes_back_in(client: openai.OpenAI, model: ScriptedModel) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message
    talk: list[Any] = [*HELLO, first.model_dump(exclude_none=True), {"role": "user", "content": "The secret is blue"}]
    answer = client.chat.completions.create(model="tiny", messages=talk)
    assert answer.choices[0].message.content == "You said is"


@pytest.mark.parametrize("stop", [["there"], "there", ["zzz", "the"], ["lo there"], [" t"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_also_across_tokens(client: openai.OpenAI, stop: Any, stream: bool) -> None:
    """The small tokenizer spells most words letter by letter."""
    wanted = "Hello there.".split(stop if isinstance(stop, str) else stop[-1])[0]
    if stream:
        chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, stop=stop, stream=True))
        said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        reason = next(choice.finish_reason for chunk in reversed(chunks) for choice in chunk.choices)
    else:
        [choice] = client.chat.completions.create(model="tiny", messages=HELLO, stop=stop).choices
        said, reason = choice.message.content, choice.finish_reason
    assert (said, reason) == (wanted, "stop")


def test_stop_strings_leave_thoughts_alone(client: openai.OpenAI) -> None:
    [choice] = client.chat.completions.create(model="tiny", messages=HELLO, stop=["me"]).choices
    assert choice.message.reasoning_content == "Let me think."  # type: ignore[attr-defined]
    assert choice.message.content == "Hello there." and choice.finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_ends_the_answer(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, extra_body=PLAIN | {name: 3})
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content == "Hel"
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_several_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["Hello there."] * 3
    one = client.chat.completions.create(model="tiny", messages=HELLO)
    assert answer.usage is not None and one.usage is not None
    assert answer.usage.completion_tokens == 3 * one.usage.completion_tokens
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens


def test_several_choices_in_a_stream(client: openai.OpenAI) -> None:
    said, reasons, usages = ["", "", ""], {}, []
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, n=3, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert said == ["Hello there."] * 3 and reasons == dict.fromkeys(range(3), "stop")
    assert len(usages) == 1


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=3)
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    assert b"".join(bytes(token.bytes or []) for token in found.content).decode() == "Hello there."
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token for token in found.content)
    assert all(-0.01 < token.logprob <= 0 for token in found.content)
    thoughts: Any = found.reasoning_content  # type: ignore[attr-defined]
    assert "".join(token["token"] for token in thoughts) == "Let me think."


def test_logprobs_in_a_stream(client: openai.OpenAI) -> None:
    found = []
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, stream=True, extra_body=PLAIN
    )
    for chunk in stream:
        for choice in chunk.choices:
            found += (choice.logprobs.content or []) if choice.logprobs else []
    assert "".join(token.token for token in found) == "Hello there."


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Say it as JSON"}],
        response_format={"type": "json_object"},
    )
    assert answer.choices[0].message.content == '{"name": "Paris", "value": 2}'


class City(BaseModel):
    name: str
    value: int


def test_json_schema_with_the_clients_parser(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "Say it as JSON"}], response_format=City
    )
    assert answer.choices[0].message.parsed == City(name="Paris", value=2)


@pytest.mark.parametrize("path", ["/beta/chat/completions", "/beta/v1/chat/completions", "/v1/chat/completions"])
def test_prefix_completion(http: httpx.Client, path: str) -> None:
    body = user("Hi", **PLAIN)
    body["messages"].append({"role": "assistant", "content": "Well: ", "prefix": True})
    answer = http.post(path, json=body)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "Hello there."


def test_a_prefix_of_thoughts_goes_on_thinking(http: httpx.Client, model: ScriptedModel) -> None:
    body = user("Hi", thinking={"type": "enabled"})
    body["messages"].append({"role": "assistant", "content": "", "reasoning_content": "Well, ", "prefix": True})
    answer = http.post("/beta/chat/completions", json=body).json()
    assert answer["choices"][0]["finish_reason"] == "stop", answer
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == "Hello there." and not message["content"]


def test_the_stream_helper_of_the_client(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=HELLO) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == "Hello there."


async def _ask(client: openai.AsyncOpenAI, number: int) -> str | None:
    messages: list[Any] = [{"role": "user", "content": f"The secret n{number} it is"}]
    answer = await client.chat.completions.create(model="tiny", messages=messages)
    return answer.choices[0].message.content


def test_many_at_once_each_get_their_own(client: openai.OpenAI) -> None:
    import asyncio

    async def work() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0) as many:
            return await asyncio.gather(*(_ask(many, number) for number in range(24)))

    assert asyncio.run(work()) == [f"You said n{number}" for number in range(24)]
