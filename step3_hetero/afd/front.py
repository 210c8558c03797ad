"""The executor over processes: starts the roles, hands out micro-batches, replaces what dies."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from step3_hetero.afd.contract import Contract, agree
from step3_hetero.afd.launch import RoleProcess
from step3_hetero.afd.link import Heart, Link, Message, ready
from step3_hetero.afd.messages import Kind, batch_parcel, result_of
from step3_hetero.errors import RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.runtime.clocks import StageClock, sum_of
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.microbatch import Landed, MicroBatch, Ticket
from step3_hetero.runtime.timeline import Timeline, spans_of
from step3_hetero.specs import Limits

GONE = (RoleLost, TransportTimeout)

START_S = 300.0
"""How long a role may take to import its backend and load its weights."""

MOST_DEATHS = 5
"""An instance that has died so often, without a micro-batch finished in between, stays dead."""


@dataclass(frozen=True)
class Member:
    """One instance of one role; ``leads``: it owns a cache and takes micro-batches."""

    role: str
    number: int
    leads: bool

    @property
    def name(self) -> str:
        """Return ``a:0``."""
        return f"{self.role}:{self.number}"


@dataclass(eq=False)
class Seat:
    """A member's place: the process that fills it now, and how far that has come."""

    member: Member
    process: RoleProcess | None = None
    link: Link | None = None
    address: str = ""
    is_ready: bool = False
    deaths: int = 0
    waiting: deque[tuple[Kind, int, Mapping[str, Any], Mapping[str, Any]]] = field(
        default_factory=deque
    )


Launch = Callable[[Member], RoleProcess]
Connect = Callable[[str, str], Link]
OnReady = Callable[[str], None]


