"""Logical KV blocks: who has which. The memory itself belongs to the executor."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from step3_hetero.specs import LOGICAL_BLOCK


def blocks_for(tokens: int) -> int:
    """Return how many logical blocks hold ``tokens`` tokens.

    >>> blocks_for(0), blocks_for(128), blocks_for(129)
    (0, 1, 2)
    """
    return -(-tokens // LOGICAL_BLOCK)


class BlockAllocator:
    """Hands out the lowest free blocks, so that a lone sequence's blocks lie side by side."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks))

    @property
    def free(self) -> int:
        """Return the number of free blocks."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Return ``count`` blocks, or None, taking nothing, when there are fewer."""
        if count > len(self._free):
            return None
        return [heapq.heappop(self._free) for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Return blocks to the free ones."""
        for block in blocks:
            heapq.heappush(self._free, block)
