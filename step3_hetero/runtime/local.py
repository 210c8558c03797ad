"""The executor of one process: every stage runs here, on the device its role names."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from step3_hetero.backend import Array, BatchMeta, Device, KVCache
from step3_hetero.graph import Edge, StageGraph
from step3_hetero.runtime.executor import Executor, LoadedStage, Observer
from step3_hetero.runtime.microbatch import (
    BatchResult,
    ImagePart,
    Landed,
    MicroBatch,
    StageClock,
    Ticket,
    row_logprobs,
)
from step3_hetero.specs import Limits

Wires = dict[str, dict[str, Array]]
"""Inputs gathered so far: stage, tensor name, array on that stage's device."""


class LocalExecutor(Executor):
    """Runs the stages one after another; arrays cross devices through host memory."""

    def __init__(
        self,
        graph: StageGraph,
        stages: Mapping[str, LoadedStage],
        caches: Sequence[KVCache],
        limits: Limits,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.limits = limits
        self.kv_blocks = caches[0].spec.blocks
        self.clock = StageClock()
        self._stages = stages
        self._order = [stages[s.name] for s in graph.stages if s.kind not in ("vision", "head")]
        self._head = stages["head"]
        self._vision = stages.get("vision")
        self._caches = caches
        self.observers = observers
        self._out: dict[str, list[Edge]] = {s.name: [] for s in graph.stages}
        for edge in graph.edges:
            self._out[edge.source].append(edge)
        self._landed: deque[Landed] = deque()
        self._images: dict[int, Array] = {}
        self._submitted = 0

    def submit(self, batch: MicroBatch, instance: int = 0) -> Ticket:
        """Run the micro-batch at once; its result waits for ``collect``."""
        self._submitted += 1
        ticket = Ticket(self._submitted)
        self._landed.append(Landed(ticket, self._run(batch)))
        return ticket

    def collect(self, deadline_s: float | None = None) -> Landed:
        """Return the oldest result."""
        return self._landed.popleft()

    def forget_image(self, key: int, instance: int = 0) -> None:
        """Drop the rows of an image."""
        self._images.pop(key, None)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], instance: int = 0) -> None:
        """Copy logical KV blocks in every layer."""
        for cache in self._caches:
            cache.copy_blocks(pairs)

    def close(self) -> None:
        """Forget results and images; devices go with the last reference."""
        self._landed.clear()
        self._images.clear()

    def _run(self, batch: MicroBatch) -> BatchResult:
        wires: Wires = {"embed": self._embed_inputs(batch)}
        for loaded in self._order:
            loaded.stage.plan(batch.meta)
            outputs = self._call(loaded, batch.meta, wires.pop(loaded.node.name))
            self._deliver(loaded, outputs, wires)
        if len(batch.rows) == 0:
            return BatchResult(batch.rows, ())
        return self._choose(batch, wires["head"])

    def _call(
        self, loaded: LoadedStage, meta: BatchMeta | None, inputs: dict[str, Array]
    ) -> Mapping[str, Array]:
        for observer in self.observers:
            observer.before(loaded, meta, inputs)
        start = time.perf_counter()
        outputs = loaded.stage.run(inputs)
        seconds = time.perf_counter() - start
        self.clock.add(loaded.role, loaded.node.kind, seconds)
        for observer in self.observers:
            observer.after(loaded, outputs, seconds)
        return outputs

    def _deliver(self, loaded: LoadedStage, outputs: Mapping[str, Array], wires: Wires) -> None:
        """Put a stage's outputs where its edges lead."""
        for edge in self._out[loaded.node.name]:
            target = self._stages[edge.target].device
            inputs = wires.setdefault(edge.target, {})
            for tensor in edge.tensors:
                inputs[tensor.name] = move(outputs[tensor.name], loaded.device, target)

    def _embed_inputs(self, batch: MicroBatch) -> dict[str, Array]:
        device = self._stages["embed"].device
        inputs = {"token_ids": device.from_host(batch.token_ids)}
        if batch.images:
            parts = [self._image_rows(part)[part.start : part.stop] for part in batch.images]
            inputs["image_rows"] = device.kernel("concat")(*parts)
            index = np.concatenate([part.index for part in batch.images])
            inputs["image_index"] = device.from_host(index)
        return inputs

    def _image_rows(self, part: ImagePart) -> Array:
        """Return an image's rows on the embedding's device, through the tower the first time."""
        if part.pixels is not None and part.key not in self._images:
            loaded = self._vision
            assert loaded is not None, "the engine refuses images for a model that cannot see"
            pixels = [loaded.device.from_host(p, loaded.node.spec.dtype) for p in part.pixels]
            seen = [self._call(loaded, None, {"pixels": p})["rows"] for p in pixels]
            rows = loaded.device.kernel("concat")(*seen)
            self._images[part.key] = move(rows, loaded.device, self._stages["embed"].device)
        return self._images[part.key]

    def _choose(self, batch: MicroBatch, inputs: dict[str, Array]) -> BatchResult:
        device = self._head.device
        inputs["rows"] = device.from_host(batch.rows)
        self._head.stage.plan(batch.meta)
        logits = self._call(self._head, batch.meta, inputs)["logits"]
        c = batch.choice
        draws = (device.from_host(a) for a in (c.temperature, c.top_k, c.top_p, c.uniform))
        ids = device.to_host(device.kernel("sample")(logits, *draws, banned=c.banned))
        if not batch.want_logits and all(n is None for n in batch.logprobs):
            return BatchResult(ids, [None] * len(ids))
        host = device.to_host(logits)
        reported = [
            None if top is None else row_logprobs(row, int(chosen), top)
            for row, chosen, top in zip(host, ids, batch.logprobs, strict=True)
        ]
        return BatchResult(ids, reported, host if batch.want_logits else None)


def move(x: Array, source: Device, target: Device) -> Array:
    """Return ``x`` in the memory of ``target``; on one device it is the same array."""
    return x if source is target else target.from_host(source.to_host(x))
