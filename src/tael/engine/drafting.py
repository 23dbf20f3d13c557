"""Drafts by the model's own MTP modules (DeepSeek-V3, section 2.2), over cache layers of their own.

Module k reads, in slot p, the token of position p and the state of position p - 1 that module k - 1 left (the main
model's for k = 1), and proposes the token after it. So it has to read every token that the main model reads, a pass
behind, and its first slot is k. States that no token has followed yet are kept by the sequence; those at the ends of
blocks also beside the cache, so that a sequence that begins with shared blocks goes on as if it had read them itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tael.engine.batch import StepBatch
from tael.engine.filters import draw
from tael.engine.runner import Runner
from tael.engine.sampling import DRAFT, distribution, sample_rows
from tael.engine.scheduler import Work
from tael.engine.sequence import Sequence as Request
from tael.engine.speculative import Draft
from tael.errors import TaelError

MOST_PENDING = 64
"""States a sequence may keep while nothing is drafted; then the modules catch up."""


@dataclass
class _Track:
    """How far the modules have read one sequence. Of level k (0: the main model, k: module k), `states[k]` [m, D] are
    those of slots from done[k + 1] - 1 on: what module k + 1 has yet to read. `done[k]` is module k's next slot."""

    done: list[int]
    states: list[Tensor]
    preemptions: int = 0
    lost: bool = False
    """It shares blocks that were never read to the end: no drafts."""


@dataclass(frozen=True)
class _Part:
    """Slots first.. of one sequence for a module to read, with the states before them [n, D]."""

    sequence: Request
    first: int
    tokens: list[int]
    states: Tensor


