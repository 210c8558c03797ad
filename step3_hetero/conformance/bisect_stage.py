"""One run of a stage, on the host: what the reference makes of it, and how far rounding may lead.

Shadow check, bisect and replay go by this. ``want`` is the reference in float64 on the inputs that
the stage was given, with the weights that it holds; the bound is the reference's own rounding in
the stage's dtype (see tolerance). Rows of the cache that the run writes count as outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from step3_hetero.backend import Array, BatchMeta, Device, KVCache, Stage, Weights
from step3_hetero.conformance.case import widened
from step3_hetero.conformance.draws import dtype_of
from step3_hetero.conformance.forms import fill_cache
from step3_hetero.conformance.routing import RouteSpy, margins, near_ties
from step3_hetero.conformance.tolerance import Bool, Float64
from step3_hetero.conformance.trial import Results, host_results, reference
from step3_hetero.specs import (
    LOGICAL_BLOCK,
    SCALED,
    AttentionSpec,
    EmbedSpec,
    HostArray,
    StageSpec,
)

Prepared = Mapping[str, Weights | Array]

History = tuple[HostArray, HostArray]
"""Keys and values of some blocks, each (blocks, 128, kv_heads, head_dim)."""

KEYS, VALUES = "cache k", "cache v"
"""What the rows that a run writes into its cache are called among its outputs."""


@dataclass(frozen=True, eq=False)
class StageRun:
    """What a stage is given: its inputs and, for attention, the blocks its batch names.

    ``meta`` addresses ``history``'s blocks by their place in it; it is None for a vision stage.
    """

    meta: BatchMeta | None
    inputs: Mapping[str, HostArray]
    history: History | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a stage gave, written cache rows included, and the logits that its router saw."""

    results: Results
    logits: HostArray | None = None


@dataclass(frozen=True, eq=False)
class Expected:
    """What the reference makes of a run: in float64, and in the stage's dtype in two orders.

    Shapes: near, margins, logit_error (tokens,), for a stage that routes. ``near`` marks the rows
    whose experts rounding may change; ``logit_error`` is the reference's own largest error.
    ``neighbours`` are errors that the reference makes on neighbouring inputs.
    """

    want: Results
    rounded: tuple[Results, Results]
    near: Bool | None = None
    margins: Float64 | None = None
    logit_error: Float64 | None = None
    neighbours: tuple[Results, ...] = ()


class HostStage(Stage):
    """A stage that takes and gives host arrays.

    Inputs are rounded to ``edge``, the dtype in which they come, before they take the stage's own.
    """

    def __init__(
        self, device: Device, stage: Stage, cache: KVCache | None = None, edge: str | None = None
    ) -> None:
        self.device = device
        self.stage = stage
        self.cache = cache
        self.spec = stage.spec
        self.edge = edge or stage.spec.dtype

    def plan(self, meta: BatchMeta) -> None:
        """Pass the batch on."""
        self.stage.plan(meta)

    def run(
        self, inputs: Mapping[str, Array], out: Mapping[str, Array] | None = None
    ) -> Mapping[str, Array]:
        """Run on the stage's device; ``out`` is not for host arrays."""
        assert out is None, "a HostStage gives arrays of its own"
        given = {n: rounded_to(x, self.edge) for n, x in inputs.items()}
        placed = {n: self.device.from_host(rounded_to(x, self.spec.dtype))
                  for n, x in given.items()}  # fmt: skip
        return host_results(self.device, self.stage.run(placed))

    def outcome(self, meta: BatchMeta | None, inputs: Mapping[str, HostArray]) -> Outcome:
        """Plan, run, and read back what was written into the cache."""
        if meta is not None:
            self.plan(meta)
        results = dict(self.run(inputs))
        return Outcome(results | written(self.cache, meta))


def rounded_to(x: HostArray, dtype: str) -> HostArray:
    """Round real numbers to ``dtype``; ids stay."""
    return x.astype(dtype_of(dtype)) if x.dtype.kind not in "iub" else x


