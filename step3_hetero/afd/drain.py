"""When a role is done: its front has gone, or somebody asked it to finish and end."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from step3_hetero.afd.link import Link, ready
from step3_hetero.afd.messages import Kind
from step3_hetero.errors import RoleLost, TransportTimeout

QUIET_S = 0.05
"""Peers that were told have sent what they had under way once nothing has come for so long."""


class Drain:
    """A wish to end: what is under way is answered first, for ``deadline_s`` at most."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.asked = False
        self._idle = False
        self._until: float | None = None

    def ask(self) -> None:
        """Wish it. From any thread, and from a signal's handler."""
        self.asked = True

    def on_sigterm(self) -> None:
        """Let SIGTERM ask; a role that has nothing under way ends at once, with code 0."""

        def handler(number: int, frame: Any) -> None:
            self.ask()
            if self._idle:
                sys.exit(0)

        signal.signal(signal.SIGTERM, handler)

    def check(self) -> None:
        """End here if it was asked for: where nothing is under way, and no signal comes."""
        if self.asked:
            sys.exit(0)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Nothing is under way here: importing, loading, waiting for a front."""
        self._idle = True
        try:
            self.check()  # a signal that comes from here on ends it by itself
            yield
        finally:
            self._idle = False

    def is_over(self, links: Sequence[Link], *, busy: bool = False) -> bool:
        """Say whether to end now. Tells the peers first; nothing is sent to us after that.

        ``busy``: something that came before is still being worked on.
        """
        if not self.asked:
            return False
        now = time.monotonic()
        if self._until is None:
            self._until = now + self.deadline_s
            for link in links:
                with suppress(RoleLost, TransportTimeout):
                    link.send(Kind.LEAVING)
        return now > self._until or not (busy or ready(links, QUIET_S))


class Service:
    """The time in which a role serves one front."""

    def __init__(self, front: Link, drain: Drain, silence_s: float) -> None:
        self._front = front
        self._drain = drain
        self._silence_s = silence_s

    def is_over(self, links: Sequence[Link], *, busy: bool = False) -> bool:
        """Say whether it is: `Drain.is_over`, or the front has given no sign of life."""
        if self._front.silent_s() > self._silence_s:
            return True
        return self._drain.is_over(links, busy=busy)
