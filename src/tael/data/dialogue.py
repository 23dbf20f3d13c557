"""Messages to token ids and back, in DeepSeek's own chat format as `deepseek-recipe` renders it.

Training and serving go through the same rendering: a training example is the serving prompt of everything before
the last answer, followed by what the model is to say. Only ranges the recipe marks as special become special ids;
a user's `<think>` stays seven characters of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import deepseek_recipe as recipe

from tael.data.tokenizer import ASSISTANT, END_THINK, EOS, THINK, Tokenizer, clean_text
from tael.data.types import Example, Message, Mode
from tael.errors import TaelError, did_you_mean

_ENCODING = recipe.DeepseekV4Encoding()


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A completion taken apart. `finished`: the model ended its turn; `reasoning` is None when it did not think."""

    reasoning: str | None
    answer: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt: plain text, or one special token spelled out."""

    text: str
    special: bool


def _recipe_message(message: Message) -> recipe.Message:
    content = clean_text(message.content)
    if message.role == "system":
        return recipe.SystemMessage(content)
    if message.role == "user":
        return recipe.UserMessage(content)
    if message.role == "assistant":
        return recipe.AssistantMessage(content)
    raise TaelError(f"unknown role {message.role!r}{did_you_mean(message.role, ('system', 'user', 'assistant'))}")


def pieces_of(prompt: recipe.RenderedPrompt) -> list[Piece]:
    """The rendered prompt in order, cut where special tokens begin and end."""
    text, pieces, at = prompt.prompt, [], 0
    for start, end in prompt.special_ranges:
        if at < start:
            pieces.append(Piece(text[at:start], False))
        pieces.append(Piece(text[start:end], True))
        at = end
    if at < len(text):
        pieces.append(Piece(text[at:], False))
    return pieces


def _prompt_pieces(messages: Sequence[Message], mode: Mode) -> list[Piece]:
    if mode not in get_args(Mode):
        raise TaelError(f"unknown mode {mode!r}{did_you_mean(mode, get_args(Mode))}")
    # At effort "low" the V4 encoding adds no sentence about effort: <BOS>...<Assistant><think>, nothing more.
    conversation = recipe.Conversation(
        [_recipe_message(m) for m in messages], thinking_mode=mode == "think", reasoning_effort="low"
    )
    pieces = pieces_of(_ENCODING.render_conversation(conversation))
    return pieces[:-1] if mode == "free" else pieces


def _completion_pieces(message: Message) -> list[Piece]:
    """What the model is to say after `<Assistant>`: its choice to think or not, its words, and the end."""
    pieces = []
    if message.reasoning is not None:
        pieces += [Piece(THINK, True), Piece(clean_text(message.reasoning), False)]
    return [*pieces, Piece(END_THINK, True), Piece(clean_text(message.content), False), Piece(EOS, True)]


def _example_pieces(messages: Sequence[Message]) -> list[Piece]:
    if not messages or messages[-1].role != "assistant":
        raise TaelError("a training conversation must end with an assistant message")
    return _prompt_pieces(messages[:-1], "free") + _completion_pieces(messages[-1])


def encode_piece(tokenizer: Tokenizer, piece: Piece) -> list[int]:
    """Ids of one piece. Raises TaelError for a special token that the tokenizer does not have."""
    if not piece.special:
        return tokenizer.encode(piece.text)
    # A foreign tokenizer may end its turns with another token than DeepSeek's.
    known = tokenizer.eos_id if piece.text == EOS else tokenizer.token_id(piece.text)
    if known is None:
        raise TaelError(f"the tokenizer has no {piece.text} token: it cannot write DeepSeek's chat format")
    return [known]


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], mode: Mode) -> list[int]:
    """Ids of the prompt after which the model answers `messages`.

    Ends in `<think>` for mode "think", in `</think>` for "direct", in `<｜Assistant｜>` for "free". Reasoning of
    earlier turns is dropped, as DeepSeek's encoder does. Raises TaelError when there is no message, when the last
    one is the assistant's, or when the tokenizer lacks a token of the format.
    """
    if not messages or messages[-1].role == "assistant":
        raise TaelError("a prompt must end with a user or system message")
    return [i for piece in _prompt_pieces(messages, mode) for i in encode_piece(tokenizer, piece)]


def encode_example(tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """Ids [n] and loss mask [n] of a conversation that ends with the assistant.

    The last answer is `<think>reasoning</think>answer<EOS>` with reasoning, `</think>answer<EOS>` without; earlier
    turns lose their reasoning. Every token after an `<｜Assistant｜>` up to and with its `<EOS>` is to be predicted.
    Raises TaelError as `encode_prompt` does.
    """
    tokens: list[int] = []
    loss_mask: list[bool] = []
    answering = False
    for piece in _example_pieces(messages):
        ids = encode_piece(tokenizer, piece)
        tokens += ids
        loss_mask += [answering] * len(ids)
        if piece.special and piece.text in (ASSISTANT, EOS):
            answering = piece.text == ASSISTANT
    return Example(tokens, loss_mask)


def _split_once(ids: list[int], *separators: int | None) -> tuple[list[int], list[int] | None]:
    at = next((i for i, token in enumerate(ids) if token in separators), None)
    return (ids, None) if at is None else (ids[:at], ids[at + 1 :])


def _parse_text(text: str, thinking: bool, finished: bool) -> ParsedAnswer:
    """The same for a model whose thoughts, if it has any, are marked in plain text."""
    begun = text.lstrip().startswith(THINK)
    thought, ended, answer = text.partition(END_THINK)
    if not (begun or (thinking and ended)):
        return ParsedAnswer(None, text, finished)
    return ParsedAnswer(thought.lstrip().removeprefix(THINK), answer, finished)


def parse_completion(tokenizer: Tokenizer, tokens: Iterable[int], mode: Mode) -> ParsedAnswer:
    """Take apart what the model said after `encode_chat(..., mode)`; total: any ids give an answer.

    Nothing after the first token that ends an answer counts. Thoughts that never reach `</think>` are reasoning with
    an empty answer. In mode "free" a completion that starts with neither token is all answer. Stray special tokens
    are left out. Where the tokenizer has no such tokens, `<think>` and `</think>` in plain text do.
    """
    ids, rest = _split_once([int(i) for i in tokens], *tokenizer.stop_ids)
    if tokenizer.end_think_id is None:
        return _parse_text(tokenizer.decode(ids), mode == "think", rest is not None)
    thinking = mode == "think"
    if mode == "free" and ids and ids[0] in (tokenizer.think_id, tokenizer.end_think_id):
        thinking = ids[0] == tokenizer.think_id
        ids = ids[1:]
    if not thinking:
        return ParsedAnswer(None, tokenizer.decode(ids), rest is not None)
    thought, answer = _split_once(ids, tokenizer.end_think_id)
    return ParsedAnswer(tokenizer.decode(thought), tokenizer.decode(answer or []), rest is not None)


def render_text(messages: Sequence[Message], mode: Mode = "free") -> str:
    """The conversation as text with its special tokens spelled out, for showing, not for encoding.

    A conversation that ends with the assistant is shown as a training example, any other as the prompt of `mode`.
    """
    ends_answered = bool(messages) and messages[-1].role == "assistant"
    pieces = _example_pieces(messages) if ends_answered else _prompt_pieces(messages, mode)
    return "".join(piece.text for piece in pieces)
