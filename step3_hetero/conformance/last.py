"""The last thing made, kept until another is asked for: weights of a real layer take seconds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


class Last:
    """Remembers one value and what it was made for."""

    def __init__(self) -> None:
        self._owner: object = None
        self._key: Hashable = None
        self._value: Any = None

    def get(self, owner: object, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value for ``owner`` (by identity) and ``key``, made anew unless it was last.

        >>> last = Last()
        >>> last.get(last, 1, lambda: "made"), last.get(last, 1, lambda: "again")
        ('made', 'made')
        """
        if self._owner is not owner or self._key != key:
            self._owner = self._key = self._value = None  # let go of the old before making the new
            self._value = make()
            self._owner, self._key = owner, key
        return self._value
