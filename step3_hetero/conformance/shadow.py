"""The shadow check: in production, one run of a stage in N is run again beside the live one.

Deterministic: of N = round(1 / sample) consecutive runs of any one stage exactly one is checked, so
that a defect that shows in every run of a stage is seen within N of them. The phases are spread
over the stages, so that no step bears all the checks. A check runs in the request's own time, on
the host: the reference once in float64 and twice in the stage's dtype.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from step3_hetero.backend import Array, BatchMeta, Device
from step3_hetero.conformance.bisect_replay import Replay, spec_json, weight_digests, write_replay
from step3_hetero.conformance.bisect_stage import (
    HostStage,
    Prepared,
    StageRun,
    cache_of,
    compact,
    expect_run,
    written,
)
from step3_hetero.conformance.bisect_verdict import Verdict, look_twice
from step3_hetero.conformance.trial import Results, host_results, reference
from step3_hetero.graph import GraphStage, StageGraph
from step3_hetero.runtime.executor import LoadedStage
from step3_hetero.runtime.loader import stage_weights
from step3_hetero.specs import Limits, TensorSource

HELD_BYTES = 1 << 30
"""Weights of the stages checked last are kept up to 1 GiB; a larger stage is loaded each time."""

MOST_FILES = 16
"""Replay files of one engine, one for each stage: more would say the same again."""


@dataclass
class StageTally:
    """What became of one stage's runs. ``worst`` is squared error as a part of what is allowed."""

    phase: int
    runs: int = 0
    checks: int = 0
    excesses: int = 0
    flips: int = 0
    worst: float = 0.0
    said: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return what a report prints."""
        return {
            "runs": self.runs,
            "checks": self.checks,
            "excesses": self.excesses,
            "flips": self.flips,
            "worst": self.worst if np.isfinite(self.worst) else None,
            "said": self.said,
        }


@dataclass(frozen=True, eq=False)
class _Pending:
    """A run that is being checked: what it was given, and its batch in the live cache's slots."""

    run: StageRun
    meta: BatchMeta | None
    number: int


