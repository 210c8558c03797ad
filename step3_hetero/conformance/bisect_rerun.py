"""A run that the shadow check kept, run again on the backend that a config gives its stage to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from step3_hetero.backend import BatchMeta
from step3_hetero.conformance.bisect_ops import guilty, insides, try_ops
from step3_hetero.conformance.bisect_replay import Replay, check_replay
from step3_hetero.conformance.bisect_run import Subject
from step3_hetero.conformance.bisect_stage import HostStage, cache_of, expect_run
from step3_hetero.conformance.bisect_verdict import look_twice
from step3_hetero.conformance.trial import reference
from step3_hetero.errors import RequestError
from step3_hetero.graph import GraphStage
from step3_hetero.runtime.loader import stage_weights
from step3_hetero.specs import Limits


@dataclass(frozen=True)
class ReplayReport:
    """A recorded run, run again: what was beyond its bound then (``recorded``) and is now."""

    stage: str
    backend: str
    recorded: tuple[str, ...]
    again: tuple[str, ...]
    op: str | None

    def sentence(self) -> str:
        """Return the verdict."""
        then = "beyond its bound as recorded" if self.recorded else "within its bound as recorded"
        if not self.again:
            return f"{self.stage}: {then}, within it on {self.backend}"
        what = f"op {self.op}" if self.op else "the fused stage; its ops alone are within bounds"
        return f"{self.stage}: {then}, and beyond it on {self.backend}: {what} ({self.again[0]})"


def rerun(subject: Subject, replay: Replay) -> ReplayReport:
    """Run a shadow check's replay file again on the backend that the config gives the stage to.

    Raises:
        ConformanceError: the model or its weights are not those recorded.
        RequestError: the model has no such stage.
    """
    nodes: Mapping[str, GraphStage] = {s.name: s for s in subject.stages}
    if replay.stage not in nodes:
        raise RequestError(f"the model has no stage {replay.stage!r}; was the file recorded here?")
    node = nodes[replay.stage]
    check_replay(replay, node, subject.source)
    role, device, weight_format = subject.devices[node.name]
    own = stage_weights(reference(), node, subject.source, weight_format)
    weights = stage_weights(device, node, subject.source, weight_format)
    cache = cache_of(device, replay.run, node.spec, node.spec.dtype)
    stage = device.build(node.spec, weights, cache, _limits(replay.run.meta))
    again = HostStage(device, stage, cache).outcome(replay.run.meta, replay.run.inputs).results
    with np.errstate(all="ignore"):
        expected = expect_run(node.spec, own, replay.run)
        then, now = (
            look_twice(node.spec, own, replay.run, expected, got) for got in (replay.outputs, again)
        )
        named = None
        if now.excesses:
            inside = insides(stage, device, lambda: weights)
            ops = try_ops(node.spec, own, replay.run, *inside)
            named = guilty(ops)
    backend = subject.placement.roles[role].backend.name
    recorded, said = (tuple(e.said for e in v.excesses) for v in (then, now))
    return ReplayReport(node.name, backend, recorded, said, named.label if named else None)


def _limits(meta: BatchMeta | None) -> Limits:
    if meta is None:
        return Limits(1, 1, 1)
    return Limits(meta.tokens, meta.seqs, meta.block_tables.shape[1])
