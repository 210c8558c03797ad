"""Decode steps as ACL graphs: option ``graphs: true``. Never run on hardware.

What a graph of torch_npu holds by value are the context lengths of the fused attention: they are
numbers on the host. The runtime leaves a wait in front of each such call, which ``update`` ends; so
every replay needs an update of its own, and an update must not come while the last replay runs.
Source: torch_npu 2.13.0, npu/graphs.py and npu/_npugraph_handlers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from step3_hetero.backend import BatchMeta
from step3_hetero.backends.ascend import attention as att
from step3_hetero.backends.ascend import driver, limits
from step3_hetero.backends.ascend.copies import NpuEvent
from step3_hetero.backends.ascend.rope import looked_up
from step3_hetero.backends.ascend.stages import AscendAttention, AscendFfn
from step3_hetero.backends.torch_common.graphs import GraphedStage, Named, Step, refill
from step3_hetero.errors import PlacementError
from step3_hetero.specs import LOGICAL_BLOCK, HostArray, Limits

WARM_UPS = 3
"""Runs before a capture, in which operators are compiled and workspaces found."""

REPLAY_S = 60.0
"""Deadline of one replay: no layer of a decode step takes a thousandth of it."""

SPARE_BLOCKS = 1
"""Blocks at the end of a cache to which rows of padding write: its operator takes no slot -1."""

LARGEST_BUCKET = 2 * LOGICAL_BLOCK * SPARE_BLOCKS
"""Under half a bucket is padding, and each of its rows needs a slot of its own."""


def why_unavailable() -> str | None:
    """Say why this torch_npu captures no graphs, or None."""
    npu = driver.module()
    missing = [
        n for n in ("NPUGraph", "graph", "Stream", "stream", "device") if not hasattr(npu, n)
    ]
    return f"this torch_npu has no {missing[0]}" if missing else None


class AclGraph:
    """A captured graph, and the end of its last replay."""

    def __init__(self, graph: Any, place: torch.device) -> None:
        self.graph = graph
        self.place = place
        self.done: NpuEvent | None = None

    def update(self, contexts: Sequence[int]) -> None:
        """Give every attention of the graph the next step's context lengths.

        Raises:
            TransportTimeout: the last replay did not end.
        """
        if self.done is not None:
            self.done.wait(REPLAY_S)
        self.graph.update(cpu_update_input=[{"actual_seq_lengths_kv": list(contexts)}])

    def replay(self) -> None:
        """Queue the captured work again."""
        self.graph.replay()
        self.done = NpuEvent(self.place, what="a graph")


class OnCard:
    """Captures work on one device, whichever device the calling thread has as its current one.

    torch_npu's own capture stream belongs to the device that was current when the process first
    captured. Other threads may allocate and look at events meanwhile.
    """

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self._side: Any = None

    def __call__(self, work: Callable[[], Named]) -> tuple[AclGraph, Named]:
        """Return the graph of ``work`` and the arrays that it fills."""
        npu = driver.module()
        with npu.device(self.place):
            self._side = self._side or npu.Stream(self.place)
            current, side = npu.current_stream(self.place), self._side
            side.wait_stream(current)
            with npu.stream(side):
                for _ in range(WARM_UPS):
                    work()
            current.wait_stream(side)
            graph = npu.NPUGraph()
            with npu.graph(graph, stream=side, auto_dispatch_capture=True,
                           capture_error_mode="thread_local"):  # fmt: skip
                results = work()
        return AclGraph(graph, self.place), results


class DecodeBatch(att.Batch):
    """A decoding batch in arrays that stay where they are, refilled before each step.

    Rows beyond the batch stand for sequences of one token in the cache's spare block.
    """

    def __init__(self, bucket: int, blocks_per_seq: int, spare: int, device: torch.device) -> None:
        rows = np.arange(bucket, dtype=np.int32)
        self.bucket = bucket
        self.spare = spare
        self.spare_slots = spare * LOGICAL_BLOCK + rows % LOGICAL_BLOCK
        self.tables = torch.full((bucket, blocks_per_seq), spare, dtype=torch.int32).to(device)
        self.contexts = [1] * bucket
        blank = BatchMeta(rows * 0, self.spare_slots, np.arange(bucket + 1, dtype=np.int32),
                          rows * 0 + 1, np.full((bucket, 1), spare, np.int32))  # fmt: skip
        super().__init__(blank, device)

    @cached_property
    def groups(self) -> list[att.Group]:
        """Return all rows as one group, its table as wide as any context needs."""
        return [att.Group(slice(0, self.bucket), self.tables, self.contexts, 1, 1)]

    def fill(self, meta: BatchMeta) -> None:
        """Take in the next step's batch."""
        if self.meta is meta:
            return
        att.check_last(meta, np.diff(meta.query_starts))
        limits.positions(int(meta.positions.max()))
        self.contexts[:] = [*map(int, meta.context_lens), *[1] * (self.bucket - meta.seqs)]
        limits.kv_lengths(self.contexts, self.bucket, 1)
        slots = self._slots(meta)
        refill(self.positions, meta.positions, 0)
        refill(self.slots, slots, 0)
        refill(self.tables, meta.block_tables, 0)
        self.tables[meta.seqs :].fill_(self.spare)
        for kv_heads, held in self._scale_places.items():
            refill(held, att.places(slots.astype(np.int64), kv_heads), 0)
        for key, turned in self._angles.items():
            for held, new in zip(turned, looked_up(self.positions, *key), strict=True):
                held.copy_(new)
        self.meta = meta

    def _slots(self, meta: BatchMeta) -> HostArray:
        """Return the rows' slots, those of padding in the spare block. Shapes: -> (bucket,)."""
        return np.concatenate((meta.slots, self.spare_slots[meta.tokens :]))

    def scale_places(self, kv_heads: int) -> Tensor:
        """Return where the rows' scales lie, those of padding in the spare block."""
        if kv_heads not in self._scale_places:
            found = att.places(self._slots(self.meta).astype(np.int64), kv_heads)
            self._scale_places[kv_heads] = torch.from_numpy(found).to(self.device)
        return self._scale_places[kv_heads]


