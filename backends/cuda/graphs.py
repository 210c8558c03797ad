"""Decode steps as CUDA graphs: one capture for each bucket of batch sizes, replayed afterwards.

A graph fixes addresses and launches, so a batch is padded to its bucket: rows beyond it write no
keys, get no expert and no tile. Everything but the capture itself is tried in the interpreter
(tests/cuda/test_graphs.py); the capture was never run on a card.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from step3_hetero.backend import BatchMeta, Stage
from step3_hetero.backends.cuda.attention import Batch
from step3_hetero.backends.cuda.checks import check_indices, check_width
from step3_hetero.backends.cuda.rope import angles
from step3_hetero.backends.torch_common.arrays import to_torch
from step3_hetero.composed import deliver
from step3_hetero.specs import LOGICAL_BLOCK, Limits

Named = Mapping[str, Tensor]

WARM_UPS = 3
"""Runs before a capture: kernels are compiled and libraries set up outside it (PyTorch's notes on
CUDA graphs)."""

NO_EXPERT = -1


class Replayable(Protocol):
    """What a capture leaves behind."""

    def replay(self) -> None:
        """Run the captured work again, over the same addresses."""


Capture = Callable[[Callable[[], Named]], tuple[Replayable, Named]]


def capture(work: Callable[[], Named]) -> tuple[Replayable, Named]:
    """Capture ``work`` on the current card and return the graph and the arrays that it fills."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it without
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def bucket_of(meta: BatchMeta, limits: Limits) -> int | None:
    """Return the power of two that a decoding batch is padded to; None for any other batch.

    Other batches: prompts, batches that are padded already, none at all, more than ``limits``.
    """
    if meta.tokens == 0 or meta.tokens != meta.seqs:
        return None
    if (np.diff(meta.query_starts) != 1).any():
        return None
    bucket = 1 << (meta.tokens - 1).bit_length()
    fits = bucket <= max(limits.tokens, 1) and meta.block_tables.shape[1] <= limits.blocks_per_seq
    return bucket if fits else None


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
        _refill(self.positions, meta.positions, 0)
        _refill(self.slots, meta.slots, -1)
        self.tables.zero_()
        rows, columns = meta.block_tables.shape
        self.tables[:rows, :columns].copy_(to_torch(meta.block_tables))
        for (group, block), (seqs, _) in self._tiles.items():
            count = -(-group // block)
            _refill(seqs, np.repeat(np.arange(meta.seqs, dtype=np.int32), count), -1)
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


def _refill(held: Tensor, values: Any, rest: int) -> None:
    held.fill_(rest)
    held[: len(values)].copy_(to_torch(np.ascontiguousarray(values, np.int32)))


@dataclass
class Step:
    """One bucket's capture: where inputs go, and what a replay fills."""

    inputs: dict[str, Tensor]
    graph: Replayable
    results: Named


class GraphedStage(Stage):
    """Runs decoding batches of another stage from graphs, everything else as it comes.

    ``inner`` must read its batch from ``inner.batch`` and must neither look at values on the host
    nor keep arrays between runs. ``batches`` is shared by the stages of one device.
    """

    def __init__(
        self,
        inner: Any,
        limits: Limits,
        place: torch.device,
        batches: dict[int, DecodeBatch],
        capture: Capture = capture,
    ) -> None:
        self.inner = inner
        self.spec = inner.spec
        self.limits = limits
        self.place = place
        self.batches = batches
        self.capture = capture
        self.steps: dict[int, Step] = {}
        self.bucket: int | None = None
        self.rows = 0

    def plan(self, meta: BatchMeta) -> None:
        """Refill the bucket's arrays, outside any capture."""
        self.bucket = bucket_of(meta, self.limits)
        if self.bucket is None:
            self.inner.plan(meta)
            return
        if self.bucket not in self.batches:
            self.batches[self.bucket] = DecodeBatch(
                self.bucket, self.limits.blocks_per_seq, self.place
            )
        self.rows = meta.tokens
        cache = getattr(self.inner, "cache", None)
        if cache is not None and cache.checked:  # a replay does not come by there
            check_indices(meta, cache.spec.blocks)
        self.batches[self.bucket].fill(meta)
        self.inner.batch = self.batches[self.bucket]

    def run(self, inputs: Named, out: Named | None = None) -> Named:
        """Copy the inputs in, replay, and return the rows that are no padding."""
        if self.bucket is None:
            return self.inner.run(inputs, out)  # type: ignore[no-any-return]  # any stage
        if self.bucket not in self.steps:
            self.steps[self.bucket] = self._captured(inputs)
        step = self.steps[self.bucket]
        for name, x in inputs.items():
            step.inputs[name][self.rows :] = NO_EXPERT if name == "ids" else 0
            step.inputs[name][: self.rows].copy_(x)
        step.graph.replay()
        return deliver({n: x[: self.rows] for n, x in step.results.items()}, out)

    def _captured(self, inputs: Named) -> Step:
        assert self.bucket is not None
        held = {
            name: torch.zeros((self.bucket, *x.shape[1:]), dtype=x.dtype, device=x.device)
            for name, x in inputs.items()
        }
        if "ids" in held:
            held["ids"].fill_(NO_EXPERT)
        graph, results = self.capture(lambda: self.inner.run(held))
        return Step(held, graph, results)
