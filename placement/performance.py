"""Seconds of each stage on a card: rooflines, read top to bottom.

A stage takes the longer of its arithmetic and its bytes; arithmetic runs at a fraction of the
card's peak, bytes at a fraction of its bandwidth (`Efficiency`). Tokens of one micro-batch are the
argument everywhere, as arrays, because the planner asks for many batches at once. All times are for
one micro-batch; ``pass`` means through all layers of the model.

Three properties hold for every function of the batch, and the planner rests on them: seconds never
fall as the batch grows, seconds per token never rise, and both fall on a faster card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from step3_hetero.placement.catalogue import Card
from step3_hetero.placement.efficiency import Efficiency
from step3_hetero.placement.workload import ELEMENT_BYTES, Part, Workload

Batch = npt.NDArray[np.float64]
"""Tokens of one micro-batch; whole numbers, held as floats."""

MEMORY_SHARE = 0.9
"""The part of a card's memory that weights and KV may take; vLLM's gpu_memory_utilization."""

KEPT_PRECISION = "bf16"
"""Of embedding and head, which no published Step-3 checkpoint quantises."""

RETURN_BYTES = ELEMENT_BYTES["bf16"]
"""Partial sums are added up in bf16."""


@dataclass(frozen=True, slots=True)
class Roof:
    """One card at work in one precision, efficiency taken off."""

    flops_per_s: float
    kept_flops_per_s: float
    bytes_per_s: float
    scale_up_bytes_per_s: float | None
    message_s: float
    call_s: float
    element_bytes: float

    @classmethod
    def of(cls, card: Card, efficiency: Efficiency, precision: str) -> Roof:
        """Return the roof of a card that computes and stores in ``precision``."""
        kept = card.flops_per_s.get(KEPT_PRECISION, card.flops_per_s[precision])
        return cls(
            flops_per_s=card.flops_per_s[precision] * efficiency.arithmetic,
            kept_flops_per_s=kept * efficiency.arithmetic,
            bytes_per_s=card.memory_bandwidth_bytes_per_s * efficiency.bandwidth,
            scale_up_bytes_per_s=card.scale_up_bytes_per_s,
            message_s=efficiency.message_s,
            call_s=efficiency.call_s,
            element_bytes=ELEMENT_BYTES[precision],
        )

    def seconds(self, flops: Batch, moved_bytes: Any) -> Batch:
        """Return the longer of arithmetic and bytes."""
        longer: Batch = np.maximum(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)
        return longer


def precisions(card: Card, excluded: frozenset[str] = frozenset()) -> list[str]:
    """Return the precisions worth trying on a card, best first.

    One that is no faster and no smaller than another is left out; fp8 stands before int8 because a
    published checkpoint is fp8 and needs no requantisation.

    >>> from types import SimpleNamespace as Of
    >>> precisions(Of(flops_per_s={"bf16": 1.0, "int8": 2.0, "fp8": 2.0}))
    ['fp8']
    """
    kept: list[str] = []
    for name in ("fp8", "int8", "bf16"):
        rate = card.flops_per_s.get(name)
        if rate is None or name in excluded:
            continue
        beaten = any(
            card.flops_per_s[k] >= rate and ELEMENT_BYTES[k] <= ELEMENT_BYTES[name] for k in kept
        )
        if not beaten:
            kept.append(name)
    return kept


def kv_shards(core: Any, tp: int) -> int:
    """Return over how many of ``tp`` ranks the KV cache is split: at most its KV heads.

    MFA and MLA share one head, so every rank of an instance holds and reads all of it.
    """
    heads = getattr(getattr(core, "within", core), "kv_heads", 1)
    return int(min(tp, heads))


def collective_s(roof: Roof, tp: int, tokens: Batch, row_bytes: float) -> Batch:
    """Return the seconds to gather or to scatter rows within ``tp`` cards of one server."""
    if tp == 1:
        return np.zeros_like(tokens)
    assert roof.scale_up_bytes_per_s is not None, "columns leave out TP where there is no link"
    moved = tokens * row_bytes * (tp - 1) / tp
    return moved / roof.scale_up_bytes_per_s + roof.message_s


@dataclass(frozen=True, slots=True)
class AttentionStage:
    """The attention side of one instance: ``tp`` cards, with embedding and head.

    Projections are split over the ranks, the core by heads, the cache by KV heads.
    """

    workload: Workload
    roof: Roof
    tp: int
    context: int
    core_roof: Roof | None = None
    """Of the core and its cache, where they are kept in another precision than the weights."""

    @property
    def core(self) -> Roof:
        """Return the roof of the core and its cache."""
        return self.core_roof or self.roof

    def layer_s(self, part: Part, tokens: Batch) -> Batch:
        """Return the seconds of one layer: core, then projections, while TP's sums travel."""
        roof, core = self.roof, part.core
        assert core is not None, f"{part.name} is no attention"
        read_bytes = core.kv_bytes(self.context, self.core.element_bytes)
        core_s = self.core.seconds(
            tokens * core.flops(self.context) / self.tp,
            tokens * read_bytes / kv_shards(core, self.tp),
        )
        weights = part.weight_elements * roof.element_bytes / self.tp
        linear_s = roof.seconds(tokens * part.linear_flops / self.tp, weights)
        travel = 2 * collective_s(roof, self.tp, tokens, self.workload.hidden * RETURN_BYTES)
        computed: Batch = np.maximum(core_s + linear_s, travel)
        return computed + roof.call_s

    def between_s(self, tokens: Batch) -> Batch:
        """Return the seconds of embedding and head, once a token."""
        total = np.zeros_like(tokens)
        for part in self.workload.parts:
            if part.stage == "head":
                moved = part.weight_elements * ELEMENT_BYTES[KEPT_PRECISION] / self.tp
                flops = tokens * part.linear_flops / self.tp
                total += np.maximum(
                    flops / self.roof.kept_flops_per_s, moved / self.roof.bytes_per_s
                )
            elif part.stage == "embed":
                row = self.workload.hidden * ELEMENT_BYTES[KEPT_PRECISION]
                total += tokens * row / self.roof.bytes_per_s
        return total

    def pass_s(self, tokens: Batch) -> Batch:
        """Return the seconds through all layers, embedding and head included."""
        return self.between_s(tokens) + self.layers_s(tokens)

    def layers_s(self, tokens: Batch) -> Batch:
        """Return the seconds through all layers."""
        total = np.zeros_like(tokens)
        for part in self.workload.of("attention"):
            total = total + part.layers * self.layer_s(part, tokens)
        return total

    def longest_s(self, tokens: Batch) -> Batch:
        """Return the seconds of one layer of the longest kind."""
        found = [self.layer_s(part, tokens) for part in self.workload.of("attention")]
        return np.asarray(np.max(found, axis=0))

    def weight_bytes(self) -> float:
        """Return the bytes of weights on one card; embedding and head are split by rows."""
        held = sum(p.layers * p.weight_elements for p in self.workload.of("attention"))
        kept = sum(
            p.layers * p.weight_elements
            for p in self.workload.parts
            if p.stage in ("head", "embed")
        )
        roof = self.roof
        return (held * roof.element_bytes + kept * ELEMENT_BYTES[KEPT_PRECISION]) / self.tp

    def kv_bytes(self) -> float:
        """Return the bytes that one sequence holds on one card."""
        return sum(
            p.layers
            * p.core.held_bytes(self.context, self.core.element_bytes)
            / kv_shards(p.core, self.tp)
            for p in self.workload.of("attention")
            if p.core is not None
        )


