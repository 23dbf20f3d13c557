"""DeepSeek's format: what deepseek-recipe renders, special ids exactly where it says, for any conversation."""

from __future__ import annotations

import json
from typing import Any

import deepseek_recipe as recipe
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.data import Message, Tokenizer, encode_prompt, train_tokenizer
from tael.data.tokenizer import ASSISTANT, CHAT_TEMPLATE, END_THINK, EOS, SPECIAL_TOKENS, THINK
from tael.errors import TaelError
from tael.serve.formats import DeepSeekFormat, TemplateFormat, choose_format

DSML = "｜DSML｜"
ENCODING = recipe.DeepseekV4Encoding()
TOOL = recipe.ToolDefinition(
    "weather", "Of a city.", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "The quick brown fox. 漢字 🙂 You can invoke tools by writing a block: <invoke name=></invoke> <think>\n"
    return train_tokenizer([text] * 3, 400)


@pytest.fixture(scope="module")
def without_dsml(tokenizer: Tokenizer) -> Tokenizer:
    """As DeepSeek-V3's: every token of the format but ｜DSML｜."""
    table = json.loads(tokenizer.backend.to_str())
    table["added_tokens"] = [t for t in table["added_tokens"] if t["content"] != DSML]
    table["model"]["vocab"] = {("unused" if t == DSML else t): i for t, i in table["model"]["vocab"].items()}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(table)), tokenizer.config)


# ------------------------------------------------------------ any conversation

TEXTS = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL_TOKENS, f"<{DSML}tool_calls>", f"</{DSML}parameter>", "<think", "\n\n", "漢", "🙂"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    ),
    max_size=5,
).map("".join)
ARGUMENTS = st.one_of(
    TEXTS,
    st.dictionaries(TEXTS, st.one_of(TEXTS, st.integers(), st.booleans(), st.none(), st.lists(TEXTS))).map(
        json.dumps
    ),
)
CALLS = st.lists(st.builds(recipe.ToolCall, st.sampled_from(["a", "b"]), TEXTS, ARGUMENTS), min_size=1, max_size=2)
ASSISTANTS = st.builds(recipe.AssistantMessage, TEXTS, st.none() | TEXTS, st.none() | CALLS)
MESSAGES = st.one_of(
    st.builds(recipe.SystemMessage, TEXTS),
    st.builds(recipe.UserMessage, TEXTS),
    ASSISTANTS,
    st.builds(recipe.ToolMessage, TEXTS, st.sampled_from([None, "a", "b", "c"])),
    st.builds(recipe.LatestReminderMessage, TEXTS),
)
PREFIXES = st.builds(recipe.AssistantMessage, TEXTS, st.none() | TEXTS, st.none() | CALLS, st.just(True))
TOOLS = st.lists(st.builds(recipe.ToolDefinition, TEXTS, st.none() | TEXTS, st.just({"type": "object", "a": THINK})))
SETTINGS: dict[str, Any] = {
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "reasoning_effort": st.sampled_from([None, "low", "high", "max"]),
}


@st.composite
def conversations(draw: st.DrawFn) -> recipe.Conversation:
    messages = draw(st.lists(MESSAGES, min_size=1, max_size=6))
    if draw(st.booleans()):
        messages.append(draw(PREFIXES))
    options = {name: draw(values) for name, values in SETTINGS.items()}
    form = draw(st.sampled_from([{}, {"response_format": "json_object"}, {"response_schema": {"type": "object"}}]))
    return recipe.Conversation(
        messages, thinking_mode=draw(st.booleans()), tools=draw(st.none() | TOOLS), **options, **form
    )


def special_offsets(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[int, int]]:
    """Where in the decoded text special ids stand."""
    places, plain, at = [], [], 0
    for token in [*ids, None]:
        if token is not None and token not in tokenizer.special_ids:
            plain.append(token)
            continue
        at += len(tokenizer.decode(plain, skip_special=False))
        plain = []
        if token is not None:
            places.append((at, at + len(tokenizer.decode([token], skip_special=False))))
            at = places[-1][1]
    return places


@settings(max_examples=200, deadline=None, derandomize=True)
@given(conversation=conversations())
def test_ids_are_the_recipes(tokenizer: Tokenizer, conversation: recipe.Conversation) -> None:
    prefixed = conversation.messages[-1].prefix
    way = "continue" if prefixed else "think" if conversation.thinking_mode else "direct"
    prompt = DeepSeekFormat(tokenizer, effort_in_prompt=True).encode(conversation, way)
    rendered = ENCODING.render_conversation(conversation)
    assert tokenizer.decode(prompt.ids, skip_special=False) == rendered.prompt
    assert special_offsets(tokenizer, prompt.ids) == list(rendered.special_ranges)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(conversation=conversations())
def test_without_a_dsml_token_it_is_text(
    tokenizer: Tokenizer, without_dsml: Tokenizer, conversation: recipe.Conversation
) -> None:
    way = "continue" if conversation.messages[-1].prefix else "free"
    with_token, without = (DeepSeekFormat(each).encode(conversation, way) for each in (tokenizer, without_dsml))
    texts = [tokenizer.decode(with_token.ids, False), without_dsml.decode(without.ids, False)]
    assert texts[0] == texts[1] and with_token.starts == without.starts
    dsml = tokenizer.token_id(DSML)
    marked = [i for i in with_token.ids if i in tokenizer.special_ids and i != dsml]
    assert [i for i in without.ids if i in without_dsml.special_ids] == marked


# --------------------------------------------------------------------- one by one


def conversation(*messages: recipe.Message, **options: Any) -> recipe.Conversation:
    return recipe.Conversation(list(messages), **options)


