"""Decode steps as CUDA graphs: one capture for each bucket of batch sizes, replayed afterwards.

A graph fixes addresses and launches, so a batch is padded to its bucket: rows beyond it write no
keys, get no expert and no tile. Everything but the capture itself is tried in the interpreter
(tests/cuda/test_graphs.py); the capture was never run on a card.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.cuda.attention import Batch
from step3_hetero.backends.cuda.checks import check_indices, check_width
from step3_hetero.backends.cuda.rope import angles
from step3_hetero.backends.torch_common.graphs import (
    Capture,
    GraphedStage,
    Named,
    Replayable,
    refill,
)
from step3_hetero.specs import LOGICAL_BLOCK, Limits

WARM_UPS = 3
"""Runs before a capture: kernels are compiled and libraries set up outside it (PyTorch's notes on
CUDA graphs)."""


class OnCard:
    """Captures work on one card, whichever card the calling thread has as its current one.

    torch's own capture stream belongs to the card that was current when the process first captured:
    on another card nothing would be captured, and a replay would leave the first results standing.
    Other threads may allocate and look at events meanwhile. Graphs share no memory: micro-batches
    replay them in any order.
    """

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self._side: Any = None

    def __call__(self, work: Callable[[], Named]) -> tuple[Replayable, Named]:
        """Return the graph of ``work`` and the arrays that it fills."""
        with torch.cuda.device(self.place):
            if self._side is None:
                self._side = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]  # torch leaves it without
            current, side = torch.cuda.current_stream(self.place), self._side
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                results = work()
        return graph, results


class DecodeBatch(Batch):
    """A decoding batch in arrays that stay where they are, refilled before each step."""

    def __init__(self, bucket: int, blocks_per_seq: int, device: torch.device) -> None:
        rows = np.arange(bucket, dtype=np.int32)
        tables = np.zeros((bucket, blocks_per_seq), np.int32)
        blank = BatchMeta(rows * 0, rows * 0 - 1, np.arange(bucket + 1, dtype=np.int32),
                          rows * 0 + 1, tables)  # fmt: skip
        super().__init__(blank, device)
        self.padded = True
        self.longest = blocks_per_seq * LOGICAL_BLOCK  # splits must not depend on the step
        self.filled: BatchMeta | None = None

    def fill(self, meta: BatchMeta) -> None:
        """Take in the next step's batch; rows beyond it write nothing and have no tile."""
        if self.filled is meta:
            return
        check_width(meta)
        self.filled = meta
        refill(self.positions, meta.positions, 0)
        refill(self.slots, meta.slots, -1)
        refill(self.tables, meta.block_tables, 0)
        for (group, block), (seqs, _) in self._tiles.items():
            count = -(-group // block)
            refill(seqs, np.repeat(np.arange(meta.seqs, dtype=np.int32), count), -1)
        for (head_dim, theta, dtype), (cos, sin) in self._angles.items():
            for held, new in zip(
                (cos, sin), angles(self.positions, head_dim, theta, dtype), strict=True
            ):
                held.copy_(new)

    def tiles(self, group: int, block: int) -> tuple[Tensor, Tensor]:
        """Return tiles as ``Batch`` does, those of padding marked -1."""
        new = (group, block) not in self._tiles
        found = super().tiles(group, block)
        if new and self.filled is not None:
            count = -(-group // block) * self.filled.seqs
            found[0][count:] = -1
        return found


class CudaGraphedStage(GraphedStage):
    """A stage whose decode steps are replayed; one device's stages share ``batches``."""

    def __init__(
        self,
        inner: Any,
        limits: Limits,
        place: torch.device,
        batches: dict[int, DecodeBatch],
        capture: Capture,
    ) -> None:
        found = partial(_batch_for, batches, limits.blocks_per_seq, place)
        super().__init__(inner, limits, found, capture, max(limits.tokens, 1))

    def plan(self, meta: BatchMeta) -> None:
        """Look at the indices first, if the cache is opened so: a replay does not come by there."""
        cache = getattr(self.inner, "cache", None)
        if cache is not None and cache.checked:
            check_indices(meta, cache.spec.blocks)
        super().plan(meta)


def _batch_for(
    batches: dict[int, DecodeBatch], blocks_per_seq: int, place: torch.device, bucket: int
) -> DecodeBatch:
    if bucket not in batches:
        batches[bucket] = DecodeBatch(bucket, blocks_per_seq, place)
    return batches[bucket]
