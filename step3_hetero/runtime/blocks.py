"""Logical KV blocks: who holds which, and which of them are kept for what they hold.

The memory itself belongs to the executor.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from step3_hetero.specs import LOGICAL_BLOCK


def blocks_for(tokens: int) -> int:
    """Return how many logical blocks hold ``tokens`` tokens.

    >>> blocks_for(0), blocks_for(128), blocks_for(129)
    (0, 1, 2)
    """
    return -(-tokens // LOGICAL_BLOCK)


@dataclass(frozen=True, slots=True)
class BlockKey:
    """What a full block holds: its tokens and everything before them.

    ``content`` is compared before a block is shared: two contents of one digest are told apart.
    """

    digest: bytes
    content: bytes


class BlockPool:
    """The blocks of one attention instance, counted by holders.

    A block is free, held by one sequence or more, or cached: held by nobody, kept for what it
    holds until its memory is needed. The lowest free block is taken first, so that a lone
    sequence's blocks lie side by side; then the cached block that was left longest ago.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks))
        self._holders = [0] * blocks
        self._keys: dict[int, BlockKey] = {}
        self._known: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Return the number of blocks that hold nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Return the number of blocks that are kept for what they hold, held by nobody."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Return the number of blocks that ``take`` could give out."""
        return len(self._free) + len(self._cached)

    def holders(self, block: int) -> int:
        """Return how many sequences hold a block."""
        return self._holders[block]

    def take(self, count: int) -> list[int] | None:
        """Return ``count`` blocks with one holder, or None, taking nothing, when there are fewer.

        Cached blocks lose what they are kept for; held ones never do.
        """
        if count > self.available:
            return None
        while len(self._free) < count:
            block, _ = self._cached.popitem(last=False)
            del self._known[self._keys.pop(block).digest]
            heapq.heappush(self._free, block)
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def find(self, keys: Sequence[BlockKey]) -> list[int]:
        """Return the blocks that hold the longest known beginning of ``keys``; nobody's yet."""
        found = []
        for key in keys:
            block = self._known.get(key.digest)
            if block is None or self._keys[block].content != key.content:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Count one holder more for each block."""
        for block in blocks:
            self._holders[block] += 1
            self._cached.pop(block, None)

    def keep(self, block: int, key: BlockKey) -> None:
        """Make a full block known by what it holds; the first block with a content stays known."""
        if key.digest not in self._known:
            self._known[key.digest] = block
            self._keys[block] = key

    def give_back(self, blocks: Sequence[int]) -> None:
        """Count one holder less for each block, the last first: a chain is of no use without its
        beginning, so its end is the first to be taken."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            if block in self._keys:
                self._cached[block] = None
            else:
                heapq.heappush(self._free, block)

    def forget(self) -> None:
        """Drop everything that blocks are known by: the memory under them is lost."""
        for block in self._cached:
            heapq.heappush(self._free, block)
        self._cached.clear()
        self._keys.clear()
        self._known.clear()
