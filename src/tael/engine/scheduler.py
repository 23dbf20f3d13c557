"""Who computes what in the next step: continuous batching over a paged cache.

Every step has room for `token_budget` tokens. Sequences that decode come first, one token each (and their drafts);
then prompts in pieces fill what is left; then waiting sequences are admitted in the order they came, when there are
blocks for all the tokens they have. When a decoding sequence finds no block, the youngest gives up all of its own and
waits: later its prompt is read again and its tokens are replayed, in the forms they were computed in at first.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from tael.engine.blocks import BlockManager
from tael.engine.sequence import Sequence
from tael.engine.settings import PrefixCache


@dataclass(frozen=True)
class Work:
    """Tokens start..stop-1 of a sequence are to be computed, and `drafts` more that are yet to be drafted."""

    sequence: Sequence
    start: int
    stop: int
    drafts: int = 0

    @property
    def expanded(self) -> bool:
        """Prompt tokens are read in MHA form, generated ones in the absorbed form; never both in one piece."""
        return self.start < self.sequence.prompt_length

    @property
    def samples(self) -> bool:
        """Whether what follows the last token is to be sampled."""
        return self.stop == len(self.sequence.tokens)


class Scheduler:
    """Holds the waiting and the running sequences, both in order of arrival."""

    def __init__(
        self, blocks: BlockManager, max_batch: int, token_budget: int, prefix_cache: PrefixCache = "all"
    ) -> None:
        self.blocks = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._max_batch, self._token_budget, self._prefix_cache = max_batch, token_budget, prefix_cache

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let `sequence` wait for its turn."""
        insort(self.waiting, sequence, key=lambda s: s.arrival)

    def schedule(self, wanted_drafts: Callable[[Sequence], int] = lambda _: 0) -> list[Work]:
        """The next step's work; blocks for all of it are in the tables. Empty only when nothing waits or runs."""
        for sequence in [s for s in self.running if s.prompt_length <= s.computed and not s.decodes]:
            if sequence.state == "running":  # a token was put in: it may need a block of its own
                self._extend(sequence, 0)
        plan, budget = self._decoding(wanted_drafts)
        for sequence in self.running:
            if budget and not sequence.decodes:
                budget -= self._piece(sequence, budget, plan)
        self._admit(budget, plan)
        return plan

    def _decoding(self, wanted_drafts: Callable[[Sequence], int]) -> tuple[list[Work], int]:
        budget, plan = self._token_budget, []
        decoding = [s for s in self.running if s.decodes]
        for place, sequence in enumerate(decoding):
            if sequence.state != "running":
                continue  # gave up its blocks to an older one
            others = len(decoding) - place - 1
            drafts = max(0, min(wanted_drafts(sequence), sequence.room - 1, budget - others - 1))
            if not self._extend(sequence, drafts):
                continue
            stop = len(sequence.tokens)
            drafts = min(drafts, len(sequence.table) * self.blocks.block_size - stop)
            plan.append(Work(sequence, stop - 1, stop, drafts))
            budget -= 1 + drafts
        return plan, budget

    def _extend(self, sequence: Sequence, drafts: int) -> bool:
        """See to blocks for the next token, at any price, and for drafts, where there are some to spare."""
        while True:
            need = self.blocks.blocks_for(len(sequence.tokens)) - len(sequence.table)
            if need <= self.blocks.available:
                break
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        more = self.blocks.blocks_for(len(sequence.tokens) + drafts) - len(sequence.table)
        count = more if more <= self.blocks.available else need
        if count > 0:
            sequence.table += self.blocks.allocate(count, sequence.table[-1])
        return True

    def _piece(self, sequence: Sequence, budget: int, plan: list[Work]) -> int:
        """Plan as much of a sequence's uncomputed tokens as the budget allows, up to the end of the prompt."""
        inside_prompt = sequence.computed < sequence.prompt_length
        border = sequence.prompt_length if inside_prompt else len(sequence.tokens)
        stop = min(border, sequence.computed + budget)
        plan.append(Work(sequence, sequence.computed, stop))
        return stop - sequence.computed

    def _admit(self, budget: int, plan: list[Work]) -> None:
        read = _Reading(self.running, self.blocks.block_size, self._prefix_cache != "off")
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self._max_batch:
                return
            if read.has_most_of(sequence):
                continue
            share = self._prefix_cache != "off"
            table = self.blocks.admit(sequence.tokens, len(self.running), sequence.salt, share)
            if table is None:
                return  # in order: a long prompt is not overtaken for ever by short ones
            self._start(sequence, table)
            read.add(sequence)
            budget -= self._piece(sequence, budget, plan)

    def _start(self, sequence: Sequence, table: list[int]) -> None:
        shared = 0
        while shared < len(table) and self.blocks.is_published(table[shared]):
            shared += 1
        sequence.table, sequence.published = table, shared
        sequence.computed = shared * self.blocks.block_size
        if not sequence.admitted:
            sequence.admitted, sequence.cached = True, sequence.computed
        sequence.state = "running"
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.arrival)

    def advance(self, sequence: Sequence, computed: int) -> None:
        """The first `computed` tokens now have entries; full blocks of them become shareable."""
        sequence.computed = computed
        if self._prefix_cache == "off":
            return
        end = computed if self._prefix_cache == "all" else min(computed, sequence.prompt_length)
        full = end // self.blocks.block_size
        if full > sequence.published:
            self.blocks.publish(sequence.table, sequence.tokens, sequence.published, full, sequence.salt)
            sequence.published = full

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits to be computed again."""
        self._leave(sequence)
        sequence.state, sequence.computed, sequence.published = "waiting", 0, 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A sequence is over, or no longer wanted; its published blocks stay to be shared."""
        if sequence.state == "waiting":
            self.waiting.remove(sequence)
        elif sequence.state == "running":
            self._leave(sequence)
        sequence.state = "finished"

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        sequence.table = []

    def check_integrity(self) -> None:
        """Raise AssertionError naming the first thing that cannot be."""
        self.blocks.check_integrity([s.table for s in self.running])
        for sequence in self.running:
            slots = len(sequence.table) * self.blocks.block_size
            assert sequence.computed <= min(slots, len(sequence.tokens) - 1), "more is computed than there is"
            assert sequence.published * self.blocks.block_size <= sequence.computed, (
                "published before it was computed"
            )
            assert sequence.state == "running"
        assert all(s.state == "waiting" and not s.table and not s.computed for s in self.waiting)
        arrivals = [s.arrival for s in self.running]
        assert arrivals == sorted(arrivals) and len(set(arrivals)) == len(arrivals)


