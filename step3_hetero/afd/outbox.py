"""Frames that leave from a thread: who puts one in goes on at once, and can read meanwhile.

Two peers that each send a frame larger than the kernel's buffers before they read would wait for
each other. One of them has to read while it sends; who leads micro-batches does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from step3_hetero.errors import Step3HeteroError
from step3_hetero.transport.base import Frame


class Outbox:
    """Sends frames in their order. Its buffers must stay as they are until they have left.

    It has no bound of its own: who puts frames in has a bounded number under way. ``failed`` is
    told, from the thread, that one could not be sent; none after it is.
    """

    def __init__(
        self, name: str, send: Callable[[Frame], None], failed: Callable[[Step3HeteroError], None]
    ) -> None:
        self._send = send
        self._failed = failed
        self._waiting: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        threading.Thread(target=self._run, name=f"outbox to {name}", daemon=True).start()

    def put(self, frame: Frame) -> None:
        """Send a frame after those before it."""
        with self._changed:
            if not self._is_closed:
                self._waiting.append(frame)
            self._changed.notify_all()

    def flush(self, deadline_s: float) -> bool:
        """Wait until all has left, or none will; say whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, deadline_s)

    def close(self) -> None:
        """Send no more; a frame that is leaving ends with its channel."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while (frame := self._next()) is not None:
            try:
                self._send(frame)
            except Step3HeteroError as error:
                self._failed(error)
                return
            with self._changed:
                if self._waiting:  # closed meanwhile: there are none
                    self._waiting.popleft()
                self._changed.notify_all()

    def _next(self) -> Frame | None:
        """Return the next frame, left in its place until it is sent; None: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            return self._waiting[0] if self._waiting else None
