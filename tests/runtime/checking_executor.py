"""An executor that computes nothing and checks everything: who writes which block, and when.

A cell stands for the keys and values of one token: the token's id, or a number of an image's row.
A token to come is a digest of all cells that its row reads, so that one wrong cell, in whatever
block, changes the answer. What it refuses it refuses by AssertionError.
"""

import struct
import zlib
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.draws import uniform
from step3_hetero.runtime.executor import Executor
from step3_hetero.runtime.microbatch import BatchResult, Landed, Ticket
from step3_hetero.runtime.sequence import channels_last
from step3_hetero.specs import LOGICAL_BLOCK

NOTHING, COMING = -1, -2
"""Cells never written, and cells that a micro-batch under way is about to write."""
VOCAB = 64


def image_cells(pixels, first, last):
    """Return the cells of an image's rows: numbers beyond every token id."""
    digest = zlib.crc32(b"".join(np.ascontiguousarray(p).tobytes() for p in pixels))
    rows = range(first, last)
    return np.array([VOCAB + zlib.crc32(struct.pack("qq", digest, row)) for row in rows], np.int64)


def next_token(cells, draw, banned=-1):
    """Return the token after a context."""
    token = zlib.crc32(cells.astype(np.int64).tobytes() + struct.pack("d", draw)) % VOCAB
    return token if token != banned else (token + 1) % VOCAB


def cells_of(prompt):
    """Return the cells of a prompt."""
    cells = np.array(prompt.token_ids, np.int64)
    for image in prompt.images:
        views = channels_last(image.views)
        cells[list(image.positions)] = image_cells(views, 0, len(image.positions))
    return cells


def undisturbed(prompt, params, stop_ids, banned):
    """Return the tokens of a request that has an engine to itself, and why they end."""
    cells, found = cells_of(prompt), []
    while True:
        draw = uniform(params.seed, 0, len(cells)) if params.temperature else 0.0
        found.append(next_token(cells, draw, banned))
        cells = np.append(cells, found[-1])
        if found[-1] in stop_ids and not params.ignore_eos:
            return found, "stop"
        if len(found) == params.max_tokens:
            return found, "length"


@dataclass(eq=False)
class Flying:
    """A micro-batch in the air: what each sequence reads, and the cells that it writes."""

    ticket: Ticket
    batch: object
    reads: list  # for each sequence, its blocks
    writes: set  # blocks
    before: list  # for each sequence, the cells of its context before
    cells: np.ndarray  # of each row


