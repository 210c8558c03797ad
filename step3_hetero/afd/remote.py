"""The instances of another role, as an attention instance sees them: calls out, answers back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from step3_hetero.afd.link import Link, Message
from step3_hetero.afd.messages import Kind
from step3_hetero.errors import RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.specs import HostArray
from step3_hetero.transport.base import CorruptFrame

GONE = (RoleLost, TransportTimeout)

Connect = Callable[[str, str], Link]
"""Opens a link to (name, address), contract agreed."""


@dataclass(eq=False)
class Asked:
    """A call that has no answer yet. Its arrays are kept: another instance may have to be asked."""

    seq: int
    said: Mapping[str, Any]
    arrays: Mapping[str, HostArray]
    link: Link | None = None
    since: float = 0.0


class Remote:
    """One role elsewhere. Each caller begins with another instance, to spread the load.

    A call goes to one instance; if that is lost, to the next, or to whoever takes its place.
    """

    def __init__(self, role: str, first: int, connect: Connect, deadline_s: float) -> None:
        self.role = role
        self._first = first
        self._connect = connect
        self._deadline_s = deadline_s
        self._links: dict[int, Link] = {}
        self._addresses: dict[int, str] = {}
        self._asked: dict[int, Asked] = {}
        self._damaged: set[int] = set()
        self._leaving: set[int] = set()
        self._lost: set[int] = set()

    @property
    def links(self) -> list[Link]:
        """Return the links to instances that live."""
        return list(self._links.values())

    def point(self, addresses: Mapping[int, str]) -> None:
        """Take in where the instances listen now, and send them what waits for an answer."""
        for number, address in addresses.items():
            if self._addresses.get(number) == address and number in self._links:
                continue
            self._drop(number)
            self._lost.discard(number)
            self._addresses[number] = address
            try:
                self._links[number] = self._connect(f"{self.role}:{number}", address)
            except GONE:
                self._lost.add(number)
        self._place()

    def call(self, seq: int, said: Mapping[str, Any], arrays: Mapping[str, HostArray]) -> None:
        """Ask one instance to run a stage; the answer comes with the same ``seq``."""
        self._asked[seq] = Asked(seq, said, arrays)
        self._place()

    def read(self, link: Link) -> Iterator[Message]:
        """Yield the answers that have come on a link; one that nobody waits for is dropped.

        Raises:
            Step3HeteroError: the other side cannot run the stage; its own words.
        """
        number = next(n for n, x in self._links.items() if x is link)
        try:
            message = link.receive(self._deadline_s)
        except CorruptFrame:
            self._damage(number, link)
            return
        except GONE:
            self._drop(number)
            self._place()
            return
        if message.kind == Kind.AGAIN:
            self._damage(number, link)
        elif message.kind == Kind.LEAVING:  # what it has it answers; it gets no more
            self._leaving.add(number)
        elif message.kind == Kind.FAILED:
            raise Step3HeteroError(str(message.said.get("why")))
        elif message.kind == Kind.ANSWER and self._asked.pop(message.seq, None) is not None:
            self._damaged.discard(number)
            yield message

    def lost(self) -> list[int]:
        """Return the instances lost since the last time: gone, or silent while they owe an answer.

        The front is to be told, which ends what is silent and says where others listen.
        """
        owing = {id(a.link) for a in self._asked.values()}
        for number, link in list(self._links.items()):
            if id(link) in owing and link.silent_s() > self._deadline_s:
                self._drop(number)
        found, self._lost = sorted(self._lost), set()
        if found:
            self._place()
        return found

    def close(self) -> None:
        """Let go of every link."""
        for number in list(self._links):
            self._drop(number)

    def _place(self) -> None:
        """Send what has not been sent to anybody who lives."""
        for asked in list(self._asked.values()):
            while asked.link is None and (numbers := sorted(set(self._links) - self._leaving)):
                number = numbers[self._first % len(numbers)]
                self._send(asked, number)

    def _send(self, asked: Asked, number: int) -> None:
        link = self._links[number]
        try:
            link.send(Kind.CALL, asked.seq, asked.said, asked.arrays)
            asked.link, asked.since = link, time.monotonic()
        except GONE:
            self._drop(number)

    def _damage(self, number: int, link: Link) -> None:
        """Send once more what a damaged frame may have been; the second time the role is dropped.

        The other side is told too: what was damaged may have been an answer.
        """
        if number in self._damaged:
            self._drop(number)
        else:
            self._damaged.add(number)
            for asked in self._asked.values():
                if asked.link is link:
                    asked.link = None
        self._place()

    def _drop(self, number: int) -> None:
        link = self._links.pop(number, None)
        self._damaged.discard(number)
        self._leaving.discard(number)
        if link is None:
            return
        self._lost.add(number)
        link.close()
        for asked in self._asked.values():
            if asked.link is link:
                asked.link = None
