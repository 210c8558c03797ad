"""A moment in which signals wait: what a handler raises must not part a process from its owner."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM, where Python handles them, wait until the end of the block.

    Outside the main thread, which alone hears signals, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: h for number in HELD if callable(h := signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, lambda heard, frame: came.append(heard))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for heard in came:
            signal.raise_signal(heard)
