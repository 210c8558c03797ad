"""An attention instance: owns a KV cache, leads micro-batches through all stages, samples."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from step3_hetero.afd.link import Link, Message, ready
from step3_hetero.afd.messages import Kind, batch_of, result_parcel
from step3_hetero.afd.remote import Remote
from step3_hetero.afd.wire import Wire
from step3_hetero.backend import Array, KVCache
from step3_hetero.errors import RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.runtime.microbatch import BatchResult
from step3_hetero.runtime.program import Call, Pass, Program

TICK_S = 0.05
"""How often silence is looked for while nothing comes."""


@dataclass(eq=False)
class Underway:
    """A micro-batch that waits for a stage elsewhere."""

    ticket: int
    passing: Pass
    call: Call


class Driver:
    """Runs the front's micro-batches, several side by side: while one waits another computes."""

    def __init__(
        self,
        program: Program,
        caches: Sequence[KVCache],
        role_of: Mapping[str, str],
        remotes: Mapping[str, Remote],
        a2f: Wire,
        f2a: Wire,
    ) -> None:
        self._program = program
        self._caches = caches
        self._role_of = role_of
        self._remotes = remotes
        self._a2f = a2f
        self._f2a = f2a
        self._underway: dict[int, Underway] = {}
        self._answers: deque[Message] = deque()
        self._numbers = itertools.count(1)

    def serve(self, front: Link) -> None:
        """Serve until the front says stop or is gone."""
        while True:
            links = [link for remote in self._remotes.values() for link in remote.links]
            for link in ready([front, *links], TICK_S):
                if link is front:
                    if not self._from_front(front):
                        return
                else:
                    self._from_remote(front, link)
            while self._answers:
                self._resume(front, self._answers.popleft())
            for role, remote in self._remotes.items():
                for number in remote.lost():
                    front.send(Kind.LOST, said={"role": role, "instance": number})

    def _from_front(self, front: Link) -> bool:
        """Read one message of the front; say whether to go on."""
        try:
            message = front.receive(1.0)
        except (RoleLost, TransportTimeout):
            return False
        match message.kind:
            case Kind.STOP:
                return False
            case Kind.BATCH:
                batch = batch_of(message.said, message.arrays)
                self._advance(front, message.seq, self._program.run(batch), None)
            case Kind.FORGET:
                self._program.forget_image(int(message.said["key"]))
            case Kind.COPY:
                pairs = [(int(a), int(b)) for a, b in message.said["pairs"]]
                for cache in self._caches:
                    cache.copy_blocks(pairs)
            case Kind.PEERS:
                for role, addresses in message.said["peers"].items():
                    self._remotes[role].point({int(n): str(a) for n, a in addresses.items()})
        return True

    def _from_remote(self, front: Link, link: Link) -> None:
        remote = next((r for r in self._remotes.values() if link in r.links), None)
        if remote is None:  # dropped while an earlier link was read
            return
        try:
            self._answers.extend(remote.read(link))
        except Step3HeteroError as error:
            front.send(Kind.FAILED, said={"why": f"{link.name}: {error}"})

    def _resume(self, front: Link, answer: Message) -> None:
        waiting = self._underway.pop(answer.seq)
        gives = {t.name: t for t in waiting.call.node.gives}
        outputs = self._f2a.to_device(self._program.home, answer.arrays, gives)
        key = (self._role_of[waiting.call.node.name], f"{waiting.call.node.kind} away")
        self._program.clock.add(*key, float(answer.said.get("seconds", 0.0)))
        self._advance(front, waiting.ticket, waiting.passing, outputs)

    def _advance(
        self, front: Link, ticket: int, passing: Pass, outputs: Mapping[str, Array] | None
    ) -> None:
        """Run a micro-batch on to its next call, or to its end."""
        try:
            call = next(passing) if outputs is None else passing.send(outputs)
        except StopIteration as done:
            self._finish(front, ticket, done.value)
            return
        seq = next(self._numbers)
        self._underway[seq] = Underway(ticket, passing, call)
        arrays = self._a2f.to_host(self._program.home, call.inputs)
        self._remotes[self._role_of[call.node.name]].call(seq, {"stage": call.node.name}, arrays)

    def _finish(self, front: Link, ticket: int, result: BatchResult) -> None:
        said, arrays = result_parcel(result)
        said["times"] = self._program.clock.to_json()
        front.send(Kind.RESULT, ticket, said, arrays)
