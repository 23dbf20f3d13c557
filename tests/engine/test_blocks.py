"""Blocks are never lost, never given out twice, and what is shared is what was asked for, hashes colliding or not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tael.engine.blocks import BlockManager

HASHES: dict[str, Any] = {"python": hash, "constant": lambda _: 0, "three": lambda key: hash(key) % 3}
bits = st.integers(0, 1)


class Held:
    """One sequence: its tokens, its table, how many of its blocks are published."""

    def __init__(self, tokens: list[int], salt: Any, table: list[int], shared: int) -> None:
        self.tokens, self.salt, self.table, self.published = tokens, salt, table, shared


class Blocks(RuleBasedStateMachine):
    """`written` is what the cache would really hold: for a block, the whole prefix up to its end, and the salt."""

    @initialize(kind=st.sampled_from(sorted(HASHES)), count=st.integers(2, 14), size=st.integers(1, 3))
    def begin(self, kind: str, count: int, size: int) -> None:
        self.blocks, self.size = BlockManager(count, size, HASHES[kind]), size
        self.held: list[Held] = []
        self.written: dict[int, tuple[Any, ...]] = {}

    @rule(tokens=st.lists(bits, min_size=1, max_size=9), salt=st.sampled_from([None, "a"]), spare=st.integers(0, 2))
    def admit(self, tokens: list[int], salt: Any, spare: int) -> None:
        available = self.blocks.available
        hits = self.blocks.statistics.hit_tokens
        table = self.blocks.admit(tokens, spare, salt)
        if table is None:
            assert self.blocks.available == available
            assert available < self.blocks.blocks_for(len(tokens)) + spare
            return
        shared = (self.blocks.statistics.hit_tokens - hits) // self.size
        assert shared * self.size < len(tokens) and len(table) == -(-len(tokens) // self.size)
        for place in range(shared):
            assert self.written[table[place]] == (salt, *tokens[: (place + 1) * self.size])
        for block in table[shared:]:
            assert self.blocks.uses(block) == 1
            self.written.pop(block, None)
        self.held.append(Held(list(tokens), salt, table, shared))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), tokens=st.lists(bits, min_size=1, max_size=4))
    def grow(self, which: int, tokens: list[int]) -> None:
        one = self.held[which % len(self.held)]
        need = self.blocks.blocks_for(len(one.tokens) + len(tokens)) - len(one.table)
        if need <= self.blocks.available:
            given = self.blocks.allocate(need, one.table[-1])
            one.table += given
            one.tokens += tokens
            for block in given:
                self.written.pop(block, None)
        else:
            with pytest.raises(ValueError, match="available"):
                self.blocks.allocate(need)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99), part=st.floats(0, 1))
    def publish(self, which: int, part: float) -> None:
        one = self.held[which % len(self.held)]
        full = len(one.tokens) // self.size
        stop = one.published + round(part * (full - one.published))
        for place in range(one.published, stop):
            self.written[one.table[place]] = (one.salt, *one.tokens[: (place + 1) * self.size])
        self.blocks.publish(one.table, one.tokens, one.published, stop, one.salt)
        one.published = stop

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        one = self.held.pop(which % len(self.held))
        self.blocks.release(one.table)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 99))
    def fail(self, which: int) -> None:
        one = self.held.pop(which % len(self.held))
        self.blocks.retract(one.table)
        self.blocks.release(one.table)

    @rule()
    def clear(self) -> None:
        self.blocks.clear()

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "blocks"):
            self.blocks.check_integrity([one.table for one in self.held])


Blocks.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)
TestBlocks = Blocks.TestCase


def full(blocks: BlockManager, tokens: list[int], salt: Any = None) -> list[int]:
    """A sequence that was computed, published and released; its table."""
    table = blocks.admit(tokens, 0, salt)
    assert table is not None
    blocks.publish(table, tokens, 0, len(tokens) // blocks.block_size, salt)
    blocks.release(table)
    return table


def test_a_token_is_left_to_compute() -> None:
    blocks = BlockManager(9, 4)
    table = full(blocks, list(range(12)))
    for length, shared in ((3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)):
        found = blocks.match(list(range(length)))
        assert found == table[:shared]
        blocks.release(found)


def test_salts_do_not_share() -> None:
    blocks = BlockManager(20, 2)
    full(blocks, [1, 2, 3, 4, 5], "one")
    assert blocks.match([1, 2, 3, 4, 5], "two") == blocks.match([1, 2, 3, 4, 5]) == []
    assert len(blocks.match([1, 2, 3, 4, 5], "one")) == 2


@pytest.mark.parametrize("kind", list(HASHES))
def test_the_same_tokens_elsewhere_are_another_block(kind: str) -> None:
    """[5, 6] after [1, 2] is not [5, 6] at the beginning, nor after [3, 4]."""
    blocks = BlockManager(20, 2, HASHES[kind])
    full(blocks, [1, 2, 5, 6])
    full(blocks, [3, 4, 7, 8])
    assert blocks.match([5, 6, 0]) == []
    assert len(blocks.match([3, 4, 5, 6, 0])) == 1
    assert len(blocks.match([1, 2, 5, 6, 0])) == 2


def test_the_least_recently_used_goes_first_and_its_end_before_its_beginning() -> None:
    blocks = BlockManager(7, 1)
    full(blocks, [1, 2, 3])
    full(blocks, [4, 5, 6])
    blocks.release(blocks.match([1, 2, 3, 0]))  # used again
    blocks.allocate(2)  # takes 6 and 5
    assert len(blocks.match([1, 2, 3, 0])) == 3 and len(blocks.match([4, 5, 6, 0])) == 1
    assert blocks.available == 0
    blocks.check_integrity()


def test_tables_stay_contiguous_where_they_can() -> None:
    blocks = BlockManager(10, 1)
    one = blocks.allocate(2)
    one += blocks.allocate(2, one[-1])
    assert one == [1, 2, 3, 4]
    blocks.release(one)
    assert blocks.allocate(4) == [1, 2, 3, 4]


def test_the_ends_of_two_equal_blocks() -> None:
    """Two sequences computed the same block at the same time: one can be found, both can be released."""
    blocks = BlockManager(9, 2)
    tables = [blocks.admit([1, 2, 3], 0) for _ in range(2)]
    for table in tables:
        assert table is not None
        blocks.publish(table, [1, 2, 3], 0, 1)
    blocks.check_integrity([t for t in tables if t])
    for table in tables:
        blocks.release(table or [])
    blocks.check_integrity([])
    assert blocks.available == blocks.usable == 8


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="reserved"):
        BlockManager(1, 4)
    blocks = BlockManager(3, 4)
    table = blocks.allocate(2)
    with pytest.raises(ValueError, match="available"):
        blocks.allocate(1)
    blocks.release(table)
    with pytest.raises(ValueError, match="more often"):
        blocks.release(table)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b._free.popitem(), "is in . places"),
        (lambda b: b._uses.__setitem__(2, 1), "is in . places"),
        (lambda b: b._uses.__setitem__(1, 3), "counts 3 uses"),
        (lambda b: b._index.__setitem__(5, [1, 1]), "in the index twice"),
        (lambda b: b._index.__setitem__(5, [1]), "hash not its own"),
        (lambda b: b._index.__setitem__(5, []), "empty bucket"),
    ],
)
def test_integrity_notices(spoil: Any, message: str) -> None:
    blocks = BlockManager(6, 2)
    table = blocks.admit([1, 2, 3], 0)
    assert table == [1, 2]
    blocks.release([2])
    blocks.check_integrity([[1]])
    spoil(blocks)
    with pytest.raises(AssertionError, match=message):
        blocks.check_integrity([[1]])
