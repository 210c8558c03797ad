"""The instances of another role, as an attention instance sees them: calls out, answers back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from step3_hetero.afd.link import GONE, Link, Message
from step3_hetero.afd.messages import Kind
from step3_hetero.errors import Step3HeteroError
from step3_hetero.specs import HostArray
from step3_hetero.transport.base import CorruptFrame

Connect = Callable[[str, str], Link]
"""Opens a link to (name, address), contract agreed."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A call on its way to one member of a set, and when its handing over began and ended."""

    member: int
    start_s: float
    end_s: float


@dataclass(eq=False)
class Asked:
    """A call that has no whole answer yet. Its arrays are kept: another set may have to be asked.

    ``links`` are those of the set that has it, member by member; none: nobody has it. ``epoch``
    counts the sets that were asked: a partial answer of an earlier one is none.
    """

    seq: int
    said: Mapping[str, Any]
    arrays: Mapping[str, HostArray]
    epoch: int = 0
    links: tuple[Link, ...] = ()
    answers: dict[int, Message] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)

    def owed_by(self, link: Link) -> bool:
        """Say whether the member behind a link still has to answer."""
        return any(x is link and m not in self.answers for m, x in enumerate(self.links))

    def taken_back(self) -> None:
        """Forget whom it was sent to, and what has been answered."""
        self.links = ()
        self.answers.clear()
        self.sent.clear()


class Remote:
    """One role elsewhere: sets of ``sharers`` processes, each a replica, one after the other.

    Every member of a set gets the whole call and answers its partial sums. A set that lacks a
    member answers nothing: its calls go whole to the next set, or wait until it is complete again.
    Each caller begins with another set, to spread the load.
    """

    def __init__(
        self, role: str, first: int, connect: Connect, deadline_s: float, sharers: int = 1
    ) -> None:
        self.role = role
        self._first = first
        self._connect = connect
        self._deadline_s = deadline_s
        self._sharers = sharers
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
            except (*GONE, CorruptFrame):
                self._lost.add(number)
        self._place()

    def call(
        self, seq: int, said: Mapping[str, Any], arrays: Mapping[str, HostArray]
    ) -> list[Sent]:
        """Ask one set to run a stage; return what leaves now. Answers come with ``seq``.

        Each member is told ``call``, a number for what crosses the edge: two more than the member
        before it.
        """
        asked = self._asked[seq] = Asked(seq, said, arrays)
        self._place()
        return asked.sent

    def read(self, link: Link) -> Message | None:
        """Return the answer that has come on a link; None: it is none that is waited for.

        Raises:
            Step3HeteroError: the other side cannot run the stage; its own words.
        """
        number = next(n for n, x in self._links.items() if x is link)
        try:
            message = link.receive(self._deadline_s)
        except CorruptFrame:
            self._damage(number, link)
            return None
        except GONE:
            self._drop(number)
            self._place()
            return None
        if message.kind == Kind.AGAIN:
            self._damage(number, link)
        elif message.kind == Kind.LEAVING:  # what it has it answers; it gets no more
            self._leaving.add(number)
        elif message.kind == Kind.FAILED:
            raise Step3HeteroError(str(message.said.get("why")))
        elif message.kind == Kind.ANSWER:
            asked = self._asked.get(message.seq)
            if asked is not None and asked.epoch == message.epoch and asked.owed_by(link):
                is_last = len(asked.answers) == self._sharers - 1
                asked.answers[number % self._sharers] = message if is_last else _kept(message)
                self._damaged.discard(number)
                return message
        return None

    def whole(self, seq: int) -> list[Message] | None:
        """Return the answers of all members, member 0 first, once the last of them is there."""
        asked = self._asked[seq]
        if len(asked.answers) < self._sharers:
            return None
        del self._asked[seq]
        return [asked.answers[member] for member in range(self._sharers)]

    def lost(self) -> list[int]:
        """Return the instances lost since the last time: gone, or silent while they owe an answer.

        The front is to be told, which ends what is silent and says where others listen.
        """
        for number, link in list(self._links.items()):
            silent = link.silent_s() > self._deadline_s
            if silent and any(a.owed_by(link) for a in self._asked.values()):
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
        """Send what nobody has to a set that is complete."""
        for asked in list(self._asked.values()):
            while not asked.links and (whole := self._complete()):
                self._ask(asked, whole[self._first % len(whole)])

    def _complete(self) -> list[int]:
        """Return the sets all of whose members live and stay."""
        there = set(self._links) - self._leaving
        numbers = {number // self._sharers for number in there}
        return sorted(n for n in numbers if there.issuperset(self._members(n)))

    def _members(self, number: int) -> range:
        return range(number * self._sharers, (number + 1) * self._sharers)

    def _ask(self, asked: Asked, number: int) -> None:
        """Send a call to every member of a set."""
        asked.epoch += 1
        asked.links = tuple(self._links[n] for n in self._members(number))
        for member in range(self._sharers):
            self._send(asked, member)

    def _send(self, asked: Asked, member: int) -> None:
        start = time.monotonic()
        said = {**asked.said, "call": int(asked.said.get("call", 0)) + 2 * member}
        asked.links[member].post(Kind.CALL, asked.seq, said, asked.arrays, epoch=asked.epoch)
        asked.sent.append(Sent(member, start, time.monotonic()))

    def _damage(self, number: int, link: Link) -> None:
        """Send once more what a damaged frame may have been; the second time the role is dropped.

        The other side is told too: what was damaged may have been an answer.
        """
        if number in self._damaged:
            self._drop(number)
        else:
            self._damaged.add(number)
            for asked in self._asked.values():
                if asked.owed_by(link):
                    self._send(asked, number % self._sharers)
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
            if any(x is link for x in asked.links):
                asked.taken_back()


def _kept(message: Message) -> Message:
    """Return an answer that waits for those of others: what its link lent would hold that up."""
    arrays = {name: x.copy() for name, x in message.arrays.items()}
    for name, landed in message.landed.items():
        landed.host = arrays[name]
    return replace(message, arrays=arrays)
