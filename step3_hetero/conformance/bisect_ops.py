"""Inside a stage: its ops one at a time, each fed what the reference's op was fed.

The reference runs the stage composed of its kernels, in the stage's dtype, and every call is noted;
then the suspect's kernels are called with the same arrays, weights of its own and a cache that
holds the reference's keys. An error made by one op reaches no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from step3_hetero.backend import BatchMeta, Device, Stage
from step3_hetero.composed import ComposedStage, PerRow
from step3_hetero.conformance.bisect_stage import (
    Expected,
    History,
    Prepared,
    StageRun,
    cache_of,
    reference_stage,
    written,
)
from step3_hetero.conformance.bisect_verdict import NEIGHBOURS, jittered, own_errors, verdict
from step3_hetero.conformance.case import widened
from step3_hetero.conformance.tolerance import ROUNDOFF, same_bits
from step3_hetero.conformance.trial import Results, reference
from step3_hetero.errors import UnsupportedOp
from step3_hetero.ops import OPS
from step3_hetero.specs import LOGICAL_BLOCK, HostArray, StageSpec

CACHE_WRITE = "kv_cache"
"""What the write into the cache goes by: no op, but a step of its own."""


@dataclass(frozen=True)
class Given:
    """An argument that each device has in a form of its own: weights by name, cache, batch."""

    kind: Literal["weights", "cache", "batch"]
    name: str = ""


@dataclass(frozen=True, eq=False)
class OpCall:
    """One call of one op in a stage. ``number`` of ``count`` calls of the op, from 1.

    ``history`` are the blocks that the op's cache holds, for the ops that take it.
    """

    op: str
    args: tuple[HostArray | Given, ...]
    parameters: Mapping[str, Any]
    number: int = 1
    count: int = 1
    history: History | None = None

    @property
    def label(self) -> str:
        """Return the op and which of its calls: by its weight, or by number."""
        named = [a.name for a in self.args if isinstance(a, Given) and a.kind == "weights"]
        if named:
            return f"{self.op} {named[0]}"
        return self.op if self.count == 1 else f"{self.op} (call {self.number} of {self.count})"


@dataclass(frozen=True)
class OpFigure:
    """How one op of the suspect did by itself; ``worst`` is its part of the bound, squared."""

    label: str
    op: str
    worst: float
    said: str = ""

    @property
    def beyond(self) -> bool:
        """Say whether the op errs by more than rounding explains."""
        return bool(self.said)


@dataclass
class _Tracer:
    """Notes every kernel call and cache write of one composed stage of the reference."""

    device: Device
    weights: Prepared
    calls: list[OpCall] = field(default_factory=list)

    def install(self) -> None:
        """Put itself before every kernel."""
        kernels = self.device.kernels
        self.device.kernels = {n: self._noting(n, kernel) for n, kernel in kernels.items()}

    def _noting(self, op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **parameters: Any) -> Any:
            self.calls.append(OpCall(op, tuple(map(self._given, args)), parameters))
            return kernel(*args, **parameters)

        return noted

    def note_write(self, cache: Any) -> None:
        """Note what is written into a cache, too."""
        write = cache.write

        def noted(k: Any, v: Any, batch: Any) -> None:
            given = (np.array(k), np.array(v), Given("batch"))
            self.calls.append(OpCall(CACHE_WRITE, given, {}))
            write(k, v, batch)

        object.__setattr__(cache, "write", noted)

    def _given(self, arg: Any) -> HostArray | Given:
        for name, held in self.weights.items():
            if held is arg:
                return Given("weights", name)
        if isinstance(arg, np.ndarray):
            return np.array(arg)
        return Given("cache" if hasattr(arg, "write") else "batch")


def trace(spec: StageSpec, weights: Prepared, run: StageRun) -> list[OpCall]:
    """Run a stage composed of the reference's kernels in its own dtype; return its op calls."""
    device = reference()
    before = _erased(run.history, run.meta)
    cache = cache_of(device, replace(run, history=before), spec, spec.dtype)
    stage = reference_stage(device, spec, spec.dtype, weights, cache)
    assert isinstance(stage.stage, ComposedStage)
    tracer = _Tracer(device, stage.stage.w)
    tracer.install()
    if cache is not None:
        tracer.note_write(cache)
    stage.outcome(run.meta, run.inputs)
    after = cache.read(range(cache.spec.blocks)) if cache is not None else None
    histories = {CACHE_WRITE: before, "attention": after}
    return [replace(c, history=histories.get(c.op)) for c in _numbered(tracer.calls)]


def _numbered(calls: Sequence[OpCall]) -> Iterator[OpCall]:
    total = {c.op: 0 for c in calls}
    for call in calls:
        total[call.op] += 1
    seen = dict.fromkeys(total, 0)
    for call in calls:
        seen[call.op] += 1
        yield replace(call, number=seen[call.op], count=total[call.op])