class MtpDrafter:
    """Drafts up to `depth` tokens: depth d by module d, or by the last module again where there are fewer."""

    def __init__(self, runner: Runner, modules: int, depth: int) -> None:
        self._runner, self._modules, self._depth = runner, modules, depth
        self._tracks: dict[Request, _Track] = {}
        self._read = [False] * runner.num_blocks  # blocks that every module has read to the end
        self._ends: Tensor | None = None  # [num_blocks, modules, D] states of each level in a block's last slot

    def most(self, sequence: Request) -> int:
        track = self._tracks.get(sequence)
        return self._depth if track is not None and not track.lost else 0

    def forget(self, sequence: Request) -> None:
        self._tracks.pop(sequence, None)

    # ---------------------------------------------------------------- reading

    def observe(self, works: Sequence[Work], hidden: Sequence[Tensor]) -> None:
        """The main model's states of new tokens. Prompts are read on at once, and what is over to its end."""
        for work, states in zip(works, hidden, strict=True):
            self._begin(work, states)
            track = self._tracks[work.sequence]
            self._mark_written(work, len(states))
            self._keep_ends(0, [(work.sequence, work.start, states)])
            if not track.lost:
                track.states[0] = torch.cat((track.states[0], states))
        tracks = [(w, self._tracks[w.sequence]) for w in works]
        behind = [
            w.sequence
            for w, track in tracks
            if not track.lost and (w.expanded or w.sequence.finish_reason or len(track.states[0]) > MOST_PENDING)
        ]
        for module in range(1, self._modules + 1):
            parts = [p for s in behind if (p := self._part(s, module, s.computed)).tokens]
            for part, states in zip(parts, self._run(module, parts), strict=True):
                self._settle(module, part, states)

    def _begin(self, work: Work, states: Tensor) -> None:
        """Make a track for a sequence that has just been admitted, after the blocks it shares."""
        sequence, start = work.sequence, work.start
        track = self._tracks.get(sequence)
        if track is not None and track.preemptions == sequence.preemptions:
            return
        size = self._runner.block_size
        shape = (self._runner.num_blocks, self._modules, states.shape[-1])
        if self._ends is None:
            self._ends = torch.zeros(shape, dtype=states.dtype, device=states.device)
        lost = not all(self._read[block] for block in sequence.table[: start // size])
        done, kept, last = [0], [], sequence.table[start // size - 1]
        for module in range(1, self._modules + 1):
            done.append(max(start, module))
            reads_on = start >= module
            kept.append(self._ends[last, module - 1 : module] if reads_on else states[:0])
        self._tracks[sequence] = _Track(done, kept, sequence.preemptions, lost)

    def _mark_written(self, work: Work, count: int) -> None:
        """Blocks that now hold new tokens from their first slot on have not been read."""
        size = self._runner.block_size
        first = -(-work.start // size)
        for place in range(first, -(-(work.start + count) // size)):
            self._read[work.sequence.table[place]] = False

    def _keep_ends(self, level: int, found: list[tuple[Request, int, Tensor]]) -> None:
        """Remember the states of blocks' last slots; of each (sequence, first slot, states [n, D])."""
        assert self._ends is not None
        size = self._runner.block_size
        if level == self._modules:
            return
        for sequence, first, states in found:
            begin = size - 1 - first % size  # row of the first slot that ends a block
            rows = states[begin::size]
            if len(rows):
                start = (first + begin) // size
                blocks = torch.tensor(sequence.table[start : start + len(rows)], device=rows.device)
                self._ends[blocks, level] = rows

    def _part(self, sequence: Request, module: int, stop: int) -> _Part:
        """What `module` has yet to read of the slots before `stop`."""
        track = self._tracks[sequence]
        first = track.done[module]
        count = max(0, min(stop - first, len(track.states[module - 1])))
        return _Part(sequence, first, sequence.tokens[first : first + count], track.states[module - 1][:count])

    def _settle(self, module: int, part: _Part, states: Tensor) -> None:
        """What `module` has read of a part, states [n, D] of its first n slots, stays."""
        track = self._tracks[part.sequence]
        count, size = len(states), self._runner.block_size
        track.done[module] += count
        track.states[module - 1] = track.states[module - 1][count:]
        if module < self._modules:
            track.states[module] = torch.cat((track.states[module], states))
            self._keep_ends(module, [(part.sequence, part.first, states)])
        else:
            for place in range(part.first // size, track.done[module] // size):
                self._read[part.sequence.table[place]] = True

    def _run(self, module: int, parts: list[_Part]) -> list[Tensor]:
        """States [n, D] that `module` leaves in every part's slots."""
        if not parts:
            return []
        batch = StepBatch.build(
            [(p.tokens, p.first, p.sequence.table, p.first < p.sequence.prompt_length) for p in parts]
        )
        found = self._runner.draft(module, batch, torch.cat([p.states for p in parts]))
        return list(found.split([len(p.tokens) for p in parts]))

    # --------------------------------------------------------------- drafting

    def propose(self, works: Sequence[Work]) -> list[Draft]:
        """Tokens drawn with each request's own parameters, so that they are the likeliest to be kept."""
        drafts = [Draft() for _ in works]
        ahead: list[list[Tensor]] = [[] for _ in works]  # states [1, D] of drafted slots, by the last module run
        newest: list[Tensor] = [torch.empty(0) for _ in works]  # state [1, D] that knows the newest token
        for depth in range(1, max((w.drafts for w in works), default=0) + 1):
            going = [i for i, w in enumerate(works) if w.drafts >= depth and len(drafts[i].tokens) == depth - 1]
            if not going:
                break
            module = min(depth, self._modules)
            parts: list[_Part] = []
            settled: list[int] = []
            for i in going:
                sequence = works[i].sequence
                track, known = self._tracks[sequence], len(sequence.tokens)
                if depth > self._modules:
                    parts.append(_Part(sequence, known + depth - 2, drafts[i].tokens[-1:], newest[i]))
                    settled.append(0)
                    continue
                first = track.done[module]
                tokens = [*sequence.tokens, *drafts[i].tokens][first:]
                parts.append(_Part(sequence, first, tokens, torch.cat((track.states[module - 1], *ahead[i]))))
                settled.append(max(0, known - first))
            for i, part, count, states in zip(going, parts, settled, self._run(module, parts), strict=True):
                newest[i] = states[-1:]
                ahead[i] = [states[count:]] if depth <= self._modules else []
                if count:
                    self._settle(module, part, states[:count])
            logits = self._runner.logits(torch.cat([newest[i] for i in going]))
            for i, row in zip(going, logits, strict=True):
                self._draw(works[i].sequence, row, drafts[i])
        for work, draft in zip(works, drafts, strict=True):
            work.sequence.sampler.rollback(len(draft.tokens))
        return drafts

    def _draw(self, sequence: Request, logits: Tensor, draft: Draft) -> None:
        state, law = sequence.sampler, None
        try:
            if state.params.is_greedy:
                token = sample_rows(logits.unsqueeze(0), [state]).tokens[0]
            else:
                law = distribution(logits, state)
                token = draw(None, law.cpu().numpy(), state.uniform(state.index, DRAFT))
        except TaelError:
            return  # no token is left to choose: the main model's own logits will tell
        draft.tokens.append(token)
        draft.laws.append(law)
        state.accept(token)