class ShadowCheck:
    """An observer that runs stages again. ``peer`` is another backend's device to compare with.

    Without a peer an output may err by what the reference's own rounding explains. With one it is
    held against the peer's, the bound still being the reference's, once for each of the two.
    """

    def __init__(
        self,
        graph: StageGraph,
        source: TensorSource,
        weight_formats: Mapping[str, str],
        sample: float,
        folder: Path,
        *,
        peer: Device | None = None,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.interval = max(1, round(1 / sample))
        self.folder = folder
        self.files: list[str] = []
        self.unwritten: list[str] = []
        self._source = source
        self._formats = weight_formats
        self._peer = peer
        self._held_bytes = held_bytes
        self._held: OrderedDict[str, tuple[Prepared, Prepared | None]] = OrderedDict()
        names = [s.name for s in graph.stages]
        self.tallies = {n: StageTally(i * self.interval // len(names)) for i, n in enumerate(names)}
        self._pending: _Pending | None = None

    def before(
        self, loaded: LoadedStage, meta: BatchMeta | None, inputs: Mapping[str, Array]
    ) -> None:
        """Count the run; if it is to be checked, copy its inputs and the blocks it will read."""
        tally = self.tallies[loaded.node.name]
        number, tally.runs = tally.runs, tally.runs + 1
        self._pending = None
        if (number + tally.phase) % self.interval:
            return
        given = {n: loaded.device.to_host(x) for n, x in inputs.items()}
        history, moved = None, meta
        if loaded.cache is not None and meta is not None:
            blocks, moved = compact(meta)
            history = loaded.cache.read(blocks)
        self._pending = _Pending(StageRun(moved, given, history), meta, number)

    def after(self, loaded: LoadedStage, outputs: Mapping[str, Array], seconds: float) -> None:
        """Check the run that ``before`` chose."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        got = host_results(loaded.device, outputs) | written(loaded.cache, pending.meta)
        with np.errstate(all="ignore"):
            found = self._judge(loaded.node, pending.run, got)
        self._count(loaded.node, pending, got, found)

    def report(self) -> dict[str, Any]:
        """Return counts and the worst figure, in all and by stage that was checked."""
        tallies = self.tallies
        worst = max((t.worst for t in tallies.values()), default=0.0)
        return {
            "backend": self._peer.info.name if self._peer else "reference",
            "one_in": self.interval,
            "checks": sum(t.checks for t in tallies.values()),
            "excesses": sum(t.excesses for t in tallies.values()),
            "flips": sum(t.flips for t in tallies.values()),
            "worst": worst if np.isfinite(worst) else None,
            "files": list(self.files),
            "unwritten": list(self.unwritten),
            "stages": {n: t.to_json() for n, t in tallies.items() if t.checks},
        }

    def sentence(self) -> str:
        """Return the report as one line."""
        r = self.report()
        bad = [n for n, t in self.tallies.items() if t.excesses]
        start = f"shadow check: {r['checks']} runs checked against {r['backend']}"
        flips = f", {r['flips']} routing flips within rounding" if r["flips"] else ""
        if not bad:
            return f"{start}, none beyond rounding{flips}"
        kept = f"; {len(self.files)} kept in {self.folder} (at most {MOST_FILES})"
        lost = f"; not written: {self.unwritten[0]}" if self.unwritten else ""
        return f"{start}, {r['excesses']} beyond rounding, in {', '.join(bad)}{flips}{kept}{lost}"

    def _judge(self, node: GraphStage, run: StageRun, got: Results) -> Verdict:
        weights, peers = self._weights(node)
        expected = expect_run(node.spec, weights, run)
        peer = None if peers is None else self._on_peer(node, peers, run)
        return look_twice(node.spec, weights, run, expected, got, peer)

    def _on_peer(self, node: GraphStage, weights: Prepared, run: StageRun) -> Results:
        peer = self._peer
        assert peer is not None
        cache = cache_of(peer, run, node.spec, node.spec.dtype)
        meta = run.meta
        limits = Limits(1, 1, 1)
        if meta is not None:
            limits = Limits(meta.tokens, meta.seqs, meta.block_tables.shape[1])
        stage = HostStage(peer, peer.build(node.spec, weights, cache, limits), cache)
        return stage.outcome(meta, run.inputs).results

    def _weights(self, node: GraphStage) -> tuple[Prepared, Prepared | None]:
        """Return a stage's weights on the reference and the peer, prepared when first needed."""
        if node.name not in self._held:
            weight_format = self._formats[node.name]
            own = stage_weights(reference(), node, self._source, weight_format)
            peers = None
            if self._peer is not None:
                peers = stage_weights(self._peer, node, self._source, weight_format)
            self._held[node.name] = own, peers
        self._held.move_to_end(node.name)
        found = self._held[node.name]
        while self._held and self.held_bytes > self._held_bytes:
            self._held.popitem(last=False)
        return found

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the weights kept."""
        sets = [s for pair in self._held.values() for s in pair if s is not None]
        return sum(int(w.nbytes) for weights in sets for w in weights.values())

    def _count(self, node: GraphStage, pending: _Pending, got: Results, found: Verdict) -> None:
        tally = self.tallies[node.name]
        tally.checks += 1
        tally.flips += len(found.flips)
        tally.worst = max(tally.worst, found.worst)
        if not found.excesses:
            return
        tally.excesses += 1
        if tally.excesses == 1:
            tally.said += [e.said for e in found.excesses]
            if len(self.files) < MOST_FILES:
                self._keep(node, pending, got, tally.said)

    def _keep(self, node: GraphStage, pending: _Pending, got: Results, said: list[str]) -> None:
        """Write what is needed to run it again; a full disk is told, not raised: requests go on."""
        digests = weight_digests(node, self._source)
        replay = Replay(node.name, spec_json(node.spec), pending.run, got, digests, tuple(said))
        plain = node.name.replace("[", "-").replace("]", "")
        path = _free(self.folder, f"{plain}-run-{pending.number}")
        try:
            write_replay(replay, path)
        except OSError as cause:
            self.unwritten.append(f"{path}: {cause}")
        else:
            self.files.append(str(path))


def _free(folder: Path, stem: str) -> Path:
    """Return a file name that is not taken: earlier engines' files stay."""
    path, number = folder / f"{stem}.safetensors", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.safetensors"
    return path
