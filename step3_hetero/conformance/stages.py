"""Whole stages and layers as cases: what a backend builds, against what the reference composes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from step3_hetero.backend import Array, BatchMeta, Device, KVCache, Stage, Weights
from step3_hetero.composed import compose
from step3_hetero.conformance.case import Inputs, seeded
from step3_hetero.conformance.codes import Writes, turn_codes
from step3_hetero.conformance.draws import dtype_of, lay_out
from step3_hetero.conformance.forms import fill_cache
from step3_hetero.conformance.last import Last
from step3_hetero.conformance.models import Drawn, graph_of
from step3_hetero.conformance.routing import RouteSpy, near_ties, weights_slack
from step3_hetero.conformance.trial import Expected, judge_run, reference
from step3_hetero.graph import GraphStage
from step3_hetero.runtime.loader import stage_weights
from step3_hetero.specs import AttentionSpec, HostArray, HostTensor, Limits, OpSpec

PADDING = 5
"""Rows added to a batch when a stage is tried with padding."""

DRAWN, PREPARED = Last(), Last()


@dataclass(frozen=True)
class StageCase:
    """One stage, or the two of a layer, over one batch.

    ``kind`` is a stage's, or ``layer``: attention and FFN after each other. Sequence s adds
    queries[s] tokens to reach contexts[s]; a vision case has ``images`` of ``side`` pixels. ``kv``
    is the dtype of the cache, empty for the case's own.
    """

    kind: str
    dtype: str
    model: str
    layer: int = 0
    queries: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (1,)
    stored: str = ""
    images: int = 0
    side: int = 0
    full: bool = False
    kv: str = ""

    @property
    def id(self) -> str:
        """Return the case in words."""
        layer = f",layer={self.layer}" if self.kind in ("attention", "ffn", "layer") else ""
        said = f"queries={_plus(self.queries)},contexts={_plus(self.contexts)}"
        if self.kind == "vision":
            said = f"images={self.images},side={self.side}"
        stored = f",stored={self.stored}" if self.stored else ""
        stored += f",kv={self.kv}" if self.kv else ""
        return f"{self.op}[{self.model}{layer},{said}{stored},{self.dtype}]"

    def __str__(self) -> str:
        return self.id

    @property
    def op(self) -> str:
        """Return what is tried."""
        return "layer" if self.kind == "layer" else f"{self.kind}_stage"

    @property
    def exact(self) -> bool:
        """No stage is defined to the bit."""
        return False

    @property
    def donated(self) -> frozenset[str]:
        """The residual is given away."""
        return frozenset({"x"})

    @property
    def blocks(self) -> int:
        """Return the blocks of the cache: what the sequences need, and two that none names."""
        return sum(-(-c // 128) for c in self.contexts) + 2

    def nodes(self, dtype: str, *, batch_invariant: bool = False) -> list[GraphStage]:
        """Return the stages to run, in order."""
        graph = graph_of(self.model, dtype, batch_invariant=batch_invariant, kv_dtype=self.kv)
        names = {"attention": [f"attention[{self.layer}]"], "ffn": [f"ffn[{self.layer}]"],
                 "layer": [f"attention[{self.layer}]", f"ffn[{self.layer}]"]}  # fmt: skip
        return [graph.by_name[n] for n in names.get(self.kind, [self.kind])]

    def specs(self) -> tuple[OpSpec, ...]:
        """Return what a device must claim: every op of the stages."""
        return tuple(op for n in self.nodes(self.dtype) for op in n.spec.ops("auto"))

    def inputs(self) -> Inputs:
        """Draw what flows into the first stage, and the cache's content."""
        rng = seeded(self.id)
        if self.kind == "vision":
            shape = (self.images, self.side, self.side, 3)
            return Inputs({"pixels": rng.standard_normal(shape).astype(dtype_of(self.dtype))})
        meta = lay_out(rng, self.queries, self.contexts, self.blocks)
        arrays = self._drawn(rng, meta)
        spec = self.nodes(self.dtype)[0].spec
        history = None
        if isinstance(spec, AttentionSpec):
            shape = (self.blocks, 128, spec.kv_heads, spec.head_dim)
            k, v = (_normal(rng, shape, self.dtype) for _ in range(2))
            history = (k, v)
        return Inputs(arrays, {}, history, meta)

    def _drawn(self, rng: np.random.Generator, meta: BatchMeta) -> dict[str, HostArray]:
        node = self.nodes(self.dtype)[0]
        spec, tokens = node.spec, meta.tokens
        if spec.kind == "embed":
            ids = rng.integers(0, spec.vocab, tokens).astype(np.int32)
            places = rng.permutation(tokens)[: tokens // 2].astype(np.int32)
            rows = _normal(rng, (len(places), spec.hidden), self.dtype)
            return {"token_ids": ids, "image_rows": rows, "image_index": places}
        arrays = {
            t.name: _normal(rng, (tokens, spec.hidden), self.dtype)
            for t in node.takes
            if t.dims[-1] == "hidden"
        }
        if spec.kind == "ffn" and spec.experts:
            chosen = [rng.permutation(spec.experts)[: spec.top_k] for _ in range(tokens)]
            share = rng.random((tokens, spec.top_k)).astype(dtype_of(self.dtype))
            arrays |= {
                "weights": share,
                "ids": np.array(chosen, np.int32).reshape(tokens, spec.top_k),
            }
        if spec.kind == "head":
            arrays["rows"] = rng.permutation(tokens)[: -(-tokens // 2)].astype(np.int32)
        return arrays

    def place(
        self,
        device: Device,
        inputs: Inputs,
        dtype: str,
        *,
        fused: bool = True,
        batch_invariant: bool = False,
    ) -> PlacedStage:
        """Load the stages on a device: as it builds them, or composed of its kernels."""
        cache = None
        if inputs.history is not None:
            cache = fill_cache(device, *inputs.history, self.kv or dtype)
        stages = []
        weights = self._weights(device, dtype)
        for node in self.nodes(dtype, batch_invariant=batch_invariant):
            own = cache if node.kind == "attention" else None
            build = device.build if fused else _composed(device)
            stages.append(build(node.spec, weights[node.name], own, self._limits(inputs)))
        placed = PlacedStage(device, stages, {}, cache)
        placed.turn(inputs)
        return placed

    def tensors(self) -> Iterator[HostTensor]:
        """Yield every checkpoint tensor that the stages are made of."""
        source = self._source()
        for node in self.nodes(self.dtype):
            for param in node.params:
                yield from (source.tensor(name) for name in param.tensors.values())

    def _source(self) -> Drawn:
        drawn = (self.model, self.dtype, self.stored)
        found: Drawn = DRAWN.get(None, drawn, lambda: Drawn(*drawn))
        return found

    def _weights(self, device: Device, dtype: str) -> dict[str, dict[str, Weights | Array]]:
        """Return the weights of each stage as the device wants them."""
        source = self._source()
        nodes = self.nodes(dtype)
        key = (self.model, self.dtype, self.stored, tuple(n.name for n in nodes), dtype)
        made: dict[str, dict[str, Weights | Array]] = PREPARED.get(
            device, key, lambda: {n.name: stage_weights(device, n, source, "auto") for n in nodes}
        )
        return made

    def _limits(self, inputs: Inputs) -> Limits:
        tokens = inputs.meta.tokens if inputs.meta else 1
        seqs = inputs.meta.seqs if inputs.meta else 1
        return Limits(tokens + PADDING, seqs + PADDING, self.blocks)

    def call(self, device: Device, placed: PlacedStage, dtype: str) -> dict[str, Array]:
        """Run the stages over the batch."""
        return placed.run()

    def call_into(self, placed: PlacedStage, out: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stages with results written into ``out``."""
        return placed.run(out)

    def expect(self, inputs: Inputs) -> Expected:
        """Let the reference judge, noting where rounding may change the routing."""
        with RouteSpy(reference()) as spy:
            writes = Writes(spy.device)
            want, cache_want = judge_run(self, writes.device, inputs.widened(), "float64")
            exact = spy.logits
        own_writes = Writes(reference())
        own, cache = judge_run(self, own_writes.device, inputs, self.dtype)
        with RouteSpy(reference("in-order")) as spy:
            if self.kv not in ("", self.dtype):
                turn_codes(spy.device, writes.seen, own_writes.seen)
            ordered, cache_ordered = judge_run(self, spy.device, inputs, self.dtype)
            rounded = spy.logits
        near, slack = {}, {}
        if exact:
            top_k = want["ids"].shape[1]
            logits, own_logits = np.concatenate(exact), np.concatenate(rounded)
            rows = near_ties(logits, own_logits, top_k)
            names = ["weights", "ids"] + (["y"] if self.kind == "layer" else [])
            near = dict.fromkeys(names, rows)
            error = np.abs(own_logits - logits).max(-1, initial=0)
            slack = {"weights": weights_slack(error, own["weights"].dtype.name)}
        runs, caches = (own, ordered), (cache, cache_ordered)
        return Expected(want, runs, cache_want, caches, near, slack)


@dataclass
class PlacedStage:
    """The stages of a case on one device, with their inputs and cache."""

    device: Device
    stages: Sequence[Stage]
    arrays: dict[str, Array]
    cache: KVCache | None

    def turn(self, inputs: Inputs) -> None:
        """Take other inputs for the same stages and cache, and plan every stage for them."""
        self.arrays = {n: self.device.from_host(x) for n, x in inputs.arrays.items()}
        for stage in self.stages:
            if inputs.meta is not None:
                stage.plan(inputs.meta)

    def run(self, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run each stage once; what one gives the next may take."""
        flowing: dict[str, Any] = dict(self.arrays)
        results: dict[str, Array] = {}
        for stage in self.stages:
            takes, gives = PORTS[stage.spec.kind]
            given = None if out is None else {n: out[n] for n in gives if n in out}
            results |= stage.run({n: flowing[n] for n in takes if n in flowing}, given)
            flowing |= results
        return results


def padded(inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """Return the inputs with rows of junk behind them that no sequence owns."""
    meta = inputs.meta
    assert meta is not None
    tail = np.zeros(PADDING, np.int32)
    arrays = {}
    for name, x in inputs.arrays.items():
        if name in ("rows", "image_rows", "image_index"):
            arrays[name] = x
            continue
        junk = rng.integers(0, 2, (PADDING, *x.shape[1:]))
        filler = {"ids": junk * 0 - 1, "token_ids": junk}.get(name, junk * 100)
        arrays[name] = np.concatenate([x, filler.astype(x.dtype)])
    wide = replace(meta, positions=np.concatenate([meta.positions, tail]),
                   slots=np.concatenate([meta.slots, tail - 1]))  # fmt: skip
    return Inputs(arrays, inputs.weights, inputs.history, wide)


PORTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embed": (("token_ids", "image_rows", "image_index"), ("x",)),
    "vision": (("pixels",), ("rows",)),
    "attention": (("x", "y"), ("x", "u", "weights", "ids")),
    "ffn": (("u", "weights", "ids"), ("y",)),
    "head": (("x", "y", "rows"), ("logits",)),
}
"""What each kind of stage may take and give, by name."""


def _composed(device: Device) -> Any:
    return lambda spec, weights, cache, limits: compose(device, spec, weights, cache, limits)


def _plus(numbers: Sequence[int]) -> str:
    return "+".join(map(str, numbers))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> HostArray:
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype_of(dtype))
