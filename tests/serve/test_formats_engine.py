"""A format at work: random weights behind the real engine are made to call a tool, and the parser reads the call."""

from __future__ import annotations

import json
from typing import Any

import deepseek_recipe as recipe
import pytest
import tokenizers

from tael.data import Tokenizer, train_tokenizer
from tael.engine import Engine, SamplingParams
from tael.model import ModelConfig, build_model
from tael.serve.formats import ChatFormat, Prompt, choose_format

CHATML = """{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}{{ '<|assistant|>' }}\
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}"""
TOOLS = [
    recipe.ToolDefinition(
        name,
        "Says so.",
        {"properties": {"how": {"enum": ["so", "thus"]}, "much": {"enum": [1, 2]}}, "required": ["how"]},
    )
    for name in ("first", "second")
]


@pytest.fixture(scope="module", params=["deepseek", "template"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = train_tokenizer(["You can invoke a tool in a block. <tool_call>\n"] * 3, 300)
    if request.param == "deepseek":
        return tokenizer
    table = json.loads(tokenizer.backend.to_str())
    for token in ("<｜User｜>", "<｜Assistant｜>"):
        table["added_tokens"] = [t for t in table["added_tokens"] if t["content"] != token]
        table["model"]["vocab"][f"unused{token}"] = table["model"]["vocab"].pop(token)
    backend = tokenizers.Tokenizer.from_str(json.dumps(table))
    return Tokenizer(backend, tokenizer.config | {"chat_template": CHATML})


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    config = ModelConfig(
        model_type="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
    )
    return Engine(build_model(config, seed=1), tokenizer)


def answer(engine: Engine, form: ChatFormat, prompt: Prompt, **params: Any) -> str:
    """What the model says, as the translator gives it on."""
    translator, text = form.translator(prompt.starts), ""
    for event in engine.stream(prompt.ids, SamplingParams(max_tokens=900, **params)):
        text += translator.push(form.spelled.get(event.token, "") + event.text)
    return text + translator.finish()


def read(prompt: Prompt, text: str) -> tuple[str, list[Any]]:
    request = recipe.ConversationRequest(
        recipe.Conversation([recipe.UserMessage("Hi")]), recipe.ModelVersion.DeepseekV4Pro
    )
    stage = recipe.ThinkingInitialStage.ReasoningStart if prompt.starts == "think" else None
    options = recipe.ParsingOptions(starts_in_tool_calls=prompt.starts == "calls", thinking_initial_stage=stage)
    response = recipe.ChatCompletionResponse("id", "model", 0, 0, 0)
    processor = recipe.StreamProcessor(recipe.ChatCompletionRequest.chunk_generator(request, "id", "model"), options)
    last = recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)
    for chunk in (recipe.InferenceChunk.ready(), recipe.InferenceChunk.text(text, 1), last):
        for part in processor.push(chunk):
            response.accumulate(part)
    for part in processor.finish():
        response.accumulate(part)
    message = json.loads(response.to_json())["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return message.get("content") or "", [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize("way", ["direct", "think"])
def test_required_calls(engine: Engine, tokenizer: Tokenizer, way: Any) -> None:
    form = choose_format(tokenizer)
    asked = recipe.Conversation([recipe.UserMessage("Hi")], tools=TOOLS, tool_choice="required")
    prompt = form.encode(asked, way)
    constraint = form.tool_grammar(TOOLS, True, False)
    names = set()
    for seed in range(4):
        text = answer(
            engine, form, prompt, seed=seed, stop_ids=tokenizer.stop_ids, constraint=constraint, thinking_budget=5
        )
        content, [(name, arguments)] = read(prompt, text)
        # The budget may cut thoughts inside a character, whose bytes the engine shows after them.
        assert content.strip("\ufffd") == ""
        assert arguments["how"] in ("so", "thus") and arguments.get("much", 1) in (1, 2)
        names.add(name)
    assert names <= {"first", "second"}


def test_no_tools_no_grammar(tokenizer: Tokenizer) -> None:
    assert choose_format(tokenizer).tool_grammar([], True, True) is None
