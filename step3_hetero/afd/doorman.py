"""Who comes to a role's address: its front, the roles that call it, whoever measures the way."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

from step3_hetero.afd.contract import Contract, agree
from step3_hetero.afd.drain import Drain
from step3_hetero.afd.echo import echo_back
from step3_hetero.afd.link import Link, Message
from step3_hetero.afd.messages import Kind
from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import Channel, Listener

FRONT = "the front"
"""What a front calls itself; a role that calls another gives its own name, as ``a:0``."""

GREETING_S = 10.0
"""How long a peer may take to say who it is."""

MOST_GREETED = 16
"""Peers that may be saying who they are at a time; more are dropped."""

TICK_S = 0.2


class Doorman:
    """Greets peers in threads, so that nobody who says nothing keeps the role from its work.

    One front at a time; a second one is refused with a sentence. Callers are let in while there is
    a front. An idle role echoes what it is sent, so that the way to it can be measured.
    """

    def __init__(self, label: str, contract: Contract, listener: Listener) -> None:
        self._label = label
        self._contract = contract
        self._listener = listener
        self._changed = threading.Condition()
        self._has_front = False
        self._front: tuple[Link, bool] | None = None
        self._callers: deque[Link] = deque()
        self._inside: list[Link] = []
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._greeted = threading.BoundedSemaphore(MOST_GREETED)
        self._is_closed = False
        self._thread = threading.Thread(target=self._stand, name="doorman", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Return what ``select`` finds readable when `caller` has somebody."""
        return self._bell

    def front(self, drain: Drain, deadline_s: float | None = None) -> tuple[Link, bool]:
        """Return the next front, contract agreed, and whether it wants spans told.

        Raises:
            SystemExit: the drain was asked for.
            TransportTimeout: nobody came.
        """
        until = None if deadline_s is None else time.monotonic() + deadline_s
        with self._changed:
            while self._front is None:  # in slices: a signal's handler runs between them
                drain.check()
                if until is not None and time.monotonic() > until:
                    raise TransportTimeout(
                        f"{self._label}: no front came to {self._listener.address} within "
                        f"{deadline_s:g} s"
                    )
                self._changed.wait(TICK_S)
            found, self._front = self._front, None
            return found

    def caller(self) -> Link | None:
        """Return a role that has come to call this one."""
        with self._changed:
            if not self._callers:
                return None
            os.eventfd_read(self._bell)
            link = self._callers.popleft()
            self._inside = [*(one for one in self._inside if not one.closed), link]
            return link

    def front_left(self) -> None:
        """Let go of everybody who came for the front that is served no more."""
        with self._changed:
            for link in (*self._inside, *self._callers):
                link.close()
            for _ in self._callers:
                os.eventfd_read(self._bell)
            self._inside.clear()
            self._callers.clear()
            self._has_front = False

    def close(self) -> None:
        """Greet nobody any more."""
        self._is_closed = True
        self._thread.join()
        self.front_left()
        if self._front is not None:
            self._front[0].close()
        os.close(self._bell)

    def _stand(self) -> None:
        while not self._is_closed:
            with suppress(TransportTimeout):
                self._meet(self._listener.accept(TICK_S))

    def _meet(self, channel: Channel) -> None:
        """Greet a peer in a thread; where none is to be had, that peer has come in vain."""
        if not self._greeted.acquire(blocking=False):
            channel.close()
            return
        try:
            threading.Thread(target=self._greet, args=(channel,), daemon=True).start()
        except RuntimeError:  # out of threads
            self._greeted.release()
            channel.close()

    def _greet(self, channel: Channel) -> None:
        link = Link(channel, "a caller")
        try:
            if not self._heard(link, link.receive(GREETING_S)):
                link.close()
        except Exception:  # a stranger may say anything: it costs that connection, nobody else
            link.close()
        finally:
            self._greeted.release()

    def _heard(self, link: Link, first: Message) -> bool:
        """Answer a peer's first message; say whether it stays."""
        if first.kind == Kind.ECHO:
            if self._has_front:
                raise self._refused(link, "serves a front; measure when it is idle")
            echo_back(link, first)
            return False
        if first.kind != Kind.HELLO:
            return False
        name, theirs = first.said.get("from"), first.said.get("contract")
        if not isinstance(name, str) or not isinstance(theirs, dict):
            raise EdgeMismatch(f"{first.said} is no greeting")
        link.name = name
        try:
            agree(self._contract, theirs, self._label, link.name)
        except EdgeMismatch as mismatch:
            link.send(Kind.REFUSED, said={"why": str(mismatch)})
            raise
        self._let_in(link, first.said)
        return True

    def _let_in(self, link: Link, said: Mapping[str, object]) -> None:
        contract, now = dict(self._contract), time.monotonic()
        agreed = {"contract": contract, "name": self._label, "now": now}
        with self._changed:
            if self._is_closed:
                raise self._refused(link, "is ending", busy=True)
            if link.name == FRONT:
                if self._has_front:
                    raise self._refused(link, "serves another front", busy=True)
                link.send(Kind.AGREED, said=agreed)
                self._has_front = True
                self._front = link, bool(said.get("traced"))
                self._changed.notify_all()
                return
            if not self._has_front:
                raise self._refused(link, "has no front now", busy=True)
            link.send(Kind.AGREED, said=agreed)
            self._callers.append(link)
            os.eventfd_write(self._bell, 1)

    def _refused(self, link: Link, why: str, *, busy: bool = False) -> RoleLost:
        with suppress(RoleLost, TransportTimeout):
            link.send(Kind.REFUSED, said={"why": f"{self._label} {why}", "busy": busy})
        return RoleLost(f"{link.name} refused: {why}")
