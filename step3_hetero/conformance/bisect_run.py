"""One request in several chains at once: the trusted one in float64, and those that run freely.

The trusted chain chooses the tokens, so that the steps of all chains stay comparable. It computes
in float64 with every edge rounded to the activations' dtype: what a stage gets is then exactly what
the suspect's stage can be given. The engine drives it, chunk by chunk and token by token, as it
always does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from step3_hetero.backend import Array, BatchMeta, Device, KVCache
from step3_hetero.conformance.bisect_stage import (
    HostStage,
    Outcome,
    Prepared,
    reference_stage,
    rounded_to,
    written,
)
from step3_hetero.conformance.routing import RouteSpy
from step3_hetero.conformance.tolerance import row_nmse
from step3_hetero.conformance.trial import Results, reference
from step3_hetero.graph import GraphStage
from step3_hetero.model.config import ModelConfig
from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.engine import Progress
from step3_hetero.runtime.executor import Executor, LoadedStage
from step3_hetero.runtime.loader import open_cache, stage_weights
from step3_hetero.runtime.local import LocalExecutor
from step3_hetero.runtime.microbatch import Landed, MicroBatch, Ticket
from step3_hetero.runtime.placing import Placement
from step3_hetero.runtime.prompting import Prompter
from step3_hetero.specs import HostArray, TensorSource

MAIN = {"embed": "x", "attention": "x", "ffn": "y", "head": "logits"}
"""The output of each kind of stage that its error is measured by."""


@dataclass(frozen=True)
class Subject:
    """A placed model as the engine runs it. ``devices``: by stage: role, device, weight format."""

    model: ModelConfig
    placement: Placement
    devices: Mapping[str, tuple[str, Device, str]]
    source: TensorSource
    prompter: Prompter
    max_batch: int
    prefill_chunk: int

    @property
    def stages(self) -> Sequence[GraphStage]:
        """Return the stages in the order in which they run."""
        return self.placement.graph.stages

    def of_role(self, role: str) -> list[GraphStage]:
        """Return the stages of one role, in order."""
        return [s for s in self.stages if self.devices[s.name][0] == role]


@dataclass(frozen=True, eq=False)
class Recorded:
    """One run of one stage of the trusted chain: its inputs in the stage's dtype, what it gave."""

    step: int
    meta: BatchMeta | None
    inputs: Mapping[str, HostArray]
    exact: Outcome


class Recorder:
    """Keeps every run of the trusted chain's stages since it was last emptied."""

    def __init__(self, spy: RouteSpy) -> None:
        self.runs: dict[str, list[Recorded]] = {}
        self.latest: dict[str, Results] = {}
        self.step = 0
        self._spy = spy
        self._given: tuple[BatchMeta | None, dict[str, HostArray]] = (None, {})

    def before(
        self, loaded: LoadedStage, meta: BatchMeta | None, inputs: Mapping[str, Array]
    ) -> None:
        """Copy the inputs."""
        dtype = loaded.node.spec.dtype
        self._given = meta, {n: rounded_to(np.array(x), dtype) for n, x in inputs.items()}

    def after(self, loaded: LoadedStage, outputs: Mapping[str, Array], seconds: float) -> None:
        """Keep the run, with the logits its router saw and the keys it wrote."""
        meta, inputs = self._given
        logits = self._spy.logits.pop() if self._spy.logits else None
        results = dict(outputs) | written(loaded.cache, meta)
        run = Recorded(self.step, meta, inputs, Outcome(results, logits))
        self.runs.setdefault(loaded.node.name, []).append(run)
        self.latest[loaded.node.name] = results

    def take(self) -> dict[str, list[Recorded]]:
        """Return the runs kept, and keep them no longer."""
        runs, self.runs = self.runs, {}
        return runs

    @property
    def rows(self) -> int:
        """Return the tokens whose runs are kept."""
        return sum(r.meta.tokens for r in self.runs.get("embed", []) if r.meta is not None)


@dataclass
class Growth:
    """How far a free-running chain is from the trusted one, stage by stage.

    ``squared`` sums, by stage, the squared relative error of every row.
    """

    trusted: Recorder
    squared: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def before(
        self, loaded: LoadedStage, meta: BatchMeta | None, inputs: Mapping[str, Array]
    ) -> None:
        """Nothing is to be seen yet."""

    def after(self, loaded: LoadedStage, outputs: Mapping[str, Array], seconds: float) -> None:
        """Hold the stage's main output against the trusted chain's in the same step."""
        name = loaded.node.name
        main = MAIN.get(loaded.node.kind)
        if main is None or name not in self.trusted.latest:
            return
        want = self.trusted.latest[name][main].astype(np.float64)
        errors = row_nmse(outputs[main].astype(np.float64), want)
        self.squared[name] = self.squared.get(name, 0.0) + float(errors.sum())
        self.rows[name] = self.rows.get(name, 0) + len(errors)

    def relative(self, name: str) -> float | None:
        """Return the root mean square of a stage's relative row errors; None if not finite."""
        if not self.rows.get(name):
            return None
        value = float(np.sqrt(self.squared[name] / self.rows[name]))
        return value if np.isfinite(value) else None


