"""From logits to a token: greedy, or by inverse transform with one uniform number a token.

The numbers of a request are Philox's: number n of a purpose depends on the request's seed, n and the purpose alone,
so what else is in the batch, how far speculation looked ahead, and in which row a request stands play no part in it.
Every sum that decides about a row runs over that row alone, in one fixed order: a row's token and log-probability are
the same bits in any company (on the CPU; other devices pick their reduction by the size of the batch).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tael.engine.filters import NO_TOKEN, draw, survivors
from tael.engine.params import SamplingParams
from tael.errors import TaelError

if TYPE_CHECKING:
    from tael.engine.constrain import Grammar

TARGET, DRAFT, ACCEPT = 0, 1, 2
"""Purposes of random numbers (streams): the model's draw, a draft's draw, the test whether a draft is accepted."""

_CHUNK = 64  # numbers made at a time: 16 counter steps of Philox4x64


def _chunk(seed: int, chunk: int, stream: int) -> list[float]:
    key = seed % 2**64 + (stream << 64)  # the upper half of Philox's key keeps the purposes apart
    bits = np.random.Philox(key=key, counter=chunk * _CHUNK // 4)
    return np.random.Generator(bits).random(_CHUNK).tolist()


def uniform(seed: int, index: int, stream: int = TARGET) -> float:
    """Number `index` in [0, 1) of a request's `stream`; stream 0 is Generator(Philox(key=seed)).random(..)[index]."""
    return _chunk(seed, index // _CHUNK, stream)[index % _CHUNK]


class SamplerState:
    """What sampling has to remember of one sequence: counts for the penalties, the grammar's place, the numbers.

    `accept` every token that joins the output, `rollback` those that speculation takes back. Work a token: O(distinct
    tokens seen) with penalties, O(vocabulary) only where a grammar masks.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        vocab_size: int = 0,
        grammar: Grammar | None = None,
        *,
        thinking: bool = False,
        free: bool = False,
        think_id: int | None = None,
        end_think_id: int | None = None,
    ) -> None:
        """`thinking`: the prompt ends inside thoughts, so the grammar waits for `end_think_id`. `free`: the prompt
        leaves it to the model, which may say `think_id` or `end_think_id` first.

        Raises TaelError for tokens in `params` outside the vocabulary, and for a constraint without its grammar.
        """
        if vocab_size:
            params.check_vocabulary(vocab_size)
        if params.constraint is not None and grammar is None:
            raise TaelError("sampling: the constraint was not compiled; this needs a tokenizer")
        self.params, self.grammar, self.thinking = params, grammar, thinking
        self.index = 0
        """Tokens accepted: the number of the next draw."""
        self.is_plain = not params.changes_logits and grammar is None
        """True when logits are sampled as they are: nothing but temperature, top_k, top_p and min_p."""
        self._opening = tuple(i for i in (think_id, end_think_id) if i is not None) if free else ()
        self._think_id, self._end_think_id = think_id, end_think_id
        self._steps: list[
            tuple[bool, bool]
        ] = []  # of every accepted token: were we thinking, did the grammar read it
        self._stop = torch.tensor(params.stop_ids, dtype=torch.int64)
        self._bias_ids = torch.tensor([t for t, _ in params.bias_pairs], dtype=torch.int64)
        self._bias = torch.tensor([b for _, b in params.bias_pairs], dtype=torch.float32)
        self._seen = _Seen(prompt_ids if params.repetition_penalty != 1 else ()) if params.has_penalties else None
        self._numbers: dict[tuple[int, int], list[float]] = {}

    def uniform(self, index: int, stream: int = TARGET) -> float:
        """Number `index` of `stream`, as the function `uniform`, from a table."""
        chunk, place = divmod(index, _CHUNK)
        table = self._numbers.get((stream, chunk))
        if table is None:
            if len(self._numbers) >= 8:
                self._numbers.clear()
            table = self._numbers[stream, chunk] = _chunk(self.params.seed, chunk, stream)
        return table[place]

    @property
    def constrained(self) -> bool:
        """Does the grammar decide about the next token?"""
        return self.grammar is not None and not self.thinking

    @property
    def is_done(self) -> bool:
        """True once the grammar is complete and nothing but a stop token may follow."""
        return self.grammar is not None and not self.thinking and self.grammar.is_done

    def process(self, logits: Tensor) -> Tensor:
        """Logits [V] after penalties, bias, min_tokens and grammar; `logits` itself, unchanged, when `is_plain`."""
        return logits if self.is_plain else self._apply(logits.float().clone())

    def _apply(self, out: Tensor) -> Tensor:
        """`process` in place on fp32 [V]."""
        params, device = self.params, out.device
        if self._seen is not None:
            self._seen.penalise(out, params)
        if len(self._bias):
            out.index_add_(0, self._bias_ids.to(device), self._bias.to(device))
        bars_stop = self.index < params.min_tokens or (self.grammar is not None and self.thinking)
        if bars_stop and len(self._stop):
            # An answer in the constraint's form is owed: thoughts may not end the sequence.
            out.index_fill_(0, self._stop.to(device), -math.inf)
        if self.grammar is not None and not self.thinking:
            opening = self._opening if self.index == 0 else ()
            kept = [out[i].clone() for i in opening]
            self.grammar.apply(out)
            for i, value in zip(opening, kept, strict=True):
                out[i] = value
        return out

    def accept(self, token: int) -> None:
        """`token` joins the output."""
        if self._seen is not None:
            self._seen.add(token)
        if self.grammar is not None:
            was, reads = self.thinking, False
            if self.thinking:
                self.thinking = token != self._end_think_id
            elif self.index == 0 and token in self._opening:
                self.thinking = token == self._think_id
            else:
                self.grammar.accept(token)
                reads = True
            self._steps.append((was, reads))
        self.index += 1

    def rollback(self, count: int) -> None:
        """Take back the last `count` accepted tokens; raises ValueError when there are not so many."""
        if not 0 <= count <= self.index:
            raise ValueError(f"cannot take back {count} of {self.index} tokens")
        if self._seen is not None:
            self._seen.remove(count)
        if self.grammar is not None and count:
            taken = self._steps[-count:]
            del self._steps[-count:]
            self.thinking = taken[0][0]
            self.grammar.rollback(sum(reads for _, reads in taken))
        self.index -= count


class _Seen:
    """Distinct tokens of prompt and output with their counts in the output, as arrays ready for a gather."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = list(dict.fromkeys(prompt_ids))
        self._size, self._fixed = len(distinct), len(distinct)
        self._ids = np.zeros(max(64, 2 * self._size), dtype=np.int64)
        self._ids[: self._size] = distinct
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._place = {token: place for place, token in enumerate(distinct)}
        self._output: list[int] = []

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is None:
            if self._size == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            place = self._place[token] = self._size
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1
        self._output.append(token)

    def remove(self, count: int) -> None:
        for _ in range(count):
            token = self._output.pop()
            place = self._place[token]
            self._counts[place] -= 1
            if place >= self._fixed and self._counts[place] == 0:
                del self._place[token]  # last in, first out: the newest distinct token is the last of the arrays
                self._size -= 1

    def penalise(self, out: Tensor, params: SamplingParams) -> None:
        if not self._size:
            return
        ids = torch.from_numpy(self._ids[: self._size]).to(out.device)
        values = out[ids]
        if params.repetition_penalty != 1:
            factor = params.repetition_penalty
            values = torch.where(values < 0, values * factor, values / factor)
        if params.presence_penalty or params.frequency_penalty:
            counts = torch.from_numpy(self._counts[: self._size]).to(out.device)
            values = values - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        out[ids] = values


@dataclass(frozen=True)
class Sampled:
    """One token a row.

    `logprobs` are of the processed and tempered distribution before top_k, top_p and min_p (of the untempered one
    when greedy): what a trainer computes from the same logits. `top` holds the most likely tokens of that
    distribution, best first, where the request asked for them.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]] | None]


def sample_rows(logits: Tensor, states: Sequence[SamplerState], indices: Sequence[int] | None = None) -> Sampled:
    """Draw the next token of every sequence. logits [n, V] fp32, one state a row; changes neither.

    `indices` are the numbers of the draws; each state's own `index` unless given. Raises TaelError when a row leaves
    no token to choose (logits that are not finite, or bars that shut out every token).
    """
    if indices is None:
        indices = [state.index for state in states]
    logits = _processed(logits, states)
    logprobs = _logprobs(logits, [state.params.temperature for state in states])  # [n, V]
    tokens = [-1] * len(states)
    plain = []
    for row, state in enumerate(states):
        if state.params.is_greedy:
            tokens[row] = _argmax(logits[row])  # of the logits: rounding makes some log-probabilities equal
        elif state.params.is_filtered:
            tokens[row] = draw(*survivors(logprobs[row].cpu().numpy(), state.params), state.uniform(indices[row]))
        else:
            plain.append(row)
    if plain:
        rows = logprobs if len(plain) == len(states) else logprobs[plain]
        numbers = torch.tensor([states[r].uniform(indices[r]) for r in plain], dtype=torch.float64)
        for row, token in zip(plain, _inverse_transform(rows.exp(), numbers).tolist(), strict=True):
            tokens[row] = token
    chosen = _chosen(logprobs, tokens)
    for row, value in enumerate(chosen):
        if not value > -math.inf:
            raise TaelError(f"sampling: {NO_TOKEN} (row {row})")
    return Sampled(tokens, chosen, [_top(logprobs[row], s.params.top_logprobs) for row, s in enumerate(states)])


def report(logits: Tensor, state: SamplerState, token: int) -> tuple[float, list[tuple[int, float]] | None]:
    """What `Sampled` would say of `token`, drawn from logits [V]: its log-probability, and the most likely ones."""
    logprobs = _logprobs(state.process(logits.float()).unsqueeze(0), [state.params.temperature])[0]
    return float(logprobs[token]), _top(logprobs, state.params.top_logprobs)


def distribution(logits: Tensor, state: SamplerState) -> Tensor:
    """The law of the next token, [V] float64 that sums to 1: processed, tempered and filtered logits [V].

    What `sample_rows` draws from; when greedy, all of it on the most likely token. Raises TaelError as it does.
    """
    params = state.params
    logits = state.process(logits.float())
    logprobs = _logprobs(logits.unsqueeze(0), [params.temperature])[0]
    if not logprobs.max() > -math.inf:
        raise TaelError(f"sampling: {NO_TOKEN}")
    if not params.is_greedy and not params.is_filtered:
        probabilities = logprobs.exp().double()
        return probabilities / probabilities.sum()
    if params.is_greedy:
        ids, weights = np.array([_argmax(logits)]), np.ones(1)
    else:
        ids, weights = survivors(logprobs.cpu().numpy(), params)
    law = np.zeros(len(logits))
    law[ids] = weights / weights.sum()
    return torch.from_numpy(law).to(logits.device)


def _processed(logits: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """Logits [n, V] with every row processed; the same tensor when all are plain."""
    logits = logits.float()
    if all(state.is_plain for state in states):
        return logits
    logits = logits.clone()
    for row, state in zip(logits, states, strict=True):
        if not state.is_plain:
            state._apply(row)
    return logits


def _logprobs(logits: Tensor, temperatures: list[float]) -> Tensor:
    """Log-probabilities [n, V] of the tempered rows (untempered where the temperature is 0)."""
    if any(t not in (0, 1) for t in temperatures):
        # Divided by a tensor, never by a number: torch may multiply by a number's reciprocal, which is not the same.
        divisor = torch.tensor([t or 1.0 for t in temperatures], device=logits.device)
        logits = logits / divisor.unsqueeze(-1)
    return logits.log_softmax(-1)


def _argmax(row: Tensor) -> int:
    """The first most likely token; numpy's search is 12 times torch's on the CPU (10 against 130 us for 129,280)."""
    return int(row.numpy().argmax()) if row.device.type == "cpu" else int(row.argmax())


def _chosen(logprobs: Tensor, tokens: list[int]) -> list[float]:
    """logprobs[i, tokens[i]] of every row i."""
    if logprobs.device.type == "cpu":
        return logprobs.numpy()[np.arange(len(tokens)), tokens].tolist()
    return logprobs.gather(-1, torch.tensor(tokens, device=logprobs.device).unsqueeze(-1)).squeeze(-1).tolist()


_BLOCK = 128  # divides the size of nearly every vocabulary


def _inverse_transform(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Tokens [n] at the cumulative shares `numbers` [n] of probabilities [n, V].

    First the block of tokens, then the token in it: a cumulative sum of all of [n, V] in double precision costs more
    than the softmax.
    """
    n, vocab_size = probabilities.shape
    if vocab_size % _BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, _BLOCK - vocab_size % _BLOCK))
    blocks = probabilities.view(n, -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)  # [n, V / block]
    target = numbers.to(ends.device).unsqueeze(-1) * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[-1] - 1)  # [n, 1]
    target = target - torch.where(block > 0, ends.gather(-1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    # The block's sum was rounded on its own: a target beyond its last token means that last (likely) token.
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    place = torch.minimum(torch.searchsorted(inside, target, right=True), last)
    return (block * _BLOCK + place).squeeze(-1).clamp_max(vocab_size - 1)


def _top(logprobs: Tensor, count: int) -> list[tuple[int, float]] | None:
    if not count:
        return None
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))