def written(cache: KVCache | None, meta: BatchMeta | None) -> Results:
    """Return the keys and values that a batch wrote, (tokens, kv_heads, head_dim), padding out."""
    if cache is None or meta is None:
        return {}
    slots = meta.slots[meta.slots >= 0]
    blocks, place = np.unique(slots // LOGICAL_BLOCK, return_inverse=True)
    pair = zip((KEYS, VALUES), cache.read(blocks.tolist()), strict=True)
    return {name: stored[place, slots % LOGICAL_BLOCK] for name, stored in pair}


def in_dtype(spec: StageSpec, dtype: str) -> StageSpec:
    """Return a stage that computes in ``dtype``, all rows at once.

    An embedding keeps its own: its result is defined to the bit.
    """
    plain = replace(spec, batch_invariant=False)
    if dtype == spec.dtype or isinstance(plain, EmbedSpec):
        return plain
    if isinstance(plain, AttentionSpec) and plain.router is not None:
        plain = replace(plain, router=replace(plain.router, logits_dtype=dtype))
    return replace(plain, dtype=dtype)


def reference_stage(
    device: Device, spec: StageSpec, dtype: str, weights: Prepared, cache: KVCache | None
) -> HostStage:
    """Build a stage of the reference in ``dtype`` over weights prepared for the stage's own dtype.

    The reference holds weights widened, exact in every dtype it computes in: float64 needs no copy.
    """
    from step3_hetero.composed import compose
    from step3_hetero.specs import Limits

    target = in_dtype(spec, dtype)
    held = {n: w if isinstance(w, Weights) else device.from_host(w, target.dtype)
            for n, w in weights.items()}  # fmt: skip
    stage = compose(device, target, held, cache, Limits(0, 0, 0))
    return HostStage(device, stage, cache, spec.dtype)


def expect_run(spec: StageSpec, weights: Prepared, run: StageRun) -> Expected:
    """Let the reference judge one run whose cache content is at hand."""
    outcomes = []
    for device, dtype in ((reference(), "float64"), (reference(), spec.dtype),
                          (reference("in-order"), spec.dtype)):  # fmt: skip
        with RouteSpy(device) as spy:
            cache = cache_of(device, run, spec, dtype)
            stage = reference_stage(device, spec, dtype, weights, cache)
            found = stage.outcome(run.meta, run.inputs)
        outcomes.append(Outcome(found.results, joined_logits(spy.logits)))
    return expect(spec, *outcomes)


def cache_of(device: Device, run: StageRun, spec: StageSpec, dtype: str) -> KVCache | None:
    """Open a cache that holds a run's blocks, in ``dtype`` unless the stage asks for another.

    Codes of a cache that is FP8 or INT8 are the same again; a scale may differ by its last bit.
    """
    if run.history is None:
        return None
    own = spec.kv_dtype if isinstance(spec, AttentionSpec) else ""
    k, v = run.history if own in SCALED else (rounded_to(x, own or dtype) for x in run.history)
    return fill_cache(device, k, v, own or dtype)


def joined_logits(seen: Sequence[HostArray]) -> HostArray | None:
    """Return the logits of all rows, None for a stage that does not route."""
    return np.concatenate(seen) if seen else None


def expect(spec: StageSpec, exact: Outcome, blocked: Outcome, ordered: Outcome) -> Expected:
    """Put together what the reference gave in three ways."""
    want = {n: widened(x) for n, x in exact.results.items()}
    rounded = (blocked.results, ordered.results)
    router = spec.router if isinstance(spec, AttentionSpec) else None
    if router is None or exact.logits is None or ordered.logits is None:
        return Expected(want, rounded)
    logits = exact.logits.astype(np.float64)
    own = ordered.logits.astype(np.float64)
    near = near_ties(logits, own, router.top_k)
    error = np.abs(own - logits).max(-1, initial=0)
    gaps = margins(logits, router.top_k) if len(logits) else error
    return Expected(want, rounded, near, gaps, error)


def compact(meta: BatchMeta) -> tuple[list[int], BatchMeta]:
    """Return the blocks that a batch's sequences use, and the batch with these numbered from 0."""
    used = -(-meta.context_lens // LOGICAL_BLOCK)
    named = [table[:count] for table, count in zip(meta.block_tables, used, strict=True)]
    blocks = np.unique(np.concatenate([*named, np.zeros(0, np.int32)]))
    tables = np.zeros((meta.seqs, int(used.max(initial=0))), np.int32)
    for row, own in zip(tables, named, strict=True):
        row[: len(own)] = np.searchsorted(blocks, own)
    place = np.searchsorted(blocks, meta.slots // LOGICAL_BLOCK) * LOGICAL_BLOCK
    slots = np.where(meta.slots >= 0, place + meta.slots % LOGICAL_BLOCK, -1)
    return blocks.tolist(), replace(meta, slots=slots.astype(np.int32), block_tables=tables)
