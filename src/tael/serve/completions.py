"""Plain completion of text: OpenAI's legacy protocol, and DeepSeek's fill-in-the-middle.

The order of a fill-in-the-middle prompt is that of DeepSeek-V3's training: prefix, suffix, then what was between.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tael.engine import SamplingParams, TokenEvent
from tael.errors import TaelError
from tael.serve.answer import Counts
from tael.serve.bodies import Body, field, read_sampling
from tael.serve.caller import Caller
from tael.serve.errors import ApiError
from tael.serve.exchange import Priced
from tael.serve.models import Hosted
from tael.serve.service import Service, model_name, refusal
from tael.serve.visit import Opening, Visit

USUAL_LENGTH = 4096
"""Tokens of a completion whose request does not say; OpenAI's 16 surprises people, DeepSeek allows 4K."""


@dataclass(frozen=True)
class TextOrder:
    """A completion request, understood."""

    id: str
    model: str
    prompt: list[int]
    text: str
    """What the prompt says, where it is to be echoed."""
    params: list[SamplingParams]
    stream: bool


class TextExchange(Priced):
    """One completion request being answered; `chunks` yields parts of the answer as dicts, [] as a beat."""

    def __init__(self, order: TextOrder, hosted: Hosted, service: Service) -> None:
        counts = [Counts(prompt=len(order.prompt)) for _ in order.params]
        super().__init__(hosted, order.prompt, order.params, counts, service.worker)
        self.order, self.created = order, int(time.time())
        self._echo = [order.text] * len(order.params)
        self._logprobs = [_Logprobs(hosted, len(order.text)) for _ in order.params]

    async def start(self, salt: str | None) -> None:
        await self._race.start(salt, True)

    async def chunks(self) -> AsyncIterator[list[dict[str, Any]]]:
        """One dict a step and choice; the last one has the usage."""
        left = len(self.counts)
        async for place, update in self._race.updates():
            if not update.events:
                yield []
                continue
            self.meter.mark()
            text = self._echo[place] + "".join(each.text for each in update.events)
            self._echo[place] = ""
            for event in update.events:
                self.counts[place].add(event)
            ending = _ending(update.events)
            logprobs = self._logprobs[place].push(update.events) if self._wants_logprobs else None
            left -= ending is not None
            choice = {"index": place, "text": text, "logprobs": logprobs, "finish_reason": ending}
            chunk = self._frame([choice])
            if not left:
                chunk["usage"] = self.usage()
            yield [chunk]

    @property
    def _wants_logprobs(self) -> bool:
        return self.order.params[0].logprobs is not None

    def usage(self) -> dict[str, Any]:
        figures = self.figures
        counts = figures.counts
        usage = {
            "prompt_tokens": counts.prompt,
            "completion_tokens": counts.completion,
            "total_tokens": counts.prompt + counts.completion,
            "prompt_tokens_details": {"cached_tokens": counts.cached},
            "prompt_cache_hit_tokens": counts.cached,
            "prompt_cache_miss_tokens": counts.prompt - counts.cached,
        }
        figures.extend(usage)
        return usage

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        frame = {"id": self.order.id, "object": "text_completion", "created": self.created, "model": self.order.model}
        return frame | {"choices": choices}

    def gather(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """One response of all that `chunks` yielded."""
        choices: dict[int, dict[str, Any]] = {}
        for chunk in chunks:
            for part in chunk["choices"]:
                whole = choices.setdefault(part["index"], {**part, "text": "", "logprobs": None})
                whole["text"] += part["text"]
                whole["finish_reason"] = part["finish_reason"]
                whole["logprobs"] = _joined(whole["logprobs"], part["logprobs"])
        return self._frame([choices[place] for place in sorted(choices)]) | {"usage": self.usage()}


def _ending(events: Sequence[TokenEvent]) -> str | None:
    reason = events[-1].finish_reason
    return {None: None, "stop": "stop"}.get(reason, "length")


class _Logprobs:
    """OpenAI's legacy form: parallel lists; `offset` is the length of what is echoed before."""

    def __init__(self, hosted: Hosted, offset: int) -> None:
        self._tokenizer, self._offset = hosted.tokenizer, offset

    def push(self, events: Sequence[TokenEvent]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in events:
            if each.token < 0:
                continue
            word = self._word(each.token)
            found["tokens"].append(word)
            found["token_logprobs"].append(each.logprob)
            found["top_logprobs"].append({self._word(token): value for token, value in each.top or []})
            found["text_offset"].append(self._offset)
            self._offset += len(each.text)
        return found

    def _word(self, token: int) -> str:
        return self._tokenizer.decode([token], skip_special=False)


def _joined(before: dict[str, list[Any]] | None, after: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    if before is None or after is None:
        return before or after
    return {name: before[name] + after[name] for name in before}


# ------------------------------------------------------------------ requests


def completion(service: Service, body: Body, caller: Caller, size: int = 0) -> Opening[TextExchange]:
    """`async with` it for a completion request that the engine has taken. Raises ApiError."""
    id = "cmpl-" + secrets.token_hex(12)
    visit = Visit(service, "completions", model_name(body), caller, id, asked=body.get("prompt"))

    async def start(visit: Visit) -> TextExchange:
        hosted, most = visit.hosted, service.settings.max_choices
        order = await service.aside(size, lambda: understand(body, visit.id, visit.model, hosted, most))
        visit.admit(len(order.prompt))
        exchange = TextExchange(order, hosted, service)
        await exchange.start(service.salt(caller))
        return exchange

    return Opening(visit, start)


def understand(body: Body, id: str, model: str, hosted: Hosted, most_choices: int) -> TextOrder:
    """Raises ApiError that names the field."""
    prompt, text = _prompt(body, hosted)
    choices = field(body, "n", int, 1)
    if not 1 <= choices <= most_choices:
        raise ApiError(400, f"n: must be 1 to {most_choices}, not {choices}", "n")
    echo = field(body, "echo", bool, False)
    return TextOrder(
        id,
        model,
        prompt,
        text if echo else "",
        _params(body, prompt, hosted, choices),
        field(body, "stream", bool, False),
    )


def _prompt(body: Body, hosted: Hosted) -> tuple[list[int], str]:
    prompt, suffix = body.get("prompt"), field(body, "suffix", str)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    tokenizer = hosted.tokenizer
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt) and not suffix:
        vocabulary = hosted.engine.model.config.vocab_size
        if not all(0 <= token < vocabulary for token in prompt):
            raise ApiError(400, f"prompt: token ids must be 0 to {vocabulary - 1}", "prompt")
        return prompt, tokenizer.decode(prompt)
    if not isinstance(prompt, str):
        raise ApiError(422, "prompt: must be text, or a list of token ids (one prompt a request)", "prompt")
    if suffix is None:
        return [*tokenizer.start_ids, *tokenizer.encode(prompt)] or _empty(), prompt
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    if begin is None or hole is None or end is None:
        raise ApiError(400, "suffix: this model has no fill-in-the-middle tokens; leave suffix out", "suffix")
    ids = [begin, *tokenizer.encode(prompt), hole, *tokenizer.encode(suffix), end]
    return [*tokenizer.start_ids, *ids], prompt


def _empty() -> list[int]:
    raise ApiError(400, "prompt: is empty, and this model has no token to begin with", "prompt")


def _params(body: Body, prompt: list[int], hosted: Hosted, choices: int) -> list[SamplingParams]:
    asked, room = field(body, "max_tokens", int), hosted.context - len(prompt)
    if room < 1 or (asked or 1) > room:
        raise ApiError(
            400,
            f"max_tokens: prompt of {len(prompt)} tokens and max_tokens {asked or 1} do not fit the model's context "
            f"of {hosted.context}",
            "max_tokens",
        )
    stop = body.get("stop") or ()
    seed = field(body, "seed", int, secrets.randbelow(2**31))
    try:
        params = SamplingParams(
            max_tokens=min(USUAL_LENGTH, room) if asked is None else asked,
            temperature=field(body, "temperature", float, 1.0),
            top_p=field(body, "top_p", float, 1.0),
            seed=seed,
            stop_ids=hosted.tokenizer.stop_ids,
            logprobs=field(body, "logprobs", int),
            stop=(stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop,
            **read_sampling(body),
        )
    except TaelError as error:
        raise refusal(error) from None
    return [replace(params, seed=seed + i) for i in range(choices)]
