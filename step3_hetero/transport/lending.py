"""Memory that a received frame lends: given back when nobody looks at it any more."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from step3_hetero.transport.base import Bytes


class Lent:
    """The memory of one frame, in a buffer that the next frame wants to use.

    ``room`` is an array object of this frame alone: whatever is made of its parts, views or arrays,
    keeps it alive.

    >>> buffer = np.zeros(8, np.uint8)
    >>> lent = Lent(buffer[:4], lambda view: [view[:2], view[2:]])
    >>> array = np.frombuffer(lent.parts[0], np.int8)
    >>> lent.is_returned()
    False
    >>> del array
    >>> lent.is_returned()
    True
    """

    def __init__(self, room: Bytes, cut: Callable[[memoryview], list[memoryview]]) -> None:
        room.flags.writeable = False
        whole = room.data
        self.parts = cut(whole)
        whole.release()
        self._room: weakref.ref[Any] = weakref.ref(room)

    def is_returned(self) -> bool:
        """Release the parts; say whether nothing lies over the memory any more."""
        for part in self.parts:
            part.release()
        return self._room() is None


def plain_memory(nbytes: int) -> Bytes:
    """Return memory of any content."""
    return np.empty(nbytes, np.uint8)


def aligned_buffer(
    nbytes: int, alignment: int, memory: Callable[[int], Bytes] = plain_memory
) -> Bytes:
    """Return memory of any content whose address is a multiple of ``alignment``."""
    spare = memory(nbytes + alignment)
    start = -spare.ctypes.data % alignment
    return spare[start : start + nbytes]