@dataclass(frozen=True, slots=True)
class FfnStage:
    """The FFN side of one set: ``ep`` instances of ``tp`` cards.

    Experts are split over the instances, each of them over its ranks; dense and shared parts by
    columns over all cards.
    """

    workload: Workload
    roof: Roof
    tp: int
    ep: int
    wire_bytes: float  # of one value that arrives

    def layer_s(self, part: Part, tokens: Batch) -> Batch:
        """Return the seconds of one layer for ``tokens`` of all attention instances together."""
        roof, cards = self.roof, self.tp * self.ep
        routed = 2.0 * part.top_k * part.expert_elements
        imbalance = expert_imbalance(tokens * part.top_k, self.ep if part.experts else 1)
        flops = tokens * ((part.linear_flops - routed) + routed * imbalance) / cards
        moved = self._read_elements(part, tokens) * roof.element_bytes
        hidden = self.workload.hidden
        travel = collective_s(roof, self.tp, tokens, hidden * self.wire_bytes) + collective_s(
            roof, self.tp, tokens, hidden * RETURN_BYTES
        )
        computed: Batch = np.maximum(roof.seconds(flops, moved), travel)
        return computed + roof.call_s

    def _read_elements(self, part: Part, tokens: Batch) -> Batch:
        """Return the weights that one card reads for a micro-batch: experts nobody chose stay."""
        shared = part.weight_elements - part.experts * part.expert_elements
        hit = distinct_experts(tokens, part.experts, part.top_k)
        return shared / (self.tp * self.ep) + hit * part.expert_elements / (self.ep * self.tp)

    def pass_s(self, tokens: Batch) -> Batch:
        """Return the seconds through all layers."""
        total = np.zeros_like(tokens)
        for part in self.workload.of("ffn"):
            total = total + part.layers * self.layer_s(part, tokens)
        return total

    def longest_s(self, tokens: Batch) -> Batch:
        """Return the seconds of one layer of the longest kind."""
        found = [self.layer_s(part, tokens) for part in self.workload.of("ffn")]
        return np.asarray(np.max(found, axis=0))

    def most_tokens(self, budget_s: Batch) -> Batch:
        """Return a batch that arithmetic alone keeps from fitting a layer's budget."""
        flops_per_s = self.roof.flops_per_s * self.tp * self.ep
        most = max(part.linear_flops for part in self.workload.of("ffn"))
        return np.ceil(budget_s * flops_per_s / most)

    def weight_bytes(self) -> float:
        """Return the bytes of weights on one card."""
        held = sum(p.layers * p.weight_elements for p in self.workload.of("ffn"))
        return held * self.roof.element_bytes / (self.tp * self.ep)


