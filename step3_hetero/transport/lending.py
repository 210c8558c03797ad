"""Memory that a received frame lends: given back when nobody looks at it any more."""

from __future__ import annotations

from collections.abc import Sequence


class Lent:
    """The parts of one frame, in a buffer that the next frame wants to use."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = parts

    def is_returned(self) -> bool:
        """Release the parts; say whether no array lies over one of them any more.

        >>> import numpy as np
        >>> part = memoryview(bytearray(4))
        >>> lent, array = Lent([part]), np.frombuffer(part, np.int32)
        >>> lent.is_returned()
        False
        >>> del array
        >>> lent.is_returned()
        True
        """
        try:
            for part in self._parts:
                part.release()
        except BufferError:
            return False
        return True