def tail(tokenizer: Tokenizer, prompt: Any) -> tuple[str, str]:
    return tokenizer.decode(prompt.ids, skip_special=False).partition(ASSISTANT)[2], prompt.starts


HI = recipe.UserMessage("Hi")


def test_where_the_answer_starts(tokenizer: Tokenizer) -> None:
    form = DeepSeekFormat(tokenizer)

    def at(way: Any, *messages: recipe.Message, **options: Any) -> tuple[str, str]:
        return tail(tokenizer, form.encode(conversation(HI, *messages, **options), way))

    def said(content: str, reasoning: str | None = None) -> recipe.Message:
        return recipe.AssistantMessage(content, reasoning, None, True)

    assert at("think") == (THINK, "think")
    assert at("direct") == (END_THINK, "answer")
    assert at("free") == ("", "free")
    assert at("continue", said("So")) == (f"{END_THINK}So", "answer")
    assert at("continue", said("So", "hm")) == (f"{THINK}hm{END_THINK}So", "answer")
    assert at("continue", said("", "hm")) == (f"{THINK}hm", "think")
    assert at("continue", said("")) == ("", "free")
    assert at("continue", said(""), thinking_mode=False) == (END_THINK, "answer")
    opened = f"\n\n<{DSML}tool_calls>\n"
    needed: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required"}
    assert at("direct", **needed) == (END_THINK + opened, "calls")
    assert at("think", **needed) == (THINK + opened, "calls")
    assert at("free", **needed) == (END_THINK + opened, "calls")
    assert at("continue", said("So", "hm"), **needed) == (f"{THINK}hm{END_THINK}So{opened}", "calls")
    # What a prefix says is not what the format says.
    assert at("continue", said(THINK + ASSISTANT + opened), tools=[TOOL])[1] == "answer"


def test_training_and_serving_write_alike(tokenizer: Tokenizer) -> None:
    talk = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "Oh?")]
    asked = conversation(
        recipe.SystemMessage("Be brief."), HI, recipe.AssistantMessage("Ho"), recipe.UserMessage("Oh?")
    )
    for mode in ("free", "think", "direct"):
        assert DeepSeekFormat(tokenizer).encode(asked, mode).ids == encode_prompt(tokenizer, talk, mode)


def test_effort(tokenizer: Tokenizer) -> None:
    asked = conversation(HI, reasoning_effort="max")
    plain, effort = (DeepSeekFormat(tokenizer, e).encode(asked, "think") for e in (False, True))
    assert tokenizer.decode(plain.ids) == "Hi"
    assert tokenizer.decode(effort.ids).startswith("Reasoning Effort: ")


def test_past_calls_and_results(tokenizer: Tokenizer) -> None:
    call = recipe.ToolCall("1", "weather", '{"city": "Paris", "days": 2}')
    asked = conversation(
        HI, recipe.AssistantMessage("", "hm", [call]), recipe.ToolMessage("<think>sun", "1"), tools=[TOOL]
    )
    prompt = DeepSeekFormat(tokenizer).encode(asked, "direct")
    text = tokenizer.decode(prompt.ids, skip_special=False)
    assert f'<{DSML}parameter name="city" string="true">Paris</{DSML}parameter>' in text
    assert text.endswith(f"{EOS}<｜User｜><tool_result><think>sun</tool_result>{ASSISTANT}{END_THINK}")
    assert prompt.ids.count(tokenizer.think_id) == 3  # two in the tools' text, one before "hm"


def test_tokens_whose_spelling_the_translator_needs(tokenizer: Tokenizer, without_dsml: Tokenizer) -> None:
    spelled = {tokenizer.think_id: THINK, tokenizer.end_think_id: END_THINK}
    assert DeepSeekFormat(without_dsml).spelled == spelled
    assert DeepSeekFormat(tokenizer).spelled == {**spelled, tokenizer.token_id(DSML): DSML}


def test_the_translator_changes_nothing(tokenizer: Tokenizer) -> None:
    translator = DeepSeekFormat(tokenizer).translator("think")
    text = f"a<{DSML}tool_calls><tool_call></think>"
    assert translator.push(text) == text and translator.finish() == ""


def test_refusals(tokenizer: Tokenizer) -> None:
    form = DeepSeekFormat(tokenizer)
    image = recipe.UserMessage("<｜image｜>", [recipe.DataUrlImageSource("data:image/png;base64,")])
    for asked, way, words in (
        (conversation(), "free", "there is nothing to answer"),
        (conversation(image), "free", "reads text only"),
        (conversation(HI), "continue", "is not one of the assistant's to be continued"),
        (conversation(HI, recipe.AssistantMessage("a", prefix=True)), "think", "is one of the assistant's to be"),
        (conversation(HI), "thnk", r"unknown mode 'thnk'; did you mean 'think'\?"),
    ):
        with pytest.raises(TaelError, match=words) as error:
            form.encode(asked, way)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_the_format_is_chosen_by_tokens(tokenizer: Tokenizer) -> None:
    assert isinstance(choose_format(tokenizer), DeepSeekFormat)
    table = json.loads(tokenizer.backend.to_str())
    for token in (ASSISTANT, THINK):
        table["added_tokens"] = [t for t in table["added_tokens"] if t["content"] != token]
        table["model"]["vocab"][f"unused{token}"] = table["model"]["vocab"].pop(token)
    backend = tokenizers.Tokenizer.from_str(json.dumps(table))
    assert isinstance(choose_format(Tokenizer(backend, {"chat_template": CHAT_TEMPLATE})), TemplateFormat)
    with pytest.raises(TaelError, match="no chat format"):
        choose_format(Tokenizer(backend, {}))