class AclGraphedStage(GraphedStage):
    """A stage whose decode steps are replayed; its attention gets each step's context lengths."""

    def refresh(self, step: Step) -> None:
        """See ``AclGraph.update``; an FFN holds no lengths."""
        batch = getattr(self.inner, "batch", None)
        if isinstance(batch, DecodeBatch):
            step.graph.update(batch.contexts)


def graphed(
    stage: AscendAttention | AscendFfn,
    bounds: Limits,
    batches: dict[tuple[int, int], DecodeBatch],
    capture: OnCard,
) -> AclGraphedStage:
    """Return ``stage`` with its decode steps as graphs. ``batches`` belongs to the device.

    Raises:
        LimitExceeded: attention in float32, whose composition follows each step's contexts.
    """
    if isinstance(stage, AscendFfn):
        return AclGraphedStage(stage, bounds, None, capture, LARGEST_BUCKET)
    limits.graph_dtype(stage.spec.dtype)
    spare, place = stage.cache.spec.blocks, stage.cache.k.device
    found = partial(_batch_for, batches, bounds.blocks_per_seq, spare, place)
    return AclGraphedStage(stage, bounds, found, capture, LARGEST_BUCKET)


def _batch_for(
    batches: dict[tuple[int, int], DecodeBatch],
    blocks_per_seq: int,
    spare: int,
    place: torch.device,
    bucket: int,
) -> DecodeBatch:
    key = (bucket, spare)
    if key not in batches:
        batches[key] = DecodeBatch(bucket, blocks_per_seq, spare, place)
    return batches[key]


_updated: list[int] = []
"""The device whose graphs this process updates: torch_npu has one stream to update them on
(``_GraphDispatchMode.update_stream``, of the device that was current at the first capture)."""


def check_runtime(index: int) -> None:
    """Refuse the option where graphs cannot be captured, or not on device ``index``.

    Raises:
        PlacementError: naming what is missing, or the device that has graphs in this process.
    """
    if reason := why_unavailable():
        raise PlacementError(f"backend ascend, option graphs: {reason}; leave the option off")
    if _updated and _updated != [index]:
        raise PlacementError(
            f"backend ascend, option graphs: ascend:{index} refused beside ascend:{_updated[0]}; "
            "torch_npu updates the graphs of one device a process: give each role a process of its "
            "own, or leave the option off"
        )
    _updated[:] = [index]
