"""Which blocks of the cache belong to whom: bookkeeping in whole numbers, no tensors.

The cache is `num_blocks` blocks of `block_size` slots. Every sequence has a table: the numbers of its blocks, in the
order of its tokens. A full block can be shared: it is known by the tokens it holds and by the block before it (a
chain from the sequence's first token), so that a sequence that begins with the same tokens takes the same blocks. A
hash finds the candidates, and tokens are compared: a collision costs time, never a wrong block.

Every block is exactly one of
    reserved    block 0: padding may be written there, nobody's table holds it before its end
    free        holds nothing of use
    idle        holds a published prefix that no table uses now; the least recently used is given out anew
    in use      in `uses(block)` tables
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass


class Content:
    """What a full block holds. `parent` is what stands before it, None at a sequence's beginning."""

    __slots__ = ("key", "parent", "salt", "tokens")

    def __init__(self, key: int, parent: Content | None, tokens: tuple[int, ...], salt: Hashable) -> None:
        self.key, self.parent, self.tokens, self.salt = key, parent, tokens, salt

    def equals(self, other: Content) -> bool:
        """Whether the whole chains, from the first token on, are the same."""
        mine: Content | None = self
        its: Content | None = other
        while mine is not its:
            if mine is None or its is None or mine.tokens != its.tokens or mine.salt != its.salt:
                return False
            mine, its = mine.parent, its.parent
        return True


@dataclass
class PrefixStatistics:
    """Tokens of admitted sequences: taken from the cache, and computed."""

    hit_tokens: int = 0
    miss_tokens: int = 0


