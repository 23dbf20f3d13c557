"""One answer on its way: tokens from the engine in, chunks of the client's protocol out.

deepseek-recipe's StreamProcessor parses thoughts, tool calls and stop strings; tael.serve.feeding hands it what the
model said.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepseek_recipe as recipe

from tael.engine import TokenEvent
from tael.serve.feeding import make_feeder
from tael.serve.formats import Prompt
from tael.serve.models import Hosted
from tael.serve.orders import Order

_ENDINGS = {
    "stop": recipe.InferenceFinishReason.Stop,
    "length": recipe.InferenceFinishReason.Length,
    "loop": recipe.InferenceFinishReason.Length,
    "cancelled": recipe.InferenceFinishReason.Length,
}


class Chunk(NamedTuple):
    """One message of the stream, as JSON; `event` is its SSE name where the protocol has names."""

    event: str | None
    data: str


@dataclass
class Counts:
    """What an answer took, in tokens. `prompt` and `cached` are known with the first token."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    drafted: int = 0
    accepted: int = 0
    finish_reason: str = "cancelled"

    def add(self, event: TokenEvent) -> None:
        """Count one event of the answer."""
        self.completion += event.token >= 0
        if event.sequence is not None:
            self.cached = event.sequence.cached
            self.drafted, self.accepted = event.sequence.drafted, event.sequence.accepted
        self.finish_reason = event.finish_reason or self.finish_reason


class Answer:
    """One choice. `feed` with what the engine brings; after the last event `response` is whole."""

    def __init__(self, order: Order, hosted: Hosted, prompt: Prompt, index: int = 0) -> None:
        self.counts = Counts(prompt=len(prompt.ids))
        self._order, self._hosted, self._index = order, hosted, index
        self._options = order.request.parsing_options
        self._feeder = make_feeder(order, hosted, prompt, self._options)
        self._processor: recipe.StreamProcessor | None = None
        self._whole: Any = None
        self._ready: list[Any] = []
        self._stream = order.stream

    @property
    def takes_tokens(self) -> bool:
        """Whether the engine need not turn tokens into text."""
        return self._feeder.tokens

    def feed(self, events: Sequence[TokenEvent]) -> list[Chunk]:
        """The chunks that `events` (of one step) make; for an order that is not streamed they are only gathered."""
        made: list[Any] = []
        for event in events:
            self.counts.add(event)
            for piece in self._feeder.push(event):
                made += self._push(piece)
        self.counts.reasoning = self._feeder.reasoning
        if events[-1].finish_reason is not None:
            made += self._end(events[-1].finish_reason)
        return self._out(made)

    def _open(self) -> recipe.StreamProcessor:
        """The parser; begun when it is known how the answer begins, and what the cache held."""
        if self._processor is None:
            tokenizer = self._hosted.recipe_tokenizer if self._feeder.tokens else None
            self._processor = recipe.StreamProcessor(self._order.generator(), self._options, tokenizer)
            counts = self.counts
            usage = recipe.PromptUsage(prompt_tokens=counts.prompt, prompt_cache_hit_tokens=counts.cached)
            self._ready = self._processor.push(recipe.InferenceChunk.ready(prompt_usage=usage))
        return self._processor

    def _push(self, piece: recipe.InferenceChunk) -> list[Any]:
        """The parser ends by itself at a stop string; what the engine says after that is not the answer's."""
        processor = self._open()
        return [] if processor.finished else processor.push(piece)

    def _end(self, reason: str) -> list[Any]:
        made: list[Any] = []
        for piece in self._feeder.finish():
            made += self._push(piece)
        made += self._push(recipe.InferenceChunk.finish(_ENDINGS.get(reason, _ENDINGS["length"])))
        return made + self._open().finish()

    def _out(self, made: list[Any]) -> list[Chunk]:
        ready, self._ready = self._ready, []
        made = ready + made
        if not self._stream:
            for chunk in made:
                self._gather(chunk)
            return []
        name = self._order.protocol.response.sse_event_name
        return [Chunk(name(chunk), self._numbered(chunk.to_json())) for chunk in made]

    def _numbered(self, data: str) -> str:
        return (
            data.replace('"choices":[{"index":0,', f'"choices":[{{"index":{self._index},', 1) if self._index else data
        )

    def _gather(self, chunk: Any) -> None:
        if self._whole is None:
            counts, order = self.counts, self._order
            made = order.protocol.response
            self._whole = made(order.id, order.model, int(time.time()), counts.prompt, counts.cached)
        self._whole.accumulate(chunk)

    @property
    def response(self) -> dict[str, Any]:
        """The whole answer of an order that is not streamed."""
        return json.loads(self._whole.to_json())
