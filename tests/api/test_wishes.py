"""What goes beyond the protocols' core: thinking as the model likes, budgets, efforts, biases, the log."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from checks import PLAIN, Json, chat, open_stream, until, user
from scripted import ScriptedModel, loader, scripted_model
from serving import Running, running

from tael.data import Tokenizer
from tael.serve.app import Guard
from tael.serve.limits import KeyLimits
from tael.serve.settings import ModelSpec

COUNT = " ".join(map(str, range(700)))


def thoughtful(prompt: str) -> str:
    """Begins as it is told to, and thinks for long where it is to think."""
    if prompt.endswith("<think>"):
        return f"{COUNT}</think>Done."
    begins = {"openly": "<think>So.</think>Yes.", "shut": "</think>No.", "plain": "Well."}
    return next((answer for word, answer in begins.items() if word in prompt), "Hello.")


@pytest.fixture(scope="module")
def thinker(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    specs = [ModelSpec(name="tiny", model="m"), ModelSpec(name="auto", model="m", thinking="auto")]
    specs.append(ModelSpec(name="told", model="m", effort_in_prompt=True))
    model = scripted_model(thoughtful, tokenizer, 4096)
    with running(tmp_path_factory.mktemp("state"), specs, loader({"m": model})) as found:
        yield found


@pytest.fixture(scope="module")
def ask(thinker: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=thinker.url, timeout=30) as client:
        yield client


# ------------------------------------------------------------------- thinking


@pytest.mark.parametrize(
    ("text", "thought", "said"), [("openly", "So.", "Yes."), ("shut", None, "No."), ("plain", None, "Well.")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_model_decides_whether_to_think(
    ask: httpx.Client, text: str, thought: str | None, said: str, stream: bool
) -> None:
    for change in ({"model": "tiny", "thinking": {"type": "auto"}}, {"model": "auto"}):
        if not stream:
            message = chat(ask, text, **change)["choices"][0]["message"]
            found = message.get("reasoning_content") or None, message["content"]
        else:
            with ask.stream("POST", "/v1/chat/completions", json=user(text, stream=True, **change)) as response:
                chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
            deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
            found = tuple("".join(each.get(n) or "" for each in deltas) for n in ("reasoning_content", "content"))
            found = found[0] or None, found[1]
        assert found == (thought, said), change


@pytest.mark.parametrize("budget", [0, 1, 7, 100])
def test_a_budget_ends_thoughts_and_the_answer_follows(ask: httpx.Client, budget: int) -> None:
    answer = chat(ask, "x", thinking={"type": "enabled", "budget_tokens": budget}, max_tokens=budget + 20)
    details = answer["usage"].get("completion_tokens_details") or {"reasoning_tokens": 0}
    assert details["reasoning_tokens"] == budget
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize(("effort", "budget"), [("minimal", 128), ("low", 512)])
def test_efforts_are_budgets(ask: httpx.Client, effort: str, budget: int) -> None:
    most = budget + 8
    details = chat(ask, "x", reasoning_effort=effort, max_tokens=most)["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == budget
    body: Json = {"model": "tiny", "input": "x", "reasoning": {"effort": effort}, "max_output_tokens": most}
    usage = ask.post("/v1/responses", json=body).json()["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == budget
    if effort == "low":  # Anthropic knows no minimal one
        answer = ask.post("/v1/messages", json=user("x", max_tokens=most, output_config={"effort": effort})).json()
        assert [block["type"] for block in answer["content"]] == ["thinking", "text"]


def test_high_effort_knows_no_limit(ask: httpx.Client) -> None:
    answer = chat(ask, "x", reasoning_effort="high")
    assert answer["choices"][0]["message"]["content"] == "Done."
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 512


def test_no_effort_is_no_thought(ask: httpx.Client) -> None:
    assert chat(ask, "plain", reasoning_effort="none")["choices"][0]["message"]["content"] == "Well."


def test_a_model_that_knows_efforts_is_told(ask: httpx.Client) -> None:
    tokens = [chat(ask, "x", model=name, max_tokens=1)["usage"]["prompt_tokens"] for name in ("tiny", "told")]
    assert tokens[1] > tokens[0] + 50, "DeepSeek's sentence about effort high is long"


# ------------------------------------------------------------------- sampling


def test_a_bias_bans_and_forces(http: httpx.Client, tokenizer: Tokenizer) -> None:
    """The scripted model's logits are 30 for its word; a bias of 100 is more."""
    [z] = tokenizer.encode("z")
    forced = chat(http, "Hi", logit_bias={str(z): 100}, max_tokens=4, temperature=0, **PLAIN)
    assert forced["choices"][0]["message"]["content"] == "zzzz"
    [h] = tokenizer.encode("H")
    banned = chat(http, "Hi", logit_bias={str(h): -100}, max_tokens=1, temperature=0, **PLAIN)
    assert not banned["choices"][0]["message"]["content"].startswith("H")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "perhaps"}}, "thinking"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"stop": [f"{i}" for i in range(99)]}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object"}}, "response_format"),  # the prompt does not speak of JSON
        ({"messages": [{"role": "user", "content": "x"}, {"role": "king", "content": "x"}]}, "messages[1]"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages"),
    ],
)
def test_errors_name_the_field(http: httpx.Client, change: Json, word: str) -> None:
    answer = http.post("/v1/chat/completions", json=user("Hi") | change)
    error = answer.json()["error"]
    assert answer.status_code in (400, 422) and word in error["message"], answer.text
    assert error["type"] == "invalid_request_error"


