"""What one micro-batch of a plan takes between attention and FFN, and which hop binds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from step3_hetero.placement.catalogue import GIGA
from step3_hetero.placement.columns import AttentionColumn, FfnColumn, Problem
from step3_hetero.placement.network import HOST, Wire, a2f_bytes, f2a_bytes
from step3_hetero.placement.plans import SplitPlan
from step3_hetero.transport.base import PIECE_BYTES


@dataclass(frozen=True, slots=True)
class Edge:
    """One card of an attention instance and a set that it feeds.

    ``rows``: the card's part of a micro-batch, sent to each of ``members`` instances of the set,
    one message each. ``latency_s`` is that of one message.
    """

    wire: Wire
    members: int
    rows: float
    latency_s: float
    out_bytes: float
    back_bytes: float

    @classmethod
    def of(cls, problem: Problem, a: AttentionColumn, f: FfnColumn, batch: float) -> Edge:
        """Return the edge of an attention instance that has ``batch`` tokens of a micro-batch."""
        wire = problem.wires[a.pool, f.pool]
        assert isinstance(wire, Wire), "columns without a wire are never paired"
        latency_s = max(problem.pools[p].efficiency.message_s for p in (a.pool, f.pool))
        out, back = a2f_bytes(problem.workload, problem.wire_dtype), f2a_bytes(problem.workload)
        return cls(wire, f.ep, batch / a.cards, latency_s, out, back)

    def busy_s(self, row_bytes: float) -> float:
        """Return how long one way keeps its slowest hop busy."""
        return self.members * self.rows * row_bytes * self.wire.busy_s_per_byte

    def way_s(self, row_bytes: float) -> float:
        """Return how long one way takes over all hops, the latency of a message left aside."""
        return self.members * self.wire.message_s(self.rows * row_bytes)

    @property
    def other_hops_s(self) -> float:
        """Return what all hops take beyond the slowest, the mean of both ways."""
        ways = self.out_bytes, self.back_bytes
        return sum(self.way_s(way) - self.busy_s(way) for way in ways) / 2


def edges_json(plan: SplitPlan, problem: Problem) -> list[dict[str, Any]]:
    """Return the edges that a plan uses, as ``plan --json`` prints them."""
    return list(_edges(plan, problem))


def _edges(plan: SplitPlan, problem: Problem) -> Iterator[dict[str, Any]]:
    for n, (a, count) in enumerate(plan.attention):
        for j, (f, _) in enumerate(plan.ffn):
            if plan.flow[n, j] <= 0:
                continue
            edge = Edge.of(problem, a, f, max(1, round(plan.flow[n].sum() / count)))
            pools = plan.pools[a.pool], plan.pools[f.pool]
            yield {
                "attention": pools[0].name,
                "ffn": pools[1].name,
                "cards": [pool.card.name for pool in pools],
                "over": "host NICs" if edge.wire.kind == HOST else "the cards' NICs",
                "hops_gb_per_s": {h.name: 1 / h.s_per_byte / GIGA for h in edge.wire.hops},
                "slowest_hop": edge.wire.slowest,
                "members": edge.members,
                **_way("a2f", edge, edge.out_bytes),
                **_way("f2a", edge, edge.back_bytes),
            }


def _way(name: str, edge: Edge, row_bytes: float) -> dict[str, Any]:
    """Return the messages of one card for one micro-batch in one layer, and their seconds."""
    size = edge.rows * row_bytes
    pieces = math.ceil(size / PIECE_BYTES) if edge.wire.kind == HOST else 1
    return {
        f"{name}_message_bytes": round(size),
        f"{name}_pieces": max(1, pieces),
        f"{name}_s": edge.way_s(row_bytes) + edge.latency_s,
    }
