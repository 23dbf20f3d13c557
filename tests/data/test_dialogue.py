from __future__ import annotations

import deepseek_recipe as recipe
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.data import (
    Message,
    Tokenizer,
    encode_example,
    encode_prompt,
    parse_completion,
    render_text,
    train_tokenizer,
)
from tael.data.tokenizer import ASSISTANT, END_THINK, EOS, SPECIAL_TOKENS, THINK
from tael.errors import TaelError

content = st.text(max_size=12) | st.lists(st.sampled_from([*SPECIAL_TOKENS, "hi ", "7"]), max_size=4).map("".join)
reasoning = st.none() | content
turn = st.builds(
    lambda role, text, thought: Message(role, text, thought if role == "assistant" else None),
    st.sampled_from(["system", "user", "assistant"]),
    content,
    reasoning,
)
prompts = st.builds(lambda turns, text: [*turns, Message("user", text)], st.lists(turn, max_size=5), content)
modes = st.sampled_from(["free", "think", "direct"])
answers = st.builds(lambda text, thought: Message("assistant", text, thought), content, reasoning)

_ROLES = {"system": recipe.SystemMessage, "user": recipe.UserMessage}


def _oracle(messages: list[Message], thinking: bool, last_is_prefix: bool = False) -> recipe.Conversation:
    rendered = []
    for i, m in enumerate(messages):
        if m.role == "assistant":
            prefix = last_is_prefix and i == len(messages) - 1
            rendered.append(recipe.AssistantMessage(m.content, m.reasoning, prefix=prefix))
        else:
            rendered.append(_ROLES[m.role](m.content))
    return recipe.Conversation(rendered, thinking_mode=thinking, reasoning_effort="low")


@given(messages=prompts, mode=modes)
def test_prompt_is_what_the_recipe_encodes(tokenizer: Tokenizer, messages: list[Message], mode) -> None:
    encoding = recipe.DeepseekV4Encoding()
    oracle = _oracle(messages, mode == "think")
    text = encoding.render_conversation(oracle).prompt
    native = encoding.with_tokenizer(recipe.Tokenizer.from_str(tokenizer.backend.to_str())).encode(oracle)
    ids = encode_prompt(tokenizer, messages, mode)
    if mode == "free":
        text, native = text.removesuffix(END_THINK), native[:-1]
    assert ids == native
    assert tokenizer.decode(ids, skip_special=False) == text == render_text(messages, mode)


@given(messages=prompts, answer=answers)
def test_training_starts_with_the_serving_prompt(tokenizer: Tokenizer, messages: list[Message], answer) -> None:
    example = encode_example(tokenizer, [*messages, answer])
    for mode in ("free", "direct" if answer.reasoning is None else "think"):
        prompt = encode_prompt(tokenizer, messages, mode)
        assert example.tokens[: len(prompt)] == prompt
        completion = example.tokens[len(prompt) :]
        parsed = parse_completion(tokenizer, completion, mode)
        assert (parsed.reasoning, parsed.answer, parsed.finished) == (answer.reasoning, answer.content, True)
        cut = parse_completion(tokenizer, completion[:-1], mode)
        assert not cut.finished


# The recipe reads a prefix of reasoning alone as thought to be gone on with, and empty reasoning as none.
complete_answers = answers.filter(lambda a: a.reasoning is None or (a.reasoning and a.content))


@given(messages=prompts, answer=complete_answers)
def test_example_is_what_the_recipe_renders(tokenizer: Tokenizer, messages: list[Message], answer) -> None:
    oracle = _oracle([*messages, answer], answer.reasoning is not None, last_is_prefix=True)
    text = recipe.DeepseekV4Encoding().render_conversation(oracle).prompt + EOS
    assert tokenizer.decode(encode_example(tokenizer, [*messages, answer]).tokens, skip_special=False) == text
    assert render_text([*messages, answer]) == text


@given(messages=prompts, answer=answers)
def test_loss_is_on_every_answer_and_nothing_else(tokenizer: Tokenizer, messages: list[Message], answer) -> None:
    example = encode_example(tokenizer, [*messages, answer])
    learned = [i for i, m in zip(example.tokens, example.loss_mask, strict=True) if m]
    spoken = [m for m in messages if m.role == "assistant"]
    expected = "".join(END_THINK + m.content + EOS for m in spoken)
    expected += ("" if answer.reasoning is None else THINK + answer.reasoning) + END_THINK + answer.content + EOS
    assert tokenizer.decode(learned, skip_special=False) == expected
    starts = [i for i, token in enumerate(example.tokens) if token == tokenizer.token_id(ASSISTANT)]
    assert all(not example.loss_mask[i] and example.loss_mask[i + 1] for i in starts)
    assert len(starts) == len(spoken) + 1


@given(messages=prompts, thinking=st.booleans())
def test_chat_template_says_the_same(tokenizer: Tokenizer, messages: list[Message], thinking: bool) -> None:
    sandbox = pytest.importorskip("jinja2.sandbox")
    template = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        tokenizer.config["chat_template"]
    )
    table = [{"role": m.role, "content": m.content} for m in messages]
    names = {"bos_token": SPECIAL_TOKENS[0], "eos_token": EOS, "add_generation_prompt": True}
    said = template.render(messages=table, thinking=thinking, **names)
    assert said == render_text(messages, "think" if thinking else "direct")


@given(tokens=st.lists(st.integers(-3, 500)), mode=modes)
def test_parsing_takes_anything(tokenizer: Tokenizer, tokens: list[int], mode) -> None:
    parsed = parse_completion(tokenizer, tokens, mode)
    assert parsed.finished == (tokenizer.eos_id in tokens)
    assert isinstance(parsed.answer, str)


def test_thoughts_without_an_end_are_no_answer(tokenizer: Tokenizer) -> None:
    thought = tokenizer.encode("hm 7")
    assert parse_completion(tokenizer, thought, "think").answer == ""
    free = parse_completion(tokenizer, [tokenizer.think_id or 0, *thought], "free")
    assert (free.reasoning, free.answer, free.finished) == ("hm 7", "", False)
    neither = parse_completion(tokenizer, thought, "free")
    assert (neither.reasoning, neither.answer) == (None, "hm 7")


def test_refusals(tokenizer: Tokenizer) -> None:
    user, assistant = Message("user", "q"), Message("assistant", "a")
    for messages in ([], [user, assistant]):
        with pytest.raises(TaelError, match="must end with"):
            encode_prompt(tokenizer, messages, "free")
    for messages in ([], [assistant, user]):
        with pytest.raises(TaelError, match="must end with"):
            encode_example(tokenizer, messages)
    with pytest.raises(TaelError, match="unknown mode"):
        encode_prompt(tokenizer, [user], "thinking")  # type: ignore[arg-type]
    with pytest.raises(TaelError, match="unknown role"):
        encode_prompt(tokenizer, [Message("usr", "q")], "free")  # type: ignore[arg-type]


def test_lone_surrogates_do_not_break_rendering(tokenizer: Tokenizer) -> None:
    example = encode_example(tokenizer, [Message("user", "\ud800"), Message("assistant", "\udfff", "\ud800")])
    assert tokenizer.decode(example.tokens) == "\ufffd" * 3


def test_a_tokenizer_without_the_format_is_refused(tmp_path) -> None:
    import tokenizers

    foreign = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(TaelError, match="has no"):
        encode_prompt(foreign, [Message("user", "a")], "free")
    assert train_tokenizer(["a"], 300).encode("a")
