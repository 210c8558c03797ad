"""One attention instance: its KV blocks, the lanes that share them, and who makes room for whom.

The oldest sequence of an instance never gives way, and whoever gives way is younger than the one
it does so for; a request that fits into the empty cache is therefore finished in the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from step3_hetero.runtime.blocks import BlockPool, blocks_for
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.microbatch import MicroBatch, Ticket
from step3_hetero.runtime.prefix import keys_of
from step3_hetero.runtime.scheduler import Scheduler, Share
from step3_hetero.runtime.sequence import SequenceState
from step3_hetero.specs import LOGICAL_BLOCK


@dataclass(frozen=True, eq=False)
class Flight:
    """A micro-batch under way, whose tokens are in it, and the epoch of the cache it started in."""

    ticket: Ticket
    shares: Sequence[Share]
    batch: MicroBatch
    lane: Lane
    epoch: int


@dataclass(eq=False)
class Lane:
    """One of the micro-batches that an instance may have under way.

    A sequence that leaves while its tokens are under way keeps its blocks until they have landed:
    the stages still write to them. ``leaving`` are those sequences.
    """

    instance: int
    scheduler: Scheduler
    flight: Flight | None = None
    leaving: list[SequenceState] = field(default_factory=list)


class Instance:
    """Admits sequences to its lanes, lets them grow, and takes them out.

    ``epoch`` counts how often the instance has lost its cache. ``waiting`` is the queue, oldest
    first, that sequences go back to when they give way.
    """

    def __init__(
        self,
        number: int,
        executor: Executor,
        lanes: Sequence[Lane],
        waiting: deque[SequenceState],
        prefix_reuse: bool,
    ) -> None:
        self.number = number
        self.lanes = lanes
        self.pool = BlockPool(executor.kv_blocks)
        self.epoch = 0
        self.preemptions = 0
        self.reused_tokens = 0
        self._executor = executor
        self._waiting = waiting
        self._executors_epoch = executor.cache_epoch(number)
        self._reuse = prefix_reuse and self._executors_epoch is not None
        self._lane_of: dict[int, Lane] = {}
        self._stalled: SequenceState | None = None

    @property
    def running(self) -> int:
        """Return the number of sequences on all lanes."""
        return len(self._lane_of)

    @property
    def emptiest(self) -> Lane | None:
        """Return the lane with the fewest sequences; None if none takes another."""
        lane = min(self.lanes, key=lambda x: len(x.scheduler.running))
        return None if lane.scheduler.is_full else lane

    def found(self, sequence: SequenceState) -> list[int]:
        """Return the blocks here that hold the beginning of a sequence.

        None for a sequence that wants the logits of every token: it has to compute them.
        """
        if not self._reuse or sequence.all_rows:
            return []
        return self.pool.find(keys_of(sequence, len(sequence.tokens) // LOGICAL_BLOCK))

    def admit(self, sequence: SequenceState, lane: Lane, found: Sequence[int]) -> bool:
        """Take a sequence in if its tokens fit, and one block more where it may need one.

        ``found`` are shared; the others it gets for itself. At least the newest token is computed:
        where every block was found, the last one is copied, for it is written to. Nobody is taken
        in while someone here waits for a block.
        """
        if self._stalled is not None:
            return False
        tokens, shared = len(sequence.tokens), list(found)
        whole = len(shared) * LOGICAL_BLOCK == tokens
        own = blocks_for(tokens) - len(shared) + whole
        # A copied block is room enough: the block that it was copied from is given back.
        room = not whole and blocks_for(tokens) < sequence.most_blocks
        unheld = sum(self.pool.holders(block) == 0 for block in shared)
        if own + room > self.pool.available - unheld:
            return False
        self.pool.share(shared)
        taken = self.pool.take(own)
        assert taken is not None, "what is available was counted"
        if whole:
            source = shared.pop()
            self._executor.copy_blocks([(source, taken[0])], self.number)
            self.pool.give_back([source])
        self._seat(sequence, lane, shared + taken, len(found))
        return True

    def _seat(self, sequence: SequenceState, lane: Lane, blocks: list[int], known: int) -> None:
        sequence.blocks, sequence.offered = blocks, known
        sequence.table = np.zeros(sequence.most_blocks, np.int32)
        sequence.table[: len(blocks)] = blocks
        sequence.computed = min(known * LOGICAL_BLOCK, len(sequence.tokens) - 1)
        self.reused_tokens += sequence.computed
        lane.scheduler.add(sequence)
        self._lane_of[sequence.id] = lane

    def grow(self, sequence: SequenceState) -> bool:
        """Give a running sequence its next block, at the cost of the youngest if need be.

        False: it has to sit out this step. An older one waits for a block, or it is the youngest
        itself, or what was freed for it is still under way.
        """
        if self._stalled is not None and self._stalled.id < sequence.id:
            return False
        while (taken := self.pool.take(1)) is None:
            if not self._make_room(sequence):
                self._stalled = sequence
                return False
        if self._stalled is sequence:
            self._stalled = None
        sequence.table[len(sequence.blocks)] = taken[0]
        sequence.blocks += taken
        return True

    def _make_room(self, sequence: SequenceState) -> bool:
        """Have the youngest sequence give way to ``sequence``; say whether it has gone."""
        if any(lane.leaving for lane in self.lanes):
            return False
        running = (s for lane in self.lanes for s in lane.scheduler.running)
        youngest = max(running, key=lambda s: s.id)
        if youngest is sequence:
            return False
        self.preemptions += 1
        self.leave(youngest)
        return youngest.id not in self._lane_of

    def leave(self, sequence: SequenceState) -> bool:
        """Take a sequence out, now or once its tokens have landed; say whether it is here.

        One that is not finished goes back to the queue.
        """
        lane = self._lane_of.get(sequence.id)
        if lane is None:
            return False
        if not sequence.under_way:
            self._free(lane, sequence)
        elif sequence not in lane.leaving:
            lane.leaving.append(sequence)
        return True

    def settle(self, flight: Flight) -> None:
        """Take a flight whose result is filed out of the air, and out those who wait for that."""
        lane = flight.lane
        lane.flight = None
        keeps = self._reuse and flight.epoch == self.epoch
        for share in flight.shares:
            sequence = share.sequence
            sequence.under_way = False
            if keeps and sequence.computed // LOGICAL_BLOCK > sequence.offered:
                self._offer(sequence)
        leaving, lane.leaving = lane.leaving, []
        for sequence in leaving:
            self._free(lane, sequence)

    def notice_loss(self) -> None:
        """Ask the executor whether this instance's cache began anew, and draw the consequences."""
        epoch = self._executor.cache_epoch(self.number)
        if epoch != self._executors_epoch:
            self._executors_epoch = epoch
            self.lose()

    def lose(self) -> None:
        """Forget what the cache held: everyone here has to begin again, here or elsewhere."""
        self.epoch += 1
        self.pool.forget()
        for lane in self.lanes:
            for sequence in list(lane.scheduler.running):
                self.leave(sequence)

    def _offer(self, sequence: SequenceState) -> None:
        """Make the blocks that a sequence has filled known by what they hold."""
        full = sequence.computed // LOGICAL_BLOCK
        keys = keys_of(sequence, full)
        for number in range(sequence.offered, full):
            self.pool.keep(sequence.blocks[number], keys[number])
        sequence.offered = full

    def _free(self, lane: Lane, sequence: SequenceState) -> None:
        lane.scheduler.remove(sequence)
        del self._lane_of[sequence.id]
        if self._stalled is sequence:
            self._stalled = None
        self.pool.give_back(sequence.blocks)
        sequence.blocks = []
        for image in sequence.sent:
            self._executor.forget_image(sequence.image_key(image), self.number)
        sequence.sent.clear()
        if sequence.finished is None:
            sequence.restart()
            queue(self._waiting, sequence)


def queue(waiting: deque[SequenceState], sequence: SequenceState) -> None:
    """Put a sequence in its place by age: behind all that came before it."""
    if not waiting or waiting[-1].id < sequence.id:
        waiting.append(sequence)
        return
    place = next(n for n, other in enumerate(waiting) if other.id > sequence.id)
    waiting.insert(place, sequence)
