"""A micro-batch's way through the stages, with pauses where a stage runs somewhere else."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from step3_hetero.backend import Array, BatchMeta, Device
from step3_hetero.composed import copied
from step3_hetero.emulate.link import travel
from step3_hetero.graph import Edge, GraphStage, StageGraph
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.executor import LoadedStage, Observer
from step3_hetero.runtime.microbatch import BatchResult, ImagePart, MicroBatch, row_logprobs
from step3_hetero.runtime.timeline import Timeline

SAMPLE = "sample"
"""Kind of the work that chooses tokens from the head's logits."""

KINDS = ("embed", "attention", "ffn", "vision", "head", SAMPLE)
"""Kinds of work that a device does, not an edge."""

Wires = dict[str, dict[str, Array]]
"""Inputs gathered so far: stage, tensor name, array on the device where that stage is called."""

Named = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Call:
    """A stage that is not here, and what it is to get: arrays on the program's home device."""

    node: GraphStage
    inputs: Named


Pass = Generator[Call, Named, BatchResult]
"""Yields calls, wants each one's outputs on the home device, and returns the result."""


class Program:
    """Runs the stages that are here in the graph's order and asks for those that are not.

    ``home`` is the device of the embedding; arrays of stages elsewhere leave from it and arrive on
    it. Embedding and head are here.
    """

    def __init__(
        self,
        graph: StageGraph,
        stages: Mapping[str, LoadedStage],
        clock: StageClock,
        observers: Sequence[Observer] = (),
        timeline: Timeline | None = None,
    ) -> None:
        self.timeline = timeline
        self.home = stages["embed"].device
        self.clock = clock
        self.observers = observers
        self._stages = stages
        self._order = [s for s in graph.stages if s.kind not in ("vision", "head")]
        self._vision = graph.by_name.get("vision")
        self._head = stages["head"]
        self._takes = {s.name: {t.name: t.dtype for t in s.takes} for s in graph.stages}
        self._out: dict[str, list[Edge]] = {s.name: [] for s in graph.stages}
        for edge in graph.edges:
            self._out[edge.source].append(edge)
        self._images: dict[int, Array] = {}

    def run(self, batch: MicroBatch) -> Pass:
        """Begin one micro-batch."""
        wires: Wires = {"embed": (yield from self._embed_inputs(batch))}
        for node in self._order:
            inputs = wires.pop(node.name)
            if node.name not in self._stages:
                self._keep(wires)
            outputs = yield from self._call(node, batch.meta, inputs)
            self._deliver(node, outputs, wires)
        if len(batch.rows) == 0:
            return BatchResult(batch.rows, ())
        return self._choose(batch, wires["head"])

    def forget_image(self, key: int) -> None:
        """Drop the rows of an image."""
        self._images.pop(key, None)

    def forget(self) -> None:
        """Drop the rows of every image."""
        self._images.clear()

    def _call(
        self, node: GraphStage, meta: BatchMeta | None, inputs: dict[str, Array]
    ) -> Generator[Call, Named, Named]:
        loaded = self._stages.get(node.name)
        if loaded is None:
            return (yield Call(node, inputs))
        if meta is not None:
            loaded.stage.plan(meta)
        return self._here(loaded, meta, inputs)

    def _here(self, loaded: LoadedStage, meta: BatchMeta | None, inputs: dict[str, Array]) -> Named:
        for observer in self.observers:
            observer.before(loaded, meta, inputs)
        start = time.monotonic()
        outputs = loaded.stage.run(inputs)
        seconds = self._note(loaded.role, loaded.node.kind, loaded.node.name, start)
        for observer in self.observers:
            observer.after(loaded, outputs, seconds)
        return outputs

    def _note(self, role: str, kind: str, stage: str, start_s: float) -> float:
        """Count what began at ``start_s`` and has just ended; return its seconds."""
        end_s = time.monotonic()
        self.clock.add(role, kind, end_s - start_s)
        if self.timeline is not None:
            self.timeline.add(kind, stage, start_s, end_s, role=role)
        return end_s - start_s

    def _deliver(self, node: GraphStage, outputs: Named, wires: Wires) -> None:
        """Put a stage's outputs where its edges lead."""
        for edge in self._out[node.name]:
            inputs = wires.setdefault(edge.target, {})
            source, target = self._device(node.name), self._device(edge.target)
            carried = {t.name: outputs[t.name] for t in edge.tensors}
            inputs.update(move(carried, source, target))

    def _keep(self, wires: Wires) -> None:
        """Copy what waits: other passes run the same stages during a pause, over their results."""
        for target, inputs in wires.items():
            device, dtypes = self._device(target), self._takes[target]
            inputs.update({name: copied(device, x, dtypes[name]) for name, x in inputs.items()})

    def _device(self, stage: str) -> Device:
        loaded = self._stages.get(stage)
        return self.home if loaded is None else loaded.device

    def _embed_inputs(self, batch: MicroBatch) -> Generator[Call, Named, dict[str, Array]]:
        inputs = {"token_ids": self.home.from_host(batch.token_ids)}
        if batch.images:
            parts = []
            for part in batch.images:
                rows = yield from self._image_rows(part)
                parts.append(rows[part.start : part.stop])
            inputs["image_rows"] = self.home.kernel("concat")(*parts)
            index = np.concatenate([part.index for part in batch.images])
            inputs["image_index"] = self.home.from_host(index)
        return inputs

    def _image_rows(self, part: ImagePart) -> Generator[Call, Named, Array]:
        """Return an image's rows on the home device, through the tower the first time."""
        if part.pixels is not None and part.key not in self._images:
            node = self._vision
            assert node is not None, "the engine refuses images for a model that cannot see"
            device, seen = self._device("vision"), []
            for pixels in part.pixels:
                x = device.from_host(pixels, node.spec.dtype)
                outputs = yield from self._call(node, None, {"pixels": x})
                seen.append(outputs["rows"])
            rows = device.kernel("concat")(*seen)
            self._images[part.key] = move({"rows": rows}, device, self.home)["rows"]
        return self._images[part.key]

    def _choose(self, batch: MicroBatch, inputs: dict[str, Array]) -> BatchResult:
        device = self._head.device
        inputs["rows"] = device.from_host(batch.rows)
        self._head.stage.plan(batch.meta)
        logits = self._here(self._head, batch.meta, inputs)["logits"]
        c = batch.choice
        start = time.monotonic()
        draws = (device.from_host(a) for a in (c.temperature, c.top_k, c.top_p, c.uniform))
        ids = device.to_host(device.kernel("sample")(logits, *draws, banned=c.banned))
        self._note(self._head.role, SAMPLE, "head", start)
        if not batch.want_logits and all(n is None for n in batch.logprobs):
            return BatchResult(ids, [None] * len(ids))
        host = device.to_host(logits)
        reported = [
            None if top is None else row_logprobs(row, int(chosen), top)
            for row, chosen, top in zip(host, ids, batch.logprobs, strict=True)
        ]
        return BatchResult(ids, reported, host if batch.want_logits else None)


def move(named: Named, source: Device, target: Device) -> Named:
    """Return an edge's arrays in the memory of ``target``; on one device they are the same."""
    if source is target:
        return named
    hosts = {name: source.to_host(x) for name, x in named.items()}
    travel(source, target, sum(x.nbytes for x in hosts.values()))
    return {name: target.from_host(x) for name, x in hosts.items()}
