"""Decode steps as graphs of a device's runtime: one for each bucket of batch sizes, replayed.

A graph fixes addresses and launches, so a batch is padded to its bucket, and what changes from step
to step is refilled in place before the replay. Capturing, and a batch in arrays that stay where
they are, is what a vendor adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from step3_hetero.backend import BatchMeta, Stage
from step3_hetero.backends.torch_common.arrays import to_torch
from step3_hetero.composed import deliver
from step3_hetero.specs import Limits

Named = Mapping[str, Tensor]

NO_EXPERT = -1


class Replayable(Protocol):
    """What a capture leaves behind."""

    def replay(self) -> None:
        """Run the captured work again, over the same addresses."""


class DecodingBatch(Protocol):
    """A decoding batch in arrays that stay where they are."""

    def fill(self, meta: BatchMeta) -> None:
        """Take in the next step's batch; rows beyond it have no effect on the others."""


Capture = Callable[[Callable[[], Named]], tuple[Replayable, Named]]
"""Capture some work: the graph, and the arrays that its replay fills."""


def bucket_of(meta: BatchMeta, limits: Limits, largest: int) -> int | None:
    """Return the power of two that a decoding batch is padded to; None for any other batch.

    Other batches: prompts, batches that are padded already, none at all, more than ``limits`` or
    ``largest``.
    """
    if meta.tokens == 0 or meta.tokens != meta.seqs or (meta.slots < 0).any():
        return None
    if (np.diff(meta.query_starts) != 1).any():
        return None
    bucket = 1 << (meta.tokens - 1).bit_length()
    fits = meta.tokens <= min(limits.tokens, largest) and bucket <= largest
    return bucket if fits and meta.block_tables.shape[1] <= limits.blocks_per_seq else None


def refill(held: Tensor, values: Any, rest: int) -> None:
    """Write ``values`` to the front of an integer array and ``rest`` behind them."""
    new = np.full(held.shape, rest, np.int64)
    new[tuple(slice(n) for n in np.shape(values))] = values
    held.copy_(to_torch(new).to(held.dtype))


@dataclass
class Step:
    """One bucket's capture: where inputs go, and what a replay fills."""

    inputs: dict[str, Tensor]
    graph: Any
    results: Named


class GraphedStage(Stage):
    """Runs decoding batches of another stage from graphs, everything else as it comes.

    ``inner`` must read its batch from ``inner.batch`` and must neither look at values on the host
    nor keep arrays between runs. ``batch_for`` returns a bucket's batch, shared by the stages of
    one device; None for stages to which a batch is no more than its rows.
    """

    def __init__(
        self,
        inner: Any,
        limits: Limits,
        batch_for: Callable[[int], DecodingBatch] | None,
        capture: Capture,
        largest: int,
    ) -> None:
        self.inner = inner
        self.spec = inner.spec
        self.limits = limits
        self.batch_for = batch_for
        self.capture = capture
        self.largest = largest
        self.steps: dict[int, Step] = {}
        self.bucket: int | None = None
        self.rows = 0

    def plan(self, meta: BatchMeta) -> None:
        """Refill the bucket's arrays, outside any capture."""
        self.bucket = bucket_of(meta, self.limits, self.largest)
        if self.bucket is None:
            self.inner.plan(meta)
            return
        self.rows = meta.tokens
        if self.batch_for is not None:
            batch = self.batch_for(self.bucket)
            batch.fill(meta)
            self.inner.batch = batch
        if self.bucket in self.steps:
            self.refresh(self.steps[self.bucket])

    def refresh(self, step: Step) -> None:
        """Give a graph what it holds by value; nothing, unless a vendor's graphs hold some."""

    def run(self, inputs: Named, out: Named | None = None) -> Named:
        """Copy the inputs in, replay, and return the rows that are no padding."""
        if self.bucket is None:
            found: Named = self.inner.run(inputs, out)
            return found
        if self.bucket not in self.steps:
            self.steps[self.bucket] = self._captured(inputs)
            self.refresh(self.steps[self.bucket])
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