class ProcessExecutor(Executor):
    """Runs every role in processes of its own. Only ``collect`` waits.

    An instance without a cache that dies is started again; who called it asks another one or waits
    for it. An attention instance that dies loses its sequences' keys: their micro-batches come back
    without a result, and they are computed again from their tokens once it is back.
    """

    def __init__(
        self,
        members: Sequence[Member],
        launch: Launch,
        connect: Connect,
        contract: Contract,
        limits: Limits,
        kv_blocks: int,
        microbatches: int,
        deadline_s: float,
        on_ready: OnReady | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.timeline = timeline
        self.limits = limits
        self.kv_blocks = kv_blocks
        self.clock = StageClock()
        self.instances = sum(m.leads for m in members)
        self.microbatches = microbatches
        self._launch = launch
        self._connect = connect
        self._contract = contract
        self._deadline_s = deadline_s
        self._on_ready = on_ready
        self._heart = Heart(deadline_s)
        self._seats = [Seat(m) for m in members]
        self._leading = [s for s in self._seats if s.member.leads]
        self._flying: dict[int, int] = {}
        self._landed: deque[Landed] = deque()
        self.clocks: dict[str, StageClock] = {}
        self._submitted = 0
        try:
            for seat in self._seats:
                seat.process = launch(seat.member)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def submit(self, batch: MicroBatch, instance: int = 0) -> Ticket:
        """Send a micro-batch, or keep it until its instance is back."""
        self._submitted += 1
        self._flying[self._submitted] = instance
        said, arrays = batch_parcel(batch)
        self._tell(self._leading[instance], Kind.BATCH, self._submitted, said, arrays)
        return Ticket(self._submitted)

    def collect(self, deadline_s: float | None = None) -> Landed:
        """Return a micro-batch that has come back; replace what has died meanwhile."""
        until = time.monotonic() + (START_S if deadline_s is None else deadline_s)
        while not self._landed:
            if time.monotonic() > until:
                raise TransportTimeout(f"no micro-batch came back: {self._standing()}")
            self._attend(min(0.5, self._deadline_s / 2))
        return self._landed.popleft()

    def forget_image(self, key: int, instance: int = 0) -> None:
        """Drop the rows of an image."""
        self._tell(self._leading[instance], Kind.FORGET, 0, {"key": key}, {})

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], instance: int = 0) -> None:
        """Copy logical KV blocks in every layer of one instance."""
        self._tell(self._leading[instance], Kind.COPY, 0, {"pairs": list(pairs)}, {})

    def close(self) -> None:
        """End every process, those that lead first: the others serve them to the last."""
        for seat in sorted(self._seats, key=lambda s: not s.member.leads):
            if seat.link is not None:
                with suppress(*GONE):
                    seat.link.send(Kind.STOP)
        for seat in self._seats:
            if seat.process is not None:
                seat.process.end(at_once=seat.link is None)
                seat.process = None
            if seat.link is not None:
                seat.link.close()
        self._heart.stop()

    def processes(self) -> dict[str, int]:
        """Return the process id of every member that lives, by name."""
        return {s.member.name: s.process.popen.pid for s in self._seats if s.process is not None}

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_S
        while not all(seat.is_ready for seat in self._seats):
            if time.monotonic() > until:
                raise TransportTimeout(f"not ready after {START_S:g} s: {self._standing()}")
            self._attend(0.5)

    def _tell(
        self,
        seat: Seat,
        kind: Kind,
        seq: int,
        said: Mapping[str, Any],
        arrays: Mapping[str, Any],
    ) -> None:
        """Send, or keep for later what is to be sent to an instance that is not there now."""
        if not seat.is_ready or seat.link is None:
            if kind == Kind.BATCH:
                seat.waiting.append((kind, seq, said, arrays))
            return
        with suppress(*GONE):  # whoever waits sees its end: what flew comes back without a result
            seat.link.send(kind, seq, said, arrays)

    def _attend(self, wait_s: float) -> None:
        """Take in whatever has happened, waiting for it at most ``wait_s``."""
        watched: dict[int, Seat] = {}
        waiting: list[int] = []
        for seat in self._seats:
            process = seat.process
            if process is None:
                continue
            handles = [process.fileno()]
            handles += [seat.link.fileno()] if seat.link else [process.report.fileno()]
            watched |= dict.fromkeys(handles, seat)
            waiting += handles
        for handle in ready(waiting, wait_s):
            seat = watched[handle]
            if seat.process is None:
                continue
            if seat.link is not None and handle == seat.link.fileno():
                self._read(seat, seat.link)
            elif handle == seat.process.fileno():
                self._died(seat, seat.process)
            else:
                self._greet(seat, seat.process)
        for seat in self._seats:
            if self._is_silent(seat):
                self._give_up(seat)

    def _greet(self, seat: Seat, process: RoleProcess) -> None:
        """Connect to a process that says where it listens, and agree on the contract."""
        line = process.report.readline()
        if not line:
            return  # it is dying; its end is seen next
        seat.address = str(json.loads(line)["address"])
        seat.link = self._connect(seat.member.name, seat.address)
        asked = time.monotonic()
        seat.link.send(Kind.HELLO, said={"contract": dict(self._contract), "from": "the front"})
        agreed = seat.link.wants(Kind.AGREED, START_S)
        agree(self._contract, agreed.said["contract"], "the front", seat.member.name)
        seat.link.compare_clocks(asked, float(agreed.said.get("now", asked)))
        seat.link.send(Kind.LOAD)
        self._heart.watch(seat.link)

    def _read(self, seat: Seat, link: Link) -> None:
        try:
            message = link.receive(self._deadline_s)
        except GONE:
            return  # the process's end, or its silence, tells the rest
        match message.kind:
            case Kind.READY:
                self._ready(seat)
            case Kind.RESULT:
                self._land(seat, message)
            case Kind.FAILED:
                raise Step3HeteroError(f"{seat.member.name}: {message.said.get('why')}")
            case Kind.LOST:
                name = f"{message.said['role']}:{message.said['instance']}"
                lost = next((s for s in self._seats if s.member.name == name), None)
                if lost is not None and self._is_silent(lost):
                    self._give_up(lost)
                else:  # it lives, or will: whoever lost it may connect again
                    self._point(seat)

    def _ready(self, seat: Seat) -> None:
        seat.is_ready = True
        if self._on_ready is not None:
            self._on_ready(seat.member.name)
        for leading in self._leading:
            if leading.is_ready:
                self._point(leading)
        if seat.member.leads:
            while seat.waiting:
                self._tell(seat, *seat.waiting.popleft())

    def _point(self, leading: Seat) -> None:
        """Tell an attention instance where the others listen."""
        peers: dict[str, dict[int, str]] = {}
        for seat in self._seats:
            if seat.is_ready and not seat.member.leads:
                peers.setdefault(seat.member.role, {})[seat.member.number] = seat.address
        self._tell(leading, Kind.PEERS, 0, {"peers": peers}, {})

    def _land(self, seat: Seat, message: Message) -> None:
        seat.deaths = 0
        for other in self._seats:
            if not other.member.leads and other.is_ready:
                other.deaths = 0
        if self._flying.pop(message.seq, None) is None:
            return
        self.clocks[seat.member.name] = StageClock.of_wire(message.said.get("times", ()))
        self.clock = sum_of(self.clocks)
        if self.timeline is not None and seat.link is not None:
            self.timeline.extend(spans_of(message.said.get("spans", ()), -seat.link.ahead_s))
        result = result_of(message.said, message.arrays)
        self._landed.append(Landed(Ticket(message.seq), result))

    def _is_silent(self, seat: Seat) -> bool:
        if seat.link is None or not seat.is_ready:
            return False
        return seat.link.silent_s() > self._deadline_s

    def _give_up(self, seat: Seat) -> None:
        """Kill a process that gives no sign of life; its end is seen next."""
        if seat.process is not None:
            os.kill(seat.process.popen.pid, 9)

    def _died(self, seat: Seat, process: RoleProcess) -> None:
        """Bring back without a result what was lost with a process, and start it again."""
        how = process.how_it_ended()
        was_ready, seat.is_ready = seat.is_ready, False
        process.end(at_once=True)
        seat.process = None
        if seat.link is not None:
            seat.link.close()
            seat.link = None
        seat.deaths += 1
        if not was_ready or seat.deaths > MOST_DEATHS:
            raise RoleLost(
                f"{seat.member.name} ended with {how}"
                + (f", {seat.deaths} times in a row" if was_ready else " before it was ready")
                + "; its log says why"
            )
        if seat.member.leads:
            instance = self._leading.index(seat)
            for number in [n for n, i in self._flying.items() if i == instance]:
                del self._flying[number]
                self._landed.append(Landed(Ticket(number), None))
        seat.process = self._launch(seat.member)

    def _standing(self) -> str:
        said = [f"{s.member.name} {'ready' if s.is_ready else 'starting'}" for s in self._seats]
        return ", ".join(said)