# -------------------------------------------------------------------- the log


@pytest.mark.parametrize("contents", [False, True])
def test_the_request_log(model: ScriptedModel, tmp_path: Path, contents: bool) -> None:
    """A line of JSON a request; what was said only where that is asked for."""
    out = io.StringIO()
    specs = [ModelSpec(name="tiny", model="m", context=1024)]
    with (
        running(tmp_path, specs, loader({"m": model}), journal=out, log_contents=contents) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        usage = chat(http, "The secret 漢字 it is")["usage"]
        http.post("/v1/completions", json={"model": "tiny", "prompt": "Privately, "})
        http.post("/v1/chat/completions", json=user("x", max_tokens=10**6))
        http.post("/v1/chat/completions", json=user("x", response_format={"type": "a secret kind"}))
        http.post("/v1/messages", content=b"{secret")
        http.post("/v1/responses", json={"model": "tiny", "input": "x"}, headers={"x-api-key": "tael-secret"})
        until(lambda: out.getvalue().count("\n") == 6)
        metrics = http.get("/metrics").text
    first, second, refused, quoting, broken, unknown = map(json.loads, out.getvalue().splitlines())
    assert first["status"] == 200 and first["prompt_tokens"] == usage["prompt_tokens"] and first["key"] == "local"
    assert first["dollars"] == pytest.approx(usage["cost"]) and first["finish_reason"] == "stop"
    assert (refused["status"], broken["status"], unknown["status"]) == (400, 400, 401)
    assert quoting["status"] in (400, 422) and (broken["key"], unknown["key"]) == ("local", None)
    for endpoint, status in (("messages", 400), ("responses", 401)):
        assert f'tael_requests_total{{endpoint="{endpoint}",status="{status}"}} 1.0' in metrics
    if contents:
        assert "max_tokens" in refused["error"] and "a secret kind" in quoting["error"]
        assert first["said"]["asked"] == [{"role": "user", "content": "The secret 漢字 it is"}]
        [answer] = first["said"]["answered"]
        assert answer.startswith("Let me think.</think>You said 漢字")
        assert second["said"]["asked"] == "Privately, " and second["said"]["answered"][0].startswith(" Paris.")
    else:
        text = out.getvalue()
        assert not any(word in text for word in ("secret", "said", "Privately", "Paris", "think", "\\u6f22"))


# ---------------------------------------------------------------- small print


def test_requests_at_once_are_limited_by_key(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = scripted_model(thoughtful, tokenizer, 4096)
    with running(tmp_path, [ModelSpec(name="tiny", model="m", context=1024)], loader({"m": model})) as server:
        secret = server.service.store.add_key("anna", KeyLimits(concurrent=1))[1]
        headers = {"authorization": f"Bearer {secret}"}
        until(lambda: model.runners)
        model.runners[-1].gate.clear()
        with open_stream(server, "/v1/chat/completions", user("x"), **headers):
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=user("x"), headers=headers)
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert "running at once" in answer.json()["error"]["message"]
            model.runners[-1].gate.set()


def test_methods_that_are_none(http: httpx.Client) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE"):
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/completions"):
            answer = http.request(method, path)
            assert answer.status_code in (404, 405) and answer.headers["content-type"] == "application/json"


def test_pages_elsewhere_that_may_ask(model: ScriptedModel, tmp_path: Path) -> None:
    page = "https://friendly.example"
    specs = [ModelSpec(name="tiny", model="m", context=1024)]
    with (
        running(tmp_path, specs, loader({"m": model}), allow_origins=(page,)) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        asked = {"origin": page, "access-control-request-method": "POST"}
        assert http.options("/v1/chat/completions", headers=asked).headers["access-control-allow-origin"] == page
        answer = http.post("/v1/chat/completions", json=user("Hi"), headers={"origin": page})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == page
        assert http.get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("host", "origin", "let_in"),
    [
        ("localhost:8000", "", True),
        ("localhost:8000", "http://localhost:8000", True),
        ("localhost:8000", "http://localhost", False),
        ("localhost:8000", "https://evil.example", False),
        ("evil.example", "https://evil.example", False),
        ("evil.example@localhost", "", True),
        ("localhost@evil.example", "", False),
        ("[::1", "", False),
        ("", "", False),
    ],
)
def test_websockets_are_guarded_too(server: Running, host: str, origin: str, let_in: bool) -> None:
    reached: list[Any] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    scope = {"type": "websocket", "path": "/_nicegui_ws/socket.io/", "headers": headers}
    asyncio.run(Guard(app, server.service)(scope, None, send))  # type: ignore[arg-type]
    assert bool(reached) is let_in
    assert let_in or sent[0]["type"] == "websocket.close"
