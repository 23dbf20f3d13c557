"""One server with a scripted model for all tests of the API that need no other."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from scripted import ScriptedModel, loader, make_tokenizer, scripted_model
from serving import Running, running

from tael.data import Tokenizer
from tael.serve.settings import ModelSpec

DSML = "｜DSML｜"


def call(name: str, /, **arguments: object) -> str:
    """A call in DeepSeek's form."""
    given = "".join(
        f'<{DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</{DSML}parameter>\n"
        for key, value in arguments.items()
    )
    return f'<{DSML}invoke name="{name}">\n{given}</{DSML}invoke>\n'


def calls(*made: str) -> str:
    return f"\n\n<{DSML}tool_calls>\n{''.join(made)}</{DSML}tool_calls>"


def script(prompt: str) -> str:
    """The answers of the scripted model, by the last thing the prompt says."""
    if "fim" in prompt and "<｜User｜>" not in prompt:
        return "first + second"
    if "<｜User｜>" not in prompt:
        return " Paris."
    thinks = prompt.endswith("<think>")
    said = re.split(r"<｜User｜>|<｜Assistant｜>", prompt)[-2]
    thought = "Let me think.</think>" if thinks else ""
    if "<tool_result>" in said or "tool_result" in said:
        return f"{thought}The result is 42."
    if match := re.search(r"secret (\S+)", said):
        return f"{thought}You said {match[1]}"
    if "weather" in said:
        return thought + "Let me look." + calls(call("weather", city="Paris"), call("weather", city="Rome", days=3))
    if "calculate" in said:
        return thought + calls(call("calculator", expression="6 * 7"))
    if "JSON" in said or "json" in said:
        return thought + '{"name": "Paris", "value": 2}'
    if "count" in said:
        return thought + " ".join(map(str, range(1, 200)))
    return f"{thought}Hello there."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> ScriptedModel:
    return scripted_model(script, tokenizer, context=4096)


@pytest.fixture(scope="session")
def server(model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    specs = [ModelSpec(name="tiny", model="scripted", aliases=("deepseek-chat",), context=4096)]
    with running(tmp_path_factory.mktemp("state"), specs, loader({"scripted": model})) as found:
        yield found


@pytest.fixture(scope="session")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as found:
        yield found


@pytest.fixture(scope="session")
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"{server.url}/anthropic", api_key="none", max_retries=0, timeout=30) as found:
        yield found
