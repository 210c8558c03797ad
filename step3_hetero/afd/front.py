"""The executor over processes: starts the roles, hands out micro-batches, replaces what dies."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from step3_hetero.afd.contract import Contract
from step3_hetero.afd.doorman import FRONT
from step3_hetero.afd.greeting import say_hello, take_agreed
from step3_hetero.afd.launcher import START_S, Handle, Launcher, Member
from step3_hetero.afd.link import Heart, Link, Message, ready
from step3_hetero.afd.loglines import OnLine
from step3_hetero.afd.messages import Kind, batch_parcel, result_of, said_by, whole_of
from step3_hetero.afd.seats import GONE, Seat, Seats, State
from step3_hetero.afd.undisturbed import undisturbed
from step3_hetero.errors import EdgeMismatch, RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.runtime.clocks import StageClock, sum_of
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.microbatch import Landed, MicroBatch, Ticket
from step3_hetero.runtime.paces import Paces
from step3_hetero.runtime.timeline import Timeline, spans_of
from step3_hetero.specs import Limits
from step3_hetero.transport.base import CorruptFrame

MOST_DEATHS = 5
"""An instance that has died so often, without a micro-batch finished in between, stays dead."""

BUSY_S = 5.0
"""How long a role that stands may go on serving a front that has just ended."""

Connect = Callable[[str, str], Link]
OnReady = Callable[[str], None]

Waiting = deque[tuple[Any, ...]]
"""Micro-batches for an instance that is not there now."""


class ProcessExecutor(Executor):
    """Runs every role elsewhere. Only ``collect`` waits.

    An instance without a cache that dies is replaced by a spare, else started again; who called it
    asks another one or waits for it. An attention instance that dies loses its sequences' keys:
    their micro-batches come back without a result, and they are computed again from their tokens,
    on a spare at once, else as soon as it is back.
    """

    def __init__(
        self,
        members: Sequence[Member],
        instances: Mapping[str, int],
        launcher: Launcher,
        connect: Connect,
        contract: Contract,
        limits: Limits,
        kv_blocks: int,
        microbatches: int,
        deadline_s: float,
        on_ready: OnReady | None = None,
        timeline: Timeline | None = None,
        on_line: OnLine | None = None,
    ) -> None:
        """``members`` are instances and spares; ``instances`` counts the former, by role.

        ``on_line`` is told of a member that is slow, once for each kind of its work.
        """
        self.timeline = timeline
        self.limits = limits
        self.kv_blocks = kv_blocks
        self.clock = StageClock()
        self.microbatches = microbatches
        self.clocks: dict[str, StageClock] = {}
        self.paces = self._paces = Paces()
        self._on_line = on_line
        self._launcher = launcher
        self._connect = connect
        self._contract = contract
        self._deadline_s = deadline_s
        self._on_ready = on_ready
        self._heart = Heart(deadline_s)
        self._seats = Seats(members, instances)
        self.instances = sum(s.member.leads and s.place is not None for s in self._seats)
        self._waiting: list[Waiting] = [deque() for _ in range(self.instances)]
        self._epochs = [0] * self.instances
        self._flying: dict[int, tuple[int, MicroBatch]] = {}
        self._landed: deque[Landed] = deque()
        self._submitted = 0
        try:
            for seat in self._seats:
                self._start(seat)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def submit(self, batch: MicroBatch, instance: int = 0) -> Ticket:
        """Send a micro-batch, or keep it until its instance is back."""
        self._submitted += 1
        self._flying[self._submitted] = instance, batch
        message = (Kind.BATCH, self._submitted, *batch_parcel(batch))
        seat = self._seats.leading(instance)
        if seat.is_ready:
            seat.told(*message)
        else:
            self._waiting[instance].append(message)
        return Ticket(self._submitted)

    def collect(self, deadline_s: float | None = None) -> Landed:
        """Return a micro-batch that has come back; replace what has died meanwhile."""
        until = time.monotonic() + (START_S if deadline_s is None else deadline_s)
        while not self._landed:
            if time.monotonic() > until:
                raise TransportTimeout(f"no micro-batch came back: {self._seats.standing()}")
            self._attend(min(0.5, self._deadline_s / 2))
        return self._landed.popleft()

    def forget_image(self, key: int, instance: int = 0) -> None:
        """Drop the rows of an image."""
        self._tell(instance, Kind.FORGET, {"key": key})

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], instance: int = 0) -> None:
        """Copy logical KV blocks in every layer of one instance."""
        self._tell(instance, Kind.COPY, {"pairs": list(pairs)})

    def cache_epoch(self, instance: int = 0) -> int:
        """See Executor.cache_epoch."""
        return self._epochs[instance]

    def close(self) -> None:
        """End every role, those that lead first: the others serve them to the last."""
        for seat in sorted(self._seats, key=lambda s: not s.member.leads):
            seat.told(Kind.STOP)
        for seat in self._seats:
            seat.empties(at_once=seat.link is None)
        self._heart.stop()
        self._launcher.close()

    def processes(self) -> dict[str, int]:
        """Return the process id of every member that is a process of this machine, by name."""
        held = {s.member.name: s.handle for s in self._seats if s.handle is not None}
        return {name: handle.pid for name, handle in held.items() if handle.pid is not None}

    def serving(self, role: str, instance: int) -> str | None:
        """Return the name of the member that does an instance's work; a spare's after a loss."""
        seat = self._seats.at(role, instance)
        return None if seat is None else seat.member.name

    def _start(self, seat: Seat) -> None:
        """Fill a seat, undisturbed: a role that no seat has would be ended by nobody."""
        with undisturbed():
            seat.starts(self._launcher.launch(seat.member))

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_S
        while not all(seat.is_ready for seat in self._seats):
            if time.monotonic() > until:
                raise TransportTimeout(f"not ready after {START_S:g} s: {self._seats.standing()}")
            self._attend(0.5)

    def _tell(self, instance: int, kind: Kind, said: Mapping[str, Any]) -> None:
        seat = self._seats.leading(instance)
        if seat.is_ready:  # one that is not has nothing to forget or copy
            seat.told(kind, 0, said)

    def _attend(self, wait_s: float) -> None:
        """Take in whatever has happened, waiting for it at most ``wait_s``."""
        watched = {source: seat for seat in self._seats for source in seat.watched()}
        for source in ready(watched, wait_s):
            seat = watched[source]  # which what came before in this round may have emptied
            if seat.handle is not None and source is seat.handle:
                self._died(seat, seat.handle)
            elif seat.handle is not None and source is seat.handle.reports:
                self._hear(seat, seat.handle)
            elif seat.link is not None and source is seat.link:
                self._read(seat, seat.link)
        for seat in self._seats:
            if seat.handle is not None and seat.is_silent(self._deadline_s):
                seat.handle.kill()  # its end is seen next

    def _hear(self, seat: Seat, handle: Handle) -> None:
        """Take in what a role reports; once it says where it listens, connect and greet it."""
        for fact in handle.reports.read():
            if "address" in fact and seat.state is State.STARTING:
                self._greet(seat, handle, str(fact["address"]))

    def _greet(self, seat: Seat, handle: Handle, address: str) -> None:
        seat.address = address
        try:
            if handle.channel is not None:
                seat.link, handle.channel = Link(handle.channel, seat.member.name), None
            else:
                seat.link = self._connect(seat.member.name, address)
            traced = self.timeline is not None
            seat.asked_s = say_hello(seat.link, self._contract, FRONT, traced=traced)
            seat.moves(State.GREETING)
        except GONE:
            seat.breaks()

    def _read(self, seat: Seat, link: Link) -> None:
        try:
            message = link.receive(self._deadline_s)
        except (*GONE, CorruptFrame):  # a damaged frame may have been a result: it is made again
            seat.breaks()
            return
        match message.kind:
            case Kind.AGREED:
                take_agreed(link, message, self._contract, FRONT, seat.asked_s)
                seat.told(Kind.LOAD)
                seat.moves(State.LOADING)
                self._heart.watch(link)
            case Kind.REFUSED:
                self._refused(seat, message)
            case Kind.READY:
                self._ready(seat)
            case Kind.RESULT:
                self._land(seat, link, message)
            case Kind.AGAIN:
                with said_by(seat.member.name):
                    seat.told_again(whole_of(message.said, "heard"))
            case Kind.LEAVING:
                seat.said_it_leaves = True
                seat.moves(State.LEAVING)
            case Kind.FAILED:
                raise Step3HeteroError(f"{seat.member.name}: {message.said.get('why')}")
            case Kind.LOST:
                self._lost(seat, message)

    def _lost(self, teller: Seat, message: Message) -> None:
        """Hear of an instance whose link to an attention instance is gone."""
        with said_by(teller.member.name):
            number = whole_of(message.said, "instance")
        lost = self._seats.at(str(message.said.get("role")), number)
        if lost is not None and lost.handle is not None and lost.is_silent(self._deadline_s):
            lost.handle.kill()
        else:  # it lives, or will: whoever lost it may connect again
            teller.told(Kind.PEERS, 0, {"peers": self._seats.where()})

    def _refused(self, seat: Seat, message: Message) -> None:
        """Wait a little for a role whose last front has just ended; else give up.

        Raises:
            EdgeMismatch, RoleLost: in the role's words.
        """
        why = f"{message.said.get('why')}"
        if not message.said.get("busy"):
            raise EdgeMismatch(why)
        if time.monotonic() - seat.away_since_s > BUSY_S + 2 * self._deadline_s:
            raise RoleLost(f"{why}: end that one first, or start roles of your own")
        seat.breaks()

    def _ready(self, seat: Seat) -> None:
        seat.moves(State.READY)
        if self._on_ready is not None:
            self._on_ready(seat.member.name)
        self._seats.needs(seat)
        self._takes_place(seat)

    def _takes_place(self, seat: Seat) -> None:
        """Let everybody know who does an instance's work now, and give it what waits for it."""
        for leading in self._seats:
            if leading.member.leads and leading.is_ready:
                leading.told(Kind.PEERS, 0, {"peers": self._seats.where()})
        if seat.member.leads and seat.instance is not None:
            waiting = self._waiting[seat.instance]
            while waiting:
                seat.told(*waiting.popleft())

    def _land(self, seat: Seat, link: Link, message: Message) -> None:
        seat.deaths = 0
        seat.sent.heard(message.seq)
        for other in self._seats:
            if not other.member.leads and other.is_ready:
                other.deaths = 0
        _, batch = self._flying.pop(message.seq, (0, None))
        if batch is None:
            return
        with said_by(seat.member.name):
            self._take_result(seat, link, message, batch)

    def _take_result(self, seat: Seat, link: Link, message: Message, batch: MicroBatch) -> None:
        """Take in what an attention instance says; a word of it that is none is an `EdgeMismatch`.

        Nothing is kept of a message that is refused.
        """
        result = result_of(
            message.said, message.arrays, len(batch.rows), with_logits=batch.want_logits
        )
        times = StageClock.of_wire(message.said.get("times", ()))
        told = message.said.get("members")  # not with every result
        members = None if told is None else StageClock.of_wire(told)
        spans = spans_of(message.said.get("spans", ()), -link.ahead_s)
        self.clocks[seat.member.name] = times
        self.clock = sum_of(self.clocks)
        slow = [] if members is None else self._paces.take(seat.member.name, members)
        for member, line in slow:
            if self._on_line is not None:
                self._on_line(member, line)
        if self.timeline is not None:
            self.timeline.extend(spans)
        self._landed.append(Landed(Ticket(message.seq), result))

    def _died(self, seat: Seat, handle: Handle) -> None:
        """Replace what is no more; bring back without a result what was lost with it."""
        how = handle.how_it_ended()
        was_ready = seat.was_ready
        if was_ready:
            seat.away_since_s = time.monotonic()
        if not seat.said_it_leaves and (was_ready or not handle.returns):
            seat.deaths += 1
        seat.empties(at_once=True)
        seat.moves(State.STARTING)
        if handle.error is not None:
            raise handle.error
        self._give_up_for_good(seat, how, handle, was_ready)
        if seat.member.leads and seat.instance is not None:
            self._lose(seat.instance)
        if (spare := self._seats.replaced(seat)) is not None:
            self._takes_place(spare)
        if seat.place is not None or seat.deaths <= MOST_DEATHS:
            self._start(seat)

    def _give_up_for_good(self, seat: Seat, how: str, handle: Handle, was_ready: bool) -> None:
        """Fail the requests for an instance that will not come back.

        Raises:
            RoleLost: it ended by itself before it was ready, died too often, or did not return
                within `START_S`.
        """
        is_spare = seat.place is None and self._submitted > 0
        away_s = time.monotonic() - seat.away_since_s
        if is_spare or (handle.returns and away_s < START_S and seat.deaths <= MOST_DEATHS):
            return
        may_come_up = was_ready or (handle.was_killed() and self._submitted > 0)
        if may_come_up and seat.deaths <= MOST_DEATHS:
            return
        often = f", {seat.deaths} times in a row" if may_come_up else " before it was ready"
        raise RoleLost(f"{seat.member.name} ended with {how}{often}; its log says why")

    def _lose(self, instance: int) -> None:
        """Let all that an attention instance had under way be computed again."""
        self._waiting[instance].clear()
        self._epochs[instance] += 1
        for number in [n for n, (i, _) in self._flying.items() if i == instance]:
            del self._flying[number]
            self._landed.append(Landed(Ticket(number), None))
