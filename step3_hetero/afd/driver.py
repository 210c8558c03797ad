"""An attention instance: owns a KV cache, leads micro-batches through all stages, samples."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from step3_hetero.afd.asked import check_answer, taken
from step3_hetero.afd.leaving import Leaving
from step3_hetero.afd.link import Link, Message, ready
from step3_hetero.afd.messages import (
    Kind,
    batch_of,
    next_number,
    number_of,
    pairs_of,
    peers_of,
    result_parcel,
    said_by,
    total_bytes,
    whole_of,
)
from step3_hetero.afd.partials import added
from step3_hetero.afd.ranks import Ranks
from step3_hetero.afd.remote import Remote
from step3_hetero.afd.wire import Wire
from step3_hetero.afd.worker import IsOver
from step3_hetero.backend import Array, KVCache
from step3_hetero.errors import RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.runtime.clocks import WAIT, StageClock
from step3_hetero.runtime.microbatch import BatchResult
from step3_hetero.runtime.paces import ROUND_TRIP
from step3_hetero.runtime.program import KINDS, Call, Pass, Program
from step3_hetero.runtime.timeline import SEND, TAKE, spans_of
from step3_hetero.transport.base import CopyFailed, CorruptFrame

TICK_S = 0.05
"""How often silence is looked for while nothing comes."""

MEMBERS_S = 0.5
"""How often the front is told of each member's calls, and whenever nothing is under way: they are
as many entries as a set has members, and a result comes every few milliseconds."""


@dataclass(eq=False)
class Underway:
    """A micro-batch that waits for a stage elsewhere."""

    ticket: int
    passing: Pass
    call: Call
    since_s: float


class Driver:
    """Runs the front's micro-batches, several side by side: while one waits another computes.

    It never waits in sending, and so always comes to read: front and workers, who do wait, each
    send to a driver, so that no ring of processes waits for itself, however large the frames.
    """

    def __init__(
        self,
        program: Program,
        caches: Sequence[KVCache],
        role_of: Mapping[str, str],
        remotes: Mapping[str, Remote],
        a2f: Wire,
        f2a: Wire,
        number: int = 0,
        ranks: Ranks | None = None,
        label: str = "",
    ) -> None:
        """``number`` is the instance's, ``label`` its process's name; ``ranks`` are the others,
        where it has several."""
        self._number = number
        self._ranks = ranks
        self._held: deque[Message] = deque()
        self._role = role_of["embed"]
        self._label = label or f"{self._role}:{number}"
        self._program = program
        self._caches = caches
        self._role_of = role_of
        self._remotes = remotes
        self._called: dict[str, Remote | Ranks] = dict(remotes)
        if ranks is not None:
            self._called[self._role] = ranks
        self._a2f = a2f
        self._f2a = f2a
        self._leaving: Leaving | None = None
        self._underway: dict[int, Underway] = {}
        self._answers: deque[tuple[int, list[Message]]] = deque()
        self._numbers = itertools.count(1)
        self._members = StageClock()
        self._told_s = 0.0
        self._heard = 0

    def serve(self, front: Link, is_over: IsOver) -> None:
        """Serve until the front says stop or is gone, or ``is_over`` says so."""
        while not is_over([front], busy=bool(self._underway)):
            links = [link for called in self._called.values() for link in called.links]
            for link in self._awaited([front, *links]):
                if link is front:
                    if not self._from_front(front):
                        return
                else:
                    self._from_remote(front, link)
            while self._answers:
                self._resume(front, *self._answers.popleft())
            for role, called in self._called.items():
                for number in called.lost():
                    front.post(Kind.LOST, said={"role": role, "instance": number})

    def _awaited(self, links: Sequence[Link]) -> list[Link]:
        """Wait until something comes; while micro-batches are under way that is idle time."""
        start = time.monotonic()
        found = ready(links, TICK_S)
        if self._underway:
            self._program.clock.add(self._role, WAIT, time.monotonic() - start)
        return found

    def _from_front(self, front: Link) -> bool:
        """Read one message of the front; say whether to go on.

        Behind a frame that came damaged all is asked for again, and what comes meanwhile skipped:
        blocks are copied, and batches run, in the order in which the front says so.
        """
        try:
            message = front.receive(1.0)
        except (RoleLost, TransportTimeout):
            return False
        except CorruptFrame:
            front.post(Kind.AGAIN, said={"heard": self._heard})
            return True
        if message.kind == Kind.STOP:
            return False
        if message.epoch not in (0, next_number(self._heard)):
            return True
        self._heard = message.epoch or self._heard
        if message.kind == Kind.PEERS:
            with said_by("the front"):
                peers = peers_of(message.said, self._called)
            for role, addresses in peers.items():  # what those who listen there say is theirs
                self._called[role].point(addresses)
        elif message.kind != Kind.BEAT:
            self._held.append(message)
        while self._held and (self._ranks is None or self._ranks.is_whole):
            with said_by("the front"):
                self._obey(front, self._held.popleft())
        return True

    def _obey(self, front: Link, message: Message) -> None:
        """Do what the front asks of the cache and the stages; all ranks are there.

        Raises:
            EdgeMismatch: it says nothing sensible.
        """
        match message.kind:
            case Kind.BATCH:
                batch = batch_of(message.said, message.arrays)
                self._work_on(message.seq)
                self._advance(front, message.seq, self._program.run(batch), None)
            case Kind.FORGET:
                self._program.forget_image(whole_of(message.said, "key"))
            case Kind.COPY:
                blocks = min(cache.spec.blocks for cache in self._caches)
                pairs = pairs_of(message.said, blocks)
                if self._ranks is not None:
                    self._ranks.copy(pairs)
                for cache in self._caches:
                    cache.copy_blocks(pairs)

    def _from_remote(self, front: Link, link: Link) -> None:
        if self._ranks is not None and link in self._ranks.links:
            self._ranks.read(link)
            return
        remote = next((r for r in self._remotes.values() if link in r.links), None)
        if remote is None:  # dropped while an earlier link was read
            return
        start = time.monotonic()
        try:
            if (answer := remote.read(link)) is not None:
                self._take_answer(remote, link, answer, start)
        except CopyFailed:  # our own device's: no other set is given these arrays
            raise
        except Step3HeteroError as error:
            front.post(Kind.FAILED, said={"why": f"{link.name}: {error}"})

    def _take_answer(self, remote: Remote, link: Link, answer: Message, start_s: float) -> None:
        """Keep an answer, and what it says of itself.

        Raises:
            EdgeMismatch: it is no answer to what was asked.
        """
        call = self._underway[answer.seq].call
        tokens = len(call.inputs["u"]) if call.node.kind == "ffn" else None
        check_answer(call.node, tokens, answer.arrays, self._f2a)
        parts = remote.whole(answer.seq)
        self._note_answer(remote.role, link, answer, start_s, last=parts is not None)
        if parts is not None:
            self._answers.append((answer.seq, parts))

    def _note_answer(
        self, role: str, link: Link, answer: Message, start_s: float, *, last: bool
    ) -> None:
        """Count what an answer's way took at both of its ends; the round trip ends with the last.

        What an instance says of itself is counted for each: a role's seconds are all of its work.
        """
        clock, timeline = self._program.clock, self._program.timeline
        waiting, end = self._underway[answer.seq], time.monotonic()
        node, size = waiting.call.node, total_bytes(answer.arrays)
        clock.add(self._role, f"{TAKE} from {role}", end - start_s)
        if last:
            clock.add(role, f"{node.kind} {ROUND_TRIP}", end - waiting.since_s)
        self._members.add(link.name, f"{node.kind} {ROUND_TRIP}", end - waiting.since_s)
        self._members.add(link.name, node.kind, number_of(answer.said, "seconds"))
        told = {node.kind: "seconds", TAKE: "taken_s", SEND: "sent_s", WAIT: "waited_s"}
        for kind, key in told.items():
            clock.add(role, kind, number_of(answer.said, key), size * (kind == SEND))
        if timeline is not None:
            self._work_on(waiting.ticket)
            call = int(number_of(answer.said, "call"))
            timeline.add(TAKE, node.name, start_s, end, size, call + 1 if call else 0)
            timeline.extend(spans_of(answer.said.get("spans", ()), -link.ahead_s))

    def _work_on(self, ticket: int) -> None:
        if self._program.timeline is not None:
            self._program.timeline.batch = ticket

    def _call_number(self, seq: int) -> int:
        """Return a number for the way to member 0, one more for the way back; nobody shares one.

        Member m of a set has numbers 2·m further: there is room for 256, and for 4096 callers.
        """
        return 2 * (seq << 20 | self._number << 8)

    def _resume(self, front: Link, seq: int, parts: Sequence[Message]) -> None:
        waiting = self._underway.pop(seq)
        self._work_on(waiting.ticket)
        gives = {t.name: t for t in waiting.call.node.gives}
        try:
            outputs = added(
                self._program.home,
                self._f2a,
                [p.arrays for p in parts],
                gives,
                [p.landed for p in parts],
            )
        except CopyFailed:
            raise
        except Step3HeteroError as error:
            front.post(Kind.FAILED, said={"why": f"{waiting.call.node.name}: {error}"})
            return
        self._advance(front, waiting.ticket, waiting.passing, outputs)

    def _advance(
        self, front: Link, ticket: int, passing: Pass, outputs: Mapping[str, Array] | None
    ) -> None:
        """Run a micro-batch on to its next call, or to its end.

        Stages write over their outputs: what the last call sends has to have left the device.
        """
        if self._leaving is not None:
            self._leaving.wait()
            self._leaving = None
        try:
            call = next(passing) if outputs is None else passing.send(outputs)
        except StopIteration as done:
            self._finish(front, ticket, done.value)
            return
        seq, start = next(self._numbers), time.monotonic()
        self._underway[seq] = Underway(ticket, passing, call, start)
        arrays = self._a2f.to_host(self._program.home, call.inputs, taken(call.node))
        self._leaving = arrays
        role, number = self._role_of[call.node.name], self._call_number(seq)
        said = {"stage": call.node.name, "batch": ticket, "call": number}
        copied_s, size = time.monotonic() - start, total_bytes(arrays)
        for sent in self._remotes[role].call(seq, said, arrays):
            begun_s = sent.start_s - (0 if sent.member else copied_s)
            self._program.clock.add(self._role, f"{SEND} to {role}", sent.end_s - begun_s, size)
            if self._program.timeline is not None:
                self._program.timeline.add(
                    SEND, call.node.name, begun_s, sent.end_s, size, number + 2 * sent.member
                )

    def _finish(self, front: Link, ticket: int, result: BatchResult) -> None:
        said, arrays = result_parcel(result)
        said["times"] = self._program.clock.to_wire()
        if not self._underway or time.monotonic() - self._told_s > MEMBERS_S:
            said["members"] = self._paces()
        if self._program.timeline is not None:
            said["spans"] = self._program.timeline.drain()
        front.post(Kind.RESULT, ticket, said, arrays)

    def _paces(self) -> list[list[Any]]:
        """Return the clock of every member that is called, and of this instance, for a message."""
        self._told_s = time.monotonic()
        own = self._program.clock.only(self._role, KINDS, self._label)
        return [*self._members.to_wire(), *own.to_wire()]