class _Reading:
    """Prompts that are being read right now: who shares most of one is better served a step later, from the cache.

    So a group of samples of one problem, or clients with one long system prompt, read it once.
    """

    def __init__(self, running: list[Sequence], block_size: int, shares: bool) -> None:
        self._size, self._shares = block_size, shares
        self._by_first_block: dict[Hashable, list[Sequence]] = {}
        for sequence in running:
            if sequence.computed < sequence.prompt_length:
                self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        if self._shares and len(sequence.tokens) > self._size:
            self._by_first_block.setdefault(self._key(sequence), []).append(sequence)

    def has_most_of(self, sequence: Sequence) -> bool:
        """Whether blocks now being read make up half or more of what `sequence` would otherwise have to read."""
        if not self._shares or len(sequence.tokens) <= self._size:
            return False
        for other in self._by_first_block.get(self._key(sequence), ()):
            shared = self._common(sequence.tokens, other.tokens)
            known = min(other.computed, shared)
            if shared > known and 2 * (shared - known) >= len(sequence.tokens) - known:
                return True
        return False

    def _key(self, sequence: Sequence) -> Hashable:
        return sequence.salt, tuple(sequence.tokens[: self._size])

    def _common(self, one: list[int], other: list[int]) -> int:
        """Tokens of the whole blocks with which both begin, the last token of `one` left out."""
        size, at = self._size, 0
        while at + size < len(one) and at + size <= len(other) and one[at : at + size] == other[at : at + size]:
            at += size
        return at
