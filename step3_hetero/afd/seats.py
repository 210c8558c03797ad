"""The places of a front's instances, and what fills each now."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from step3_hetero.afd.launcher import START_S, Handle, Member, Reports
from step3_hetero.afd.link import GONE as GONE
from step3_hetero.afd.link import Link
from step3_hetero.afd.messages import Kind, next_number

SEEN_DEAD_S = 1.0
"""How long after its link broke a process may take to be seen dead before it is killed: its exit
code says more than our signal."""


class State(Enum):
    """How far a seat has come."""

    STARTING = "starting"
    GREETING = "greeting"
    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"
    BROKEN = "broken"
    """Its link is gone; its end is still to be seen."""


class Told:
    """What a role has been told since it is ready and may not have heard, in order, numbered."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._last = 0
        self._damaged_after = -1

    def add(self, message: tuple[Any, ...]) -> int:
        """Keep a message; return its number."""
        self._last = next_number(self._last)
        self._kept.append((self._last, message))
        return self._last

    def heard(self, batch: int) -> None:
        """Forget a micro-batch that has been run, and what was told before it."""
        if any(message[:2] == (Kind.BATCH, batch) for _, message in self._kept):
            while self._kept.popleft()[1][:2] != (Kind.BATCH, batch):
                pass

    def after(self, number: int) -> list[tuple[int, tuple[Any, ...]]] | None:
        """Return what has to be told again: what follows ``number``, behind which a frame came
        damaged. None: for the second time."""
        if number == self._damaged_after:
            return None
        self._damaged_after = number
        numbers = [n for n, _ in self._kept]
        first = numbers.index(number) + 1 if number in numbers else 0
        return list(self._kept)[first:]


@dataclass(eq=False)
class Seat:
    """What fills a member's place; ``place`` is the process whose work it does, None: a spare."""

    member: Member
    place: int | None
    handle: Handle | None = None
    link: Link | None = None
    address: str = ""
    state: State = State.STARTING
    deaths: int = 0
    asked_s: float = 0.0
    since_s: float = field(default_factory=time.monotonic)
    away_since_s: float = field(default_factory=time.monotonic)
    """When it was last there, while it is not."""

    was_ready: bool = False
    """Since it was started."""
    said_it_leaves: bool = False
    sent: Told = field(default_factory=Told)

    @property
    def instance(self) -> int | None:
        """Return which instance of its role it does work of; None: a spare."""
        return None if self.place is None else self.place // self.member.tp

    @property
    def is_ready(self) -> bool:
        """Say whether it takes work."""
        return self.state is State.READY

    def moves(self, state: State) -> None:
        """Note a new state, and when it began."""
        self.state, self.since_s = state, time.monotonic()
        if state is State.READY:
            self.sent = Told()
        self.was_ready = self.was_ready or state is State.READY

    def starts(self, handle: Handle) -> None:
        """Take in what was started for this seat."""
        self.handle, self.link = handle, None
        self.was_ready = self.said_it_leaves = False
        self.moves(State.STARTING)

    def watched(self) -> Iterator[Handle | Reports | Link]:
        """Yield what has something to say about it, its end first.

        Of what an attention instance sent and then died, nothing may be taken: its other sequences
        would go on from keys that are no more. It is the objects, not their descriptors: a number
        that is closed is soon another's.
        """
        if self.handle is None:
            return
        yield self.handle
        if self.handle.reports.is_open:
            yield self.handle.reports
        if self.link is not None:
            yield self.link

    def is_silent(self, deadline_s: float) -> bool:
        """Say whether it owes a sign of life, or its end, or has loaded for too long."""
        for_s = time.monotonic() - self.since_s
        if self.state in (State.READY, State.LEAVING):
            return self.link is not None and self.link.silent_s() > deadline_s
        if self.state is State.BROKEN:
            returns = self.handle is not None and self.handle.returns
            return returns or for_s > SEEN_DEAD_S
        return for_s > START_S

    def lets_go(self) -> None:
        """Close the link."""
        if self.link is not None:
            self.link.close()
            self.link = None

    def empties(self, *, at_once: bool) -> None:
        """See to it that nothing of what filled it is left here."""
        if self.handle is not None:
            self.handle.end(at_once=at_once)
            self.handle = None
        self.lets_go()

    def breaks(self) -> None:
        """Let go of a link that is gone; the end of what was behind it is seen next, or made."""
        self.lets_go()
        self.moves(State.BROKEN)

    def told(self, *message: Any) -> None:
        """Send; whoever waits for what comes of it sees the end of a seat that is gone."""
        self._sends(self.sent.add(message), message)

    def told_again(self, after: int) -> None:
        """Send again what follows message ``after``: a frame behind it came damaged. The second
        time the role is given up."""
        messages = self.sent.after(after)
        if messages is None:
            self.breaks()
        for number, message in messages or ():
            self._sends(number, message)

    def _sends(self, number: int, message: tuple[Any, ...]) -> None:
        if self.link is not None:
            try:
                self.link.send(*message, epoch=number)
            except GONE:
                self.breaks()


class Seats:
    """All seats of a front. Those of a role beyond its instances stand by."""

    def __init__(self, members: Sequence[Member], instances: Mapping[str, int]) -> None:
        self.all = [Seat(m, m.number if m.number < instances[m.role] else None) for m in members]

    def __iter__(self) -> Iterator[Seat]:
        return iter(self.all)

    def leading(self, instance: int) -> Seat:
        """Return the seat of an attention instance: its rank 0."""
        return next(s for s in self.all if s.member.leads and s.instance == instance)

    def at(self, role: str, place: int) -> Seat | None:
        """Return the seat that does the work of an instance of a role."""
        return next((s for s in self.all if (s.member.role, s.place) == (role, place)), None)

    def where(self) -> dict[str, dict[int, str]]:
        """Return where the processes that are called listen now."""
        peers: dict[str, dict[int, str]] = {}
        for seat in self.all:
            if seat.is_ready and not seat.member.leads and seat.place is not None:
                peers.setdefault(seat.member.role, {})[seat.place] = seat.address
        return peers

    def replaced(self, lost: Seat) -> Seat | None:
        """Give the place of a seat that is lost to one of its role that stands by, if one does."""
        standing_by = (
            s for s in self.all
            if s.member.role == lost.member.role and s.place is None and s.is_ready
        )  # fmt: skip
        spare = next(standing_by, None) if lost.place is not None else None
        if spare is not None:
            spare.place, lost.place = lost.place, None
        return spare

    def needs(self, ready: Seat) -> None:
        """Let a spare that has become ready take a place whose seat is not there."""
        if ready.place is not None:
            return
        for seat in self.all:
            if seat.member.role == ready.member.role and seat.place is not None:
                if seat.state in (State.READY, State.LEAVING, State.BROKEN):
                    continue  # of one that is broken the end is still to be seen, and what it costs
                ready.place, seat.place = seat.place, None
                return

    def standing(self) -> str:
        """Say how far each has come."""
        return ", ".join(f"{s.member.name} {s.state.value}" for s in self.all)