class BlockManager:
    """`hash_function` maps (parent's hash, salt, tokens) to an int; the tests inject one that collides."""

    def __init__(
        self, num_blocks: int, block_size: int, hash_function: Callable[[tuple[object, ...]], int] = hash
    ) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} slots: need 2 blocks (one is reserved) and a slot")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.statistics = PrefixStatistics()
        self._hash = hash_function
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._uses = [0] * num_blocks
        self._content: list[Content | None] = [None] * num_blocks
        self._index: dict[int, list[int]] = {}  # hash -> the blocks found by it

    @property
    def available(self) -> int:
        """Blocks that can be given out."""
        return len(self._free) + len(self._idle)

    @property
    def usable(self) -> int:
        """Blocks that can ever be given out."""
        return self.num_blocks - 1

    def uses(self, block: int) -> int:
        """How many tables hold `block`."""
        return self._uses[block]

    def is_published(self, block: int) -> bool:
        """Whether `block` was made shareable and has not been given out anew since."""
        return self._content[block] is not None

    def blocks_for(self, slots: int) -> int:
        """How many blocks hold `slots` slots."""
        return -(-slots // self.block_size)

    # --------------------------------------------------------------- prefixes

    def match(self, tokens: Sequence[int], salt: Hashable = None) -> list[int]:
        """The longest published prefix of `tokens`, in blocks, one token at least left out; each gains a use.

        Sequences of different `salt` never share.
        """
        found: list[int] = []
        parent: Content | None = None
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            wanted = self._describe(parent, tokens, start, salt)
            block = self._find(wanted)
            if block is None:
                break
            parent = self._content[block]
            found.append(block)
        for block in found:
            self._idle.pop(block, None)
            self._uses[block] += 1
        return found

    def publish(
        self, table: Sequence[int], tokens: Sequence[int], start: int, stop: int, salt: Hashable = None
    ) -> None:
        """Make blocks start..stop-1 of a table shareable: full of `tokens`, and those before them published."""
        for i in range(start, stop):
            parent = self._content[table[i - 1]] if i else None
            content = self._describe(parent, tokens, i * self.block_size, salt)
            self._content[table[i]] = content
            if self._find(content) is None:
                self._index.setdefault(content.key, []).append(table[i])

    def _describe(self, parent: Content | None, tokens: Sequence[int], start: int, salt: Hashable) -> Content:
        held = tuple(tokens[start : start + self.block_size])
        return Content(self._hash((parent.key if parent else None, salt, held)), parent, held, salt)

    def _find(self, wanted: Content) -> int | None:
        for block in self._index.get(wanted.key, ()):
            content = self._content[block]
            if content is not None and content.equals(wanted):
                return block
        return None

    # ------------------------------------------------------------ give and take

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks with one use each, following `after` where they can: contiguous tables are read in place.

        Raises ValueError when fewer are `available`; ask first.
        """
        if count > self.available:
            raise ValueError(f"{count} blocks asked for, {self.available} available")
        given: list[int] = []
        for _ in range(count):
            after = self._take(None if after is None else after + 1)
            given.append(after)
        return given

    def _take(self, preferred: int | None) -> int:
        if preferred in self._free:
            del self._free[preferred]
            block = preferred
        elif self._free:
            block, _ = self._free.popitem(last=False)
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._uses[block] = 1
        return block

    def _forget(self, block: int) -> None:
        self._hide(block)
        self._content[block] = None

    def _hide(self, block: int) -> None:
        content = self._content[block]
        if content is not None and block in (bucket := self._index.get(content.key, [])):
            bucket.remove(block)
            if not bucket:
                del self._index[content.key]

    def admit(self, tokens: Sequence[int], spare: int, salt: Hashable = None, share: bool = True) -> list[int] | None:
        """A table for all `tokens`, its published prefix shared; None while that would leave fewer than `spare`."""
        shared = self.match(tokens, salt) if share else []
        need = self.blocks_for(len(tokens)) - len(shared)
        if need + spare > self.available:
            self.release(shared)
            return None
        self.statistics.hit_tokens += len(shared) * self.block_size
        self.statistics.miss_tokens += len(tokens) - len(shared) * self.block_size
        return shared + self.allocate(need, shared[-1] if shared else None)

    def release(self, blocks: Sequence[int]) -> None:
        """Take back one use of each block of a table; a prefix's last block is the first to be given out anew."""
        for block in reversed(blocks):
            if self._uses[block] < 1:
                raise ValueError(f"block {block} is released more often than it was given out")
            self._uses[block] -= 1
            if self._uses[block]:
                continue
            content = self._content[block]
            if content is not None and block in self._index.get(content.key, ()):
                self._idle[block] = None
            else:
                self._content[block] = None
                self._free[block] = None
                self._free.move_to_end(block, last=False)

    def retract(self, blocks: Sequence[int]) -> None:
        """Let nobody find these blocks of a table any more; others' chains may still begin with them."""
        for block in blocks:
            self._hide(block)

    def clear(self) -> None:
        """Forget every published prefix that no table uses."""
        for block in list(self._idle):
            self._forget(block)
            self._free[block] = None
        self._idle.clear()

    # --------------------------------------------------------------- integrity

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError naming the first thing that cannot be; `tables` are all that are in use."""

        def need(holds: bool, message: str) -> None:
            if not holds:
                raise AssertionError(f"blocks: {message}")

        for block in range(self.num_blocks):
            places = (block == 0, block in self._free, block in self._idle, self._uses[block] > 0)
            need(
                sum(places) == 1, f"block {block} is in {sum(places)} places (reserved, free, idle, in use): {places}"
            )
            need(self._uses[block] >= 0, f"block {block} has {self._uses[block]} uses")
            need(block not in self._free or self._content[block] is None, f"free block {block} has content")
        indexed = [block for bucket in self._index.values() for block in bucket]
        need(len(indexed) == len(set(indexed)), "a block is in the index twice")
        need(all(self._index.values()), "the index has an empty bucket")
        need(set(self._idle) <= set(indexed), "an idle block cannot be found")
        for key, bucket in self._index.items():
            for block in bucket:
                content = self._content[block]
                need(content is not None and content.key == key, f"block {block} is found by a hash not its own")
                need(content is not None and len(content.tokens) == self.block_size, f"block {block} is not full")
                need(
                    content is not None and self._find(content) == block, f"block {block}'s content is indexed twice"
                )
        if tables is not None:
            counted = Counter(block for table in tables for block in table)
            need(0 not in counted, "a table holds the reserved block")
            for block in range(1, self.num_blocks):
                need(
                    counted[block] == self._uses[block],
                    f"block {block} is in {counted[block]} tables and counts {self._uses[block]} uses",
                )