def _erased(history: History | None, meta: BatchMeta | None) -> History | None:
    """Return the blocks with the rows zeroed that the run is about to write."""
    if history is None or meta is None:
        return None
    slots = meta.slots[meta.slots >= 0]
    cleared = []
    for stored in history:
        copy = np.array(stored)
        copy[slots // LOGICAL_BLOCK, slots % LOGICAL_BLOCK] = 0
        cleared.append(copy)
    return cleared[0], cleared[1]


def insides(
    stage: Stage, device: Device, prepared: Callable[[], Prepared]
) -> tuple[Device, Prepared]:
    """Return the device whose kernels a stage is made of, and its weights.

    A composed stage says both itself; of a fused one the device's kernels are tried, with weights
    prepared anew.
    """
    inner = stage.inner if isinstance(stage, PerRow) else stage
    if isinstance(inner, ComposedStage):
        return inner.device, inner.w
    return device, prepared()


def try_ops(
    spec: StageSpec,
    weights: Prepared,
    run: StageRun,
    suspect: Device,
    suspects_weights: Prepared,
) -> list[OpFigure]:
    """Hold each op of a stage on the suspect's device against the reference's, in their order.

    ``weights`` are the reference's, prepared for the stage's dtype. Ops that the device has no
    kernel for, as those of a stage that it only has fused, are left out.
    """
    figures = []
    for call in trace(spec, weights, run):
        try:
            got = _call(call, suspect, suspects_weights, run.meta, spec, spec.dtype)
        except UnsupportedOp:
            continue
        expected = _expected(call, spec, weights, run.meta)
        found = verdict(expected, got)
        if found.excesses and not any(np.isinf(e.error) for e in found.excesses):
            expected = _with_neighbours(expected, call, spec, weights, run.meta)
            found = verdict(expected, got)
        said = "; ".join(e.said for e in found.excesses) or _other_bits(call, got, expected)
        figures.append(OpFigure(call.label, call.op, found.worst, said))
    return figures


def guilty(figures: Sequence[OpFigure]) -> OpFigure | None:
    """Return the first op beyond its bound; None when each by itself keeps to it."""
    return next((f for f in figures if f.beyond), None)


def _expected(call: OpCall, spec: StageSpec, weights: Prepared, meta: BatchMeta | None) -> Expected:
    """Let the reference judge one call: its own results as Expected."""
    results = []
    for device, dtype in ((reference(), "float64"), (reference(), spec.dtype),
                          (reference("in-order"), spec.dtype)):  # fmt: skip
        stage = reference_stage(device, spec, dtype, weights, _no_cache(spec, device))
        assert isinstance(stage.stage, ComposedStage)
        results.append(_call(call, device, stage.stage.w, meta, spec, dtype))
    want = {n: widened(x) for n, x in results[0].items()}
    rounded = (results[1], results[2])
    if "ids" not in want:
        return Expected(want, rounded)
    tied = np.logical_or.reduce([(r["ids"] != want["ids"]).any(-1) for r in rounded])
    logits = np.asarray(call.args[0])
    error = ROUNDOFF[logits.dtype.name] * np.abs(logits.astype(np.float64)).max(-1)
    return Expected(want, rounded, tied, np.zeros(len(tied)), error)


def _with_neighbours(
    expected: Expected, call: OpCall, spec: StageSpec, weights: Prepared, meta: BatchMeta | None
) -> Expected:
    """Add what the reference errs on neighbouring arrays; see ``look_twice``."""
    rng, errors = np.random.default_rng(0), []
    for _ in range(NEIGHBOURS):
        moved = tuple(a if isinstance(a, Given) else jittered(a, rng) for a in call.args)
        errors += own_errors(_expected(replace(call, args=moved), spec, weights, meta))
    return replace(expected, neighbours=tuple(errors))


def _no_cache(spec: StageSpec, device: Device) -> Any:
    """Return something for a stage to be built with whose ops are called one at a time."""
    if spec.kind != "attention":
        return None
    return device.open_cache(spec.cache(0))


def _call(
    call: OpCall,
    device: Device,
    weights: Prepared,
    meta: BatchMeta | None,
    spec: StageSpec,
    dtype: str,
) -> Results:
    """Call one op on a device; return its results by name, on the host."""
    cache = None
    if call.history is not None:
        cache = cache_of(device, StageRun(meta, {}, call.history), spec, dtype)
    batch = None if meta is None else device.batch(meta)
    given = {"cache": cache, "batch": batch}

    def placed(arg: HostArray | Given) -> Any:
        if isinstance(arg, Given):
            return weights[arg.name] if arg.kind == "weights" else given[arg.kind]
        return device.from_host(widened(arg) if dtype == "float64" else arg)

    args = [placed(a) for a in call.args]
    if call.op == CACHE_WRITE:
        assert cache is not None
        cache.write(*args)
        return written(cache, meta)
    out = device.kernel(call.op)(*args, **_parameters(call, dtype))
    outputs = out if isinstance(out, tuple) else (out,)
    names = ("weights", "ids") if call.op == "route" else ("result",)
    return {n: device.to_host(x) for n, x in zip(names, outputs, strict=True)}


def _parameters(call: OpCall, dtype: str) -> Mapping[str, Any]:
    """Return a call's parameters; in float64 nothing is rounded to a narrower dtype."""
    if dtype != "float64":
        return call.parameters
    return {n: dtype if n in ("dtype", "out_dtype") else v for n, v in call.parameters.items()}


def _other_bits(call: OpCall, got: Results, expected: Expected) -> str:
    """Say whether an op that is defined to the bit gave others."""
    if call.op != CACHE_WRITE and not OPS[call.op].exact:
        return ""
    for name, own in expected.rounded[0].items():
        if not same_bits(got[name], own):
            return f"{name}: other bits than the definition's"
    return ""
