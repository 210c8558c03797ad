"""Copies between an emulated card and its host: they take their time beside the processor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from step3_hetero.backend import Event
from step3_hetero.errors import TransportTimeout

SPIN_S = 200e-6
"""The end of a copy is looked for without a pause: a sleep is late by as much as a piece takes."""


def nothing() -> None:
    """Copy nothing: what only takes its time."""


class Copying(Event):
    """A copy whose time has begun. What ``copy`` does is done when it is waited for, not before."""

    def __init__(self, end_s: float, copy: Callable[[], object]) -> None:
        self._end_s = end_s
        self._copy: Callable[[], object] | None = copy
        self._waiting = threading.Lock()

    def wait(self, deadline_s: float | None = None) -> None:
        """Block until done; see ``backend.Event``."""
        with self._waiting:
            if self._copy is None:
                return
            left_s = self._end_s - time.monotonic()
            if deadline_s is not None and left_s > deadline_s:
                time.sleep(deadline_s)
                raise TransportTimeout(f"a copy did not end within {deadline_s:g} s")
            time.sleep(max(0.0, left_s - SPIN_S))
            while time.monotonic() < self._end_s:
                pass
            self._copy()
            self._copy = None


class Lane:
    """One way between card and host: bytes after bytes, at the link's rate."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        self._queueing = threading.Lock()

    def start(self, nbytes: int, copy: Callable[[], object]) -> Event:
        """Begin to copy so many bytes, once those before have passed."""
        with self._queueing:
            begin_s = max(time.monotonic(), self._free_s)
            self._free_s = begin_s + nbytes / self._bytes_per_s
            return Copying(self._free_s, copy)