class Chains(Executor):
    """Runs each micro-batch through the trusted chain, then through the others."""

    def __init__(
        self, trusted: LocalExecutor, others: Sequence[LocalExecutor], recorder: Recorder
    ) -> None:
        self.limits = trusted.limits
        self.kv_blocks = trusted.kv_blocks
        self.clock = StageClock()
        self.recorder = recorder
        self._trusted = trusted
        self._others = others

    def submit(self, batch: MicroBatch, instance: int = 0) -> Ticket:
        """Run the batch everywhere; the trusted result alone is given out."""
        ticket = self._trusted.submit(batch)
        for other in self._others:
            other.submit(batch)
            other.collect()
        self.recorder.step += 1
        return ticket

    def collect(self, deadline_s: float | None = None) -> Landed:
        """Return the trusted chain's oldest result."""
        return self._trusted.collect(deadline_s)

    def forget_image(self, key: int, instance: int = 0) -> None:
        """Drop an image everywhere."""
        for chain in (self._trusted, *self._others):
            chain.forget_image(key)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]], instance: int = 0) -> None:
        """Copy blocks everywhere."""
        for chain in (self._trusted, *self._others):
            chain.copy_blocks(pairs)

    def close(self) -> None:
        """Release every chain."""
        for chain in (self._trusted, *self._others):
            chain.close()


@dataclass(frozen=True, eq=False)
class Loaded:
    """A stage's weights on the reference, and on its own device if it is a suspect."""

    node: GraphStage
    reference: Prepared
    own: Prepared | None


def load_weights(subject: Subject, role: str, advance: Progress | None = None) -> list[Loaded]:
    """Prepare the weights of every stage for the reference, the suspects' for their device too."""
    device, loaded = reference(), []
    for done, node in enumerate(subject.stages):
        owner, suspect, weight_format = subject.devices[node.name]
        own = None
        if owner == role:
            own = stage_weights(suspect, node, subject.source, weight_format)
        weights = stage_weights(device, node, subject.source, weight_format)
        loaded.append(Loaded(node, weights, own))
        if advance is not None:
            advance(done + 1, len(subject.stages))
    return loaded


def suspect_stage(subject: Subject, loaded: Loaded, blocks: int) -> HostStage:
    """Build a stage as its own device builds it, with a cache of its own."""
    assert loaded.own is not None
    device, spec = subject.devices[loaded.node.name][1], loaded.node.spec
    cache = open_cache(device, loaded.node, blocks)
    limits = subject.placement.limits
    return HostStage(device, device.build(spec, loaded.own, cache, limits), cache)


def stage_in(device: Device, loaded: Loaded, dtype: str, blocks: int) -> HostStage:
    """Build a stage on the reference in ``dtype``, with a cache of its own."""
    cache = cache_in(device, loaded.node, dtype, blocks)
    return reference_stage(device, loaded.node.spec, dtype, loaded.reference, cache)


def cache_in(device: Device, node: GraphStage, dtype: str, blocks: int) -> KVCache | None:
    """Open a stage's cache in ``dtype``; None where it has none."""
    return open_cache(device, replace(node, spec=replace(node.spec, dtype=dtype)), blocks)


@contextmanager
def chains(
    subject: Subject, loaded: Sequence[Loaded], blocks: int
) -> Iterator[tuple[Chains, Growth, Growth]]:
    """Build the chains: the trusted one, the suspect running freely, the reference in its place.

    Yields the executor and how far the suspect's and the reference's chain are from the trusted.
    """
    exact = reference()
    with RouteSpy(exact) as spy:
        recorder = Recorder(spy)
        suspect, own = Growth(recorder), Growth(recorder)
        in_float64 = {one.node.name: stage_in(exact, one, "float64", blocks) for one in loaded}
        trusted = _executor(subject, loaded, in_float64, recorder)
        others = [
            _executor(subject, loaded, _mixed(subject, loaded, blocks, live), growth)
            for live, growth in ((True, suspect), (False, own))
        ]
        yield Chains(trusted, others, recorder), suspect, own


def _mixed(
    subject: Subject, loaded: Sequence[Loaded], blocks: int, live: bool
) -> dict[str, HostStage]:
    """Return the stages of a free chain: suspects or the reference for them; float64 beside."""
    device = reference()
    stages = {}
    for one in loaded:
        if one.own is None:
            stage = stage_in(device, one, "float64", blocks)
        elif live:
            stage = suspect_stage(subject, one, blocks)
        else:
            stage = stage_in(device, one, one.node.spec.dtype, blocks)
        stages[one.node.name] = stage
    return stages


def _executor(
    subject: Subject,
    loaded: Sequence[Loaded],
    stages: Mapping[str, HostStage],
    observer: Recorder | Growth,
) -> LocalExecutor:
    """Return an executor over stages that take and give host arrays."""
    host = reference()
    placed = {
        one.node.name: LoadedStage(
            one.node,
            stages[one.node.name],
            host,
            subject.devices[one.node.name][0],
            stages[one.node.name].cache,
        )
        for one in loaded
    }
    caches = [s.cache for s in stages.values() if s.cache is not None]
    graph, limits = subject.placement.graph, subject.placement.limits
    return LocalExecutor(graph, placed, caches, limits, [observer])
