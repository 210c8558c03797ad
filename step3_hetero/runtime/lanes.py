"""Lanes: where micro-batches run side by side, each with sequences of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from step3_hetero.runtime.blocks import BlockAllocator, blocks_for
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.microbatch import BatchResult, MicroBatch, Ticket
from step3_hetero.runtime.scheduler import Scheduler, Share, assemble
from step3_hetero.runtime.sequence import SequenceState


@dataclass(frozen=True, eq=False)
class Flight:
    """A micro-batch under way, and whose tokens are in it."""

    ticket: Ticket
    shares: Sequence[Share]
    batch: MicroBatch


@dataclass(eq=False)
class Lane:
    """One of the micro-batches that an instance may have under way.

    A sequence that ends while its lane is in flight keeps its blocks until the lane has landed:
    the stages still write to them.
    """

    instance: int
    scheduler: Scheduler
    flight: Flight | None = None
    ending: list[SequenceState] = field(default_factory=list)

    def release(self, sequence: SequenceState) -> None:
        """Free what a sequence holds, now or once the lane has landed."""
        if self.flight is not None:
            self.ending.append(sequence)
        else:
            self.scheduler.release(sequence)

    def land(self) -> Flight:
        """Take the lane's flight out of the air and free what waited for it."""
        flight, self.flight = self.flight, None
        assert flight is not None
        ending, self.ending = self.ending, []
        for sequence in ending:
            self.scheduler.release(sequence)
        return flight


class Lanes:
    """All lanes of an executor, and the sequences that wait for one.

    Of the lanes with room the one with the fewest sequences takes the next; nobody is overtaken.
    """

    def __init__(self, executor: Executor, max_batch: int, prefill_chunk: int) -> None:
        self.executor = executor
        self.waiting: deque[SequenceState] = deque()
        self.allocators = [BlockAllocator(executor.kv_blocks) for _ in range(executor.instances)]
        self.lanes = [
            Lane(number, Scheduler(max_batch, prefill_chunk, allocator))
            for _ in range(executor.microbatches)
            for number, allocator in enumerate(self.allocators)
        ]

    def fits(self, tokens: int) -> bool:
        """Say whether a sequence of so many tokens can ever run."""
        return blocks_for(tokens) <= self.executor.kv_blocks

    @property
    def free_blocks(self) -> int:
        """Return the free blocks of all instances together."""
        return sum(allocator.free for allocator in self.allocators)

    def start(self, banned: int) -> Iterator[Flight]:
        """Admit who waits and submit a micro-batch on every lane that has one to run."""
        self._admit()
        for lane in self.lanes:
            shares = [] if lane.flight is not None else lane.scheduler.next_shares()
            if shares:
                batch = assemble(shares, banned)
                ticket = self.executor.submit(batch, lane.instance)
                lane.flight = Flight(ticket, shares, batch)
                yield lane.flight

    def land(self, deadline_s: float | None = None) -> tuple[Flight, BatchResult | None] | None:
        """Wait for one micro-batch; None when none is under way.

        A result of None: its instance was lost, and its sequences begin again.
        """
        if all(lane.flight is None for lane in self.lanes):
            return None
        landed = self.executor.collect(deadline_s)
        lane = next(
            x for x in self.lanes if x.flight is not None and x.flight.ticket == landed.ticket
        )
        if landed.result is None:
            for sequence in lane.scheduler.running:
                sequence.restart()
        return lane.land(), landed.result

    def release(self, sequence: SequenceState) -> int:
        """Take a sequence out wherever it is; return the instance that it was on."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return 0
        lane = next(x for x in self.lanes if sequence in x.scheduler.running)
        lane.release(sequence)
        return lane.instance

    def _admit(self) -> None:
        while self.waiting:
            emptiest = sorted(self.lanes, key=lambda lane: len(lane.scheduler.running))
            if not any(lane.scheduler.admit(self.waiting[0]) for lane in emptiest):
                return
            self.waiting.popleft()
