"""Lanes: where micro-batches run side by side, each with sequences of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from step3_hetero.runtime.blocks import blocks_for
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.instance import Flight, Instance, Lane, queue
from step3_hetero.runtime.microbatch import BatchResult
from step3_hetero.runtime.scheduler import Scheduler, assemble
from step3_hetero.runtime.sequence import SequenceState
from step3_hetero.runtime.stats import EngineStats

LEAN = 8
"""So many sequences more than the emptiest lane may a lane have that is chosen for a prefix."""


class Lanes:
    """All lanes of an executor, by attention instance, and the sequences that wait for one.

    The next sequence goes to the emptiest lane, of the instance that holds most of its beginning
    unless that one is far fuller than others. Nobody is overtaken in the queue.
    """

    def __init__(
        self, executor: Executor, max_batch: int, prefill_chunk: int, prefix_reuse: bool
    ) -> None:
        self.executor = executor
        self.waiting: deque[SequenceState] = deque()
        self.lanes = [
            Lane(number, Scheduler(max_batch, prefill_chunk))
            for _ in range(executor.microbatches)
            for number in range(executor.instances)
        ]
        self.instances = [
            Instance(n, executor, self.lanes[n :: executor.instances], self.waiting, prefix_reuse)
            for n in range(executor.instances)
        ]

    def fits(self, tokens: int) -> bool:
        """Say whether a sequence of so many tokens can ever run."""
        return blocks_for(tokens) <= self.executor.kv_blocks

    @property
    def free_blocks(self) -> int:
        """Return the blocks that no sequence holds, of all instances together."""
        return sum(instance.pool.available for instance in self.instances)

    def stats(self) -> EngineStats:
        """Return counts of what runs, waits and is held."""
        pools = [instance.pool for instance in self.instances]
        return EngineStats(
            running=sum(len(lane.scheduler.running) for lane in self.lanes),
            waiting=len(self.waiting),
            blocks=sum(pool.blocks for pool in pools),
            free_blocks=sum(pool.free for pool in pools),
            cached_blocks=sum(pool.cached for pool in pools),
            preemptions=sum(instance.preemptions for instance in self.instances),
            prefix_tokens_reused=sum(instance.reused_tokens for instance in self.instances),
            losses=sum(instance.epoch for instance in self.instances),
        )

    def add(self, sequence: SequenceState) -> None:
        """Have a sequence wait for its turn."""
        queue(self.waiting, sequence)

    def start(self, banned: int) -> Iterator[Flight]:
        """Admit who waits and submit a micro-batch on every lane that has one to run."""
        for instance in self.instances:
            instance.notice_loss()
        self._admit()
        for lane in self.lanes:
            instance = self.instances[lane.instance]
            shares = [] if lane.flight is not None else lane.scheduler.next_shares(instance.grow)
            if shares:
                batch = assemble(shares, banned)
                ticket = self.executor.submit(batch, lane.instance)
                lane.flight = Flight(ticket, shares, batch, lane, instance.epoch)
                for share in shares:
                    share.sequence.under_way = True
                yield lane.flight

    def land(self, deadline_s: float | None = None) -> tuple[Flight, BatchResult | None] | None:
        """Wait for one micro-batch; None when none is under way. ``settle`` has to follow.

        A result of None: its instance was lost, and its sequences begin again.

        Raises:
            TransportTimeout, RoleLost: see `Executor.collect`.
        """
        flights = [lane.flight for lane in self.lanes if lane.flight is not None]
        if not flights:
            assert not self.waiting, "whoever waits fits into an empty cache"
            return None
        landed = self.executor.collect(deadline_s)
        flight = next(x for x in flights if x.ticket == landed.ticket)
        instance = self.instances[flight.lane.instance]
        instance.notice_loss()
        if landed.result is None and flight.epoch == instance.epoch:
            instance.lose()
        return flight, landed.result

    def settle(self, flight: Flight) -> None:
        """Free what waited for a flight, once its result is filed."""
        self.instances[flight.lane.instance].settle(flight)

    def release(self, sequence: SequenceState) -> None:
        """Take a finished sequence out wherever it is."""
        if not any(instance.leave(sequence) for instance in self.instances):
            with suppress(ValueError):  # it has left with the flight that finished it
                self.waiting.remove(sequence)

    def _admit(self) -> None:
        while self.waiting and self._place(self.waiting[0]):
            self.waiting.popleft()

    def _place(self, sequence: SequenceState) -> bool:
        """Find a lane for a sequence; say whether there was one."""
        options = [(x, lane) for x in self.instances if (lane := x.emptiest) is not None]
        if not options:
            return False
        found = {instance.number: instance.found(sequence) for instance, _ in options}
        least = min(len(lane.scheduler.running) for _, lane in options)

        def preferred(option: tuple[Instance, Lane]) -> tuple[int, int, int]:
            instance, load = option[0], len(option[1].scheduler.running)
            near = len(found[instance.number]) if load <= least + LEAN else 0
            return -near, load, instance.running

        return any(
            instance.admit(sequence, lane, found[instance.number])
            for instance, lane in sorted(options, key=preferred)
        )
