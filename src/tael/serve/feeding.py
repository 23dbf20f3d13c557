"""What the engine brings, as deepseek-recipe's parser takes it.

A model with DeepSeek's tokens hands over token ids, so that only its own `</think>` ends thoughts, whatever a text
spells. Any other model hands over text, its tool calls translated. Where it is the model's choice whether to think
(mode "free"), its first token or word decides.
"""

from __future__ import annotations

from typing import Protocol

import deepseek_recipe as recipe

from tael.data import Tokenizer
from tael.data.tokenizer import END_THINK, THINK
from tael.engine import TokenEvent
from tael.serve.errors import ApiError
from tael.serve.formats import ChatFormat, DeepSeekFormat, Prompt, Translator
from tael.serve.models import Hosted
from tael.serve.orders import Order

DSML = "｜DSML｜"


class Feeder(Protocol):
    """Pieces for the parser; `tokens`: they are token ids; `reasoning`: tokens of thought so far."""

    tokens: bool
    reasoning: int

    def push(self, event: TokenEvent) -> list[recipe.InferenceChunk]: ...

    def finish(self) -> list[recipe.InferenceChunk]: ...


def make_feeder(order: Order, hosted: Hosted, prompt: Prompt, options: recipe.ParsingOptions) -> Feeder:
    """The feeder for one answer; it writes into `options` how the answer begins."""
    reasoning = recipe.ThinkingInitialStage.ReasoningStart
    if prompt.starts == "answer" and options.thinking_initial_stage == reasoning:
        options.thinking_initial_stage = None
    options.starts_in_tool_calls = prompt.starts == "calls"  # a template's prompt never is, and its calls say so
    logprobs = order.request.inference_options.logprobs
    free = prompt.starts == "free"
    tools = bool(order.request.conversation.tools)
    native = isinstance(hosted.format, DeepSeekFormat)
    if logprobs and tools and not native:
        raise ApiError(400, "logprobs: this model's format does not give them together with tools", "logprobs")
    if native or logprobs:
        return TokenFeeder(hosted.tokenizer, options, free, logprobs)
    translator = hosted.format.translator(prompt.starts) if tools else _Same()
    return TextFeeder(hosted.tokenizer, hosted.format, options, free, translator)


def _thinks(options: recipe.ParsingOptions) -> bool:
    stage = options.thinking_initial_stage
    return stage is not None and stage.starts_in_reasoning()


class _Same:
    """The translator of an answer that can hold no tool calls."""

    def push(self, text: str) -> str:
        return text

    def finish(self) -> str:
        return ""


class TokenFeeder:
    """Token ids as they come, without those that only mark turns."""

    tokens = True

    def __init__(self, tokenizer: Tokenizer, options: recipe.ParsingOptions, free: bool, logprobs: bool) -> None:
        spoken = {tokenizer.think_id, tokenizer.end_think_id, tokenizer.token_id(DSML)}
        self._silent = tokenizer.special_ids - spoken
        self._think_id, self._end_think_id = tokenizer.think_id, tokenizer.end_think_id
        self._options, self._free, self._logprobs = options, free, logprobs
        self._thinking, self.reasoning = not free and _thinks(options), 0

    def push(self, event: TokenEvent) -> list[recipe.InferenceChunk]:
        token = event.token
        if token < 0 or token in self._silent:
            return []
        if self._free:
            self._free = False
            self._thinking = thinks = token == self._think_id
            self._options.thinking_initial_stage = recipe.ThinkingInitialStage.ReasoningStart if thinks else None
            if thinks or token == self._end_think_id:
                return []
        self._thinking = self._thinking and token != self._end_think_id
        self.reasoning += self._thinking
        found = [(event.logprob, event.top or [])] if self._logprobs else None
        return [recipe.InferenceChunk.tokens([token], found)]

    def finish(self) -> list[recipe.InferenceChunk]:
        if self._free:
            self._options.thinking_initial_stage = None
        return []


class TextFeeder:
    """Text as it becomes certain, tool calls translated to what the parser reads."""

    tokens = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        form: ChatFormat,
        options: recipe.ParsingOptions,
        free: bool,
        translator: Translator,
    ) -> None:
        self._options, self._free, self._translator = options, free, translator
        marks = {tokenizer.think_id: THINK, tokenizer.end_think_id: END_THINK}
        self._marks = {**form.spelled, **{token: text for token, text in marks.items() if token is not None}}
        self._held, self._count = "", 0
        self._thinking, self.reasoning, self._tail = not free and _thinks(options), 0, ""

    def push(self, event: TokenEvent) -> list[recipe.InferenceChunk]:
        self._count += event.token >= 0
        text = self._marks.get(event.token, "") + event.text
        if event.sequence is not None and event.finish_reason == "stop":
            text += event.sequence.stop_sequence or ""  # for the parser to find and report
        return self._chunk(self._decided(self._translator.push(text)))

    def _decided(self, text: str) -> str:
        """`text` once it is known whether it begins with thoughts."""
        if not self._free:
            return text
        self._held += text
        begun = self._held.lstrip()
        if THINK.startswith(begun) and begun != THINK:
            return ""
        self._free = False
        self._thinking = thinks = begun.startswith(THINK)
        self._options.thinking_initial_stage = recipe.ThinkingInitialStage.ReasoningStart if thinks else None
        return begun.removeprefix(THINK) if thinks else self._held

    def _chunk(self, text: str) -> list[recipe.InferenceChunk]:
        if not text:
            return []
        if self._thinking:
            self._tail = (self._tail + text)[-len(text) - len(END_THINK) :]
            self._thinking = END_THINK not in self._tail
            self.reasoning += self._count * self._thinking
        count, self._count = self._count, 0
        return [recipe.InferenceChunk.text(text, count)]

    def finish(self) -> list[recipe.InferenceChunk]:
        text = self._decided(self._translator.finish())
        if self._free:
            self._free, self._options.thinking_initial_stage = False, None
            text = self._held
        return self._chunk(text)
