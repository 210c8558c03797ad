"""SIGTERM ends a command as Ctrl-C does: roles are ended, then one line, and a code of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED_CODE = 128 + signal.SIGTERM
"""What a shell says of a process that SIGTERM ended."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever handles Ctrl-C handles it too."""


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Have SIGTERM raise `Terminated` here, once: what it ends meanwhile is not disturbed again.

    Outside the main thread, which alone hears signals, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