class CheckingExecutor(Executor):
    """Cells instead of tensors. Lands micro-batches by lot, in order for each instance.

    ``loss`` is how likely an instance is lost at each ``collect``, idle ones too; ``late`` how
    likely what was under way on it had just landed. ``tells_epoch`` may be turned off: then losses
    are known by what comes back alone.
    """

    def __init__(
        self, kv_blocks, instances=1, microbatches=1, seed=0, loss=0.0, late=0.3, tells_epoch=True
    ):
        self.kv_blocks, self.instances, self.microbatches = kv_blocks, instances, microbatches
        self.clock = StageClock()
        self.cells = np.full((instances, kv_blocks * LOGICAL_BLOCK), NOTHING, np.int64)
        self.places = np.full_like(self.cells, NOTHING)
        self.images = [{} for _ in range(instances)]
        self.air = [deque() for _ in range(instances)]
        self.epochs = [0] * instances
        self.copies = 0
        self.lost = 0
        self._landed = deque()
        self._tickets = 0
        self._draws = np.random.default_rng(seed)
        self._loss, self._late, self.tells_epoch = loss, late, tells_epoch

    def cache_epoch(self, instance=0):
        return self.epochs[instance] if self.tells_epoch else 0

    def submit(self, batch, instance=0):
        assert len(self.air[instance]) < self.microbatches, "more under way than there are lanes"
        self._tickets += 1
        flying = self._checked(batch, instance, Ticket(self._tickets))
        slots = batch.meta.slots
        self.cells[instance][slots] = COMING
        self.places[instance][slots] = batch.meta.positions
        self.air[instance].append(flying)
        return flying.ticket

    def collect(self, deadline_s=None):
        if not self._landed:
            number = self._draws.choice([n for n, air in enumerate(self.air) if air])
            if self._draws.random() < self._loss:
                struck = self._draws.integers(self.instances) if self.tells_epoch else number
                while self.tells_epoch and self.air[struck] and self._draws.random() < self._late:
                    self._land(struck)
                self.lose(struck)
            if self.air[number]:
                self._land(number)
        return self._landed.popleft()

    def forget_image(self, key, instance=0):
        for flying in self.air[instance]:
            assert key not in {p.key for p in flying.batch.images}, "an image under way forgotten"
        self.images[instance].pop(key, None)

    def copy_blocks(self, pairs, instance=0):
        cells, places = (x[instance].reshape(-1, LOGICAL_BLOCK) for x in (self.cells, self.places))
        for source, target in pairs:
            assert (cells[source] >= 0).all(), "a block is copied that is not written yet"
            for flying in self.air[instance]:
                read = {block for blocks in flying.reads for block in blocks}
                assert target not in read, "a block under way is copied to"
            cells[target], places[target] = cells[source], places[source]
            self.copies += 1

    def close(self):
        pass

    def lose(self, instance):
        """Have an instance die: what is under way comes back without a result."""
        self.lost += 1
        self.epochs[instance] += 1
        self.cells[instance] = self.places[instance] = NOTHING
        self.images[instance].clear()
        while self.air[instance]:
            self._landed.append(Landed(self.air[instance].popleft().ticket, None))

    def _checked(self, batch, instance, ticket):
        meta, reads, writes, before = batch.meta, [], set(), []
        assert len(set(meta.slots.tolist())) == len(meta.slots), "one slot is written twice"
        for seq in range(meta.seqs):
            start, stop, context = *meta.query_starts[seq : seq + 2], meta.context_lens[seq]
            table = meta.block_tables[seq][: -(-context // LOGICAL_BLOCK)]
            places = np.arange(context - (stop - start), context)
            assert np.array_equal(meta.positions[start:stop], places)
            slots = table[places // LOGICAL_BLOCK] * LOGICAL_BLOCK + places % LOGICAL_BLOCK
            assert np.array_equal(meta.slots[start:stop], slots)
            reads.append(set(table.tolist()))
            writes |= set((slots // LOGICAL_BLOCK).tolist())
            before.append(self._context(instance, table, places[0]))
        for seq, blocks in enumerate(reads):
            own = set(meta.slots[slice(*meta.query_starts[seq : seq + 2])] // LOGICAL_BLOCK)
            assert not (writes - own) & blocks, "a sequence's block is written by another one"
        for other in self.air[instance]:
            assert not writes & set().union(*other.reads), "a block under way is written to"
            assert not other.writes & set().union(*reads), "a block is read that is under way"
        cells = self._row_cells(batch, instance)
        return Flying(ticket, batch, reads, writes, before, cells)

    def _context(self, instance, table, tokens):
        """Return the cells of the first ``tokens`` places of a block table."""
        places = np.arange(tokens)
        slots = table[places // LOGICAL_BLOCK] * LOGICAL_BLOCK + places % LOGICAL_BLOCK
        cells = self.cells[instance][slots]
        assert (cells >= 0).all(), "what is read was never written"
        assert np.array_equal(self.places[instance][slots], places)
        return cells

    def _row_cells(self, batch, instance):
        cells = batch.token_ids.astype(np.int64)
        for part in batch.images:
            if part.pixels is not None:
                self.images[instance].setdefault(part.key, part.pixels)
            assert part.key in self.images[instance], "pixels that were never sent"
            pixels = self.images[instance][part.key]
            cells[part.index] = image_cells(pixels, part.start, part.stop)
        return cells

    def _land(self, instance):
        flying = self.air[instance].popleft()
        meta = flying.batch.meta
        assert (self.cells[instance][meta.slots] == COMING).all(), "written by another meanwhile"
        for seq, before in enumerate(flying.before):
            again = self._context(instance, meta.block_tables[seq], len(before))
            assert np.array_equal(again, before), "a context changed under way"
        self.cells[instance][meta.slots] = flying.cells
        self._landed.append(Landed(flying.ticket, self._result(flying)))

    def _result(self, flying):
        batch, ids = flying.batch, []
        for row, draw in zip(batch.rows, batch.choice.uniform, strict=True):
            seq = int(np.searchsorted(batch.meta.query_starts, row, side="right")) - 1
            start = batch.meta.query_starts[seq]
            context = np.concatenate([flying.before[seq], flying.cells[start : row + 1]])
            ids.append(next_token(context, draw, batch.choice.banned))
        logits = np.eye(VOCAB, dtype=np.float32)[ids] if batch.want_logits else None
        return BatchResult(np.array(ids, np.int32), [None] * len(ids), logits)


def audit(engine):
    """Hold an engine's books against each other, and against the cells."""
    for instance in engine.lanes.instances:
        pool, executor = instance.pool, engine.executor
        running = [s for lane in instance.lanes for s in lane.scheduler.running]
        held = Counter(block for s in running for block in s.blocks)
        assert held == {b: n for b in range(pool.blocks) if (n := pool.holders(b))}
        everyone = sorted([*pool._free, *pool._cached, *held])
        assert everyone == list(range(pool.blocks)), "a block leaked, or is in two places"
        assert set(pool._cached) <= set(pool._keys)
        assert {key.digest: block for block, key in pool._keys.items()} == pool._known
        for sequence in running:
            own = sequence.blocks[sequence.computed // LOGICAL_BLOCK :]
            assert all(pool.holders(block) == 1 for block in own), "what is written is shared"
            assert [s.id for s in running if s is sequence] == [sequence.id]
        noticed = instance._executors_epoch if executor.tells_epoch else instance.epoch
        if noticed == executor.epochs[instance.number]:  # or else lost, and not noticed yet
            _audit_cells(instance, executor, running)


def _audit_cells(instance, executor, running):
    """Hold what blocks are known by, and what sequences have computed, against the cells."""
    cells = executor.cells[instance.number].reshape(-1, LOGICAL_BLOCK)
    for block, key in instance.pool._keys.items():
        tokens = np.frombuffer(key.content[32 : 32 + 4 * LOGICAL_BLOCK], np.int32)
        text = cells[block] < VOCAB
        assert np.array_equal(cells[block][text], tokens[text])
    leaving = [s for lane in instance.lanes for s in lane.leaving]
    for sequence in running:
        if sequence not in leaving:
            context = cells[sequence.blocks].ravel()[: sequence.computed]
            want = np.append(cells_of(sequence.prompt), sequence.generated)[: len(context)]
            assert np.array_equal(context, want)


def assert_nothing_is_left(engine):
    """Say that an engine at rest holds no block, no image and no micro-batch."""
    executor, stats = engine.executor, engine.stats()
    audit(engine)
    assert not any(executor.air)
    assert not any(executor.images)
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.free_blocks + stats.cached_blocks == stats.blocks
    assert all(i.pool.holders(b) == 0 for i in engine.lanes.instances for b in range(i.pool.blocks))
    assert len(engine._deadlines) == 0