def distinct_experts(tokens: Batch, experts: int, top_k: int) -> Batch:
    """Return how many experts a batch is expected to choose, each token ``top_k`` at random.

    >>> distinct_experts(np.array([1.0, 1e6]), 48, 3).round(6).tolist()
    [3.0, 48.0]
    """
    if not experts:
        return np.zeros_like(tokens)
    if top_k == experts:
        return np.where(tokens > 0, float(experts), 0.0)
    missed = np.exp(tokens * np.log1p(-top_k / experts))
    return np.asarray(experts * (1 - missed))


def expert_imbalance(choices: Batch, groups: int) -> Batch:
    """Return the fullest group's load over the mean one when ``choices`` fall at random.

    mean + sqrt(2 · mean · ln groups), over mean; never more than everything in one group.
    Source: Raab and Steger 1998, "Balls into bins", theorem 1 (many balls).
    """
    if groups == 1:
        return np.ones_like(choices)
    mean = np.maximum(choices, 1) / groups
    load: Batch = np.minimum(1 + np.sqrt(2 * np.log(groups) / mean), groups)
    return load


def prefill_s(attention: AttentionStage, ffn: FfnStage, prompt: int) -> tuple[float, float]:
    """Return the seconds of one prompt's attention and FFN, through all layers.

    The core attends to half the prompt on average; the weights are read once.
    """
    tokens = np.array([float(prompt)])
    roof, total = attention.roof, 0.0
    for part in attention.workload.of("attention"):
        assert part.core is not None
        core = prompt * part.core.flops(max(1, prompt // 2)) / attention.tp / roof.flops_per_s
        weights = part.weight_elements * roof.element_bytes / attention.tp
        linear = roof.seconds(tokens * part.linear_flops / attention.tp, weights)
        total += part.layers * (core + float(linear[0]) + roof.call_s)
    return total, float(ffn.pass_s(tokens)[0])
