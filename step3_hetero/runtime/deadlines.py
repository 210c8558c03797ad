"""When requests have to be done, the earliest first."""

from __future__ import annotations

import heapq

SLACK = 64
"""Entries of requests that ended early are swept out once they are so many more than the rest."""


class Deadlines:
    """The deadlines of requests under way, by request number. Times are of one clock."""

    def __init__(self) -> None:
        self._at: dict[int, float] = {}
        self._order: list[tuple[float, int]] = []

    def __len__(self) -> int:
        """Return how many requests have a deadline."""
        return len(self._at)

    def add(self, number: int, at: float) -> None:
        """Note when a request has to be done."""
        self._at[number] = at
        heapq.heappush(self._order, (at, number))

    def drop(self, number: int) -> None:
        """Forget a request that is done."""
        if self._at.pop(number, None) is not None and len(self._order) > 2 * len(self) + SLACK:
            self._order = [(at, n) for n, at in self._at.items()]
            heapq.heapify(self._order)

    def next(self) -> float | None:
        """Return the earliest deadline; None without any."""
        while self._order and self._order[0][1] not in self._at:
            heapq.heappop(self._order)
        return self._order[0][0] if self._order else None

    def passed(self, now: float) -> list[int]:
        """Return the requests whose deadlines have passed, earliest first, and forget them."""
        found = []
        while (at := self.next()) is not None and at <= now:
            number = heapq.heappop(self._order)[1]
            del self._at[number]
            found.append(number)
        return found
