"""Things that are handed on when their time has come, in order, by a thread of their own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from step3_hetero.emulate.link import Link

Item = TypeVar("Item")

MOST_WAITING = 32
"""Things on the way at a time; who sends more waits, as it does for a full socket."""


class Delay(Generic[Item]):
    """One direction of a link: bytes after bytes over the wire, all of them late by its latency.

    ``link`` may be changed at any time, for what is put in from then on.
    """

    def __init__(self, link: Link, deliver: Callable[[Item], None], name: str) -> None:
        self.link = link
        self._deliver = deliver
        self._waiting: deque[tuple[float, Item]] = deque()
        self._changed = threading.Condition()
        self._free_s = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: Item, nbytes: int, deadline_s: float) -> bool:
        """Send something of so many bytes on its way; say whether there was room in time."""
        with self._changed:
            if not self._changed.wait_for(self._has_room, deadline_s):
                return False
            begin_s = max(time.monotonic(), self._free_s)
            self._free_s = begin_s + self.link.wire_s(nbytes)
            self._waiting.append((self._free_s + self.link.latency_s, item))
            self._changed.notify_all()
        return True

    def close(self, wait_s: float | None = None) -> None:
        """Hand on at once what is still on its way, and end; wait for that, for so long at most."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(wait_s)

    def _has_room(self) -> bool:
        return self._closed or len(self._waiting) < MOST_WAITING

    def _run(self) -> None:
        while (item := self._next()) is not None:
            self._deliver(item[0])

    def _next(self) -> tuple[Item] | None:
        """Wait for the first thing's time; None at the end."""
        with self._changed:
            while True:
                left_s = self._waiting[0][0] - time.monotonic() if self._waiting else None
                if left_s is not None and (left_s <= 0 or self._closed):
                    self._changed.notify_all()
                    return (self._waiting.popleft()[1],)
                if self._closed:
                    return None
                self._changed.wait(left_s)
