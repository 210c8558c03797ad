"""The plan that does not split: attention and FFN on the same cards, experts spread over them.

An instance is ``cards`` cards. Groups of ``tp`` of them each serve their own sequences (attention,
dense and shared FFN split within the group); the routed experts are spread over all cards, and rows
travel to the cards that hold their experts and back. With two micro-batches one travels while the
other computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from step3_hetero.placement.catalogue import Card
from step3_hetero.placement.columns import (
    MOST_TOKENS,
    Problem,
    degrees,
    expert_degrees,
    largest_batch,
)
from step3_hetero.placement.efficiency import all_to_all_share
from step3_hetero.placement.performance import (
    MEMORY_SHARE,
    RETURN_BYTES,
    AttentionStage,
    Batch,
    Roof,
    distinct_experts,
    expert_imbalance,
    precisions,
)
from step3_hetero.placement.workload import ELEMENT_BYTES, Part

IN_FLIGHT = (1, 2)
"""Micro-batches: one after another, or one that computes while the other travels."""


@dataclass(frozen=True, slots=True)
class ColocatedStage:
    """All layers on one instance; the argument is the tokens of one group's micro-batch."""

    attention: AttentionStage
    card: Card
    cards: int
    wire_bytes: float

    @property
    def groups(self) -> int:
        """Return the groups that serve sequences of their own."""
        return self.cards // self.attention.tp

    def compute_s(self, tokens: Batch) -> Batch:
        """Return the seconds of arithmetic and memory through all layers."""
        total = self.attention.pass_s(tokens)
        for part in self.attention.workload.of("ffn"):
            total = total + part.layers * (
                self._local_s(part, tokens) + self._routed_s(part, tokens)
            )
        return total

    def _local_s(self, part: Part, tokens: Batch) -> Batch:
        roof, tp = self.attention.roof, self.attention.tp
        shared = part.weight_elements - part.experts * part.expert_elements
        flops = part.linear_flops - 2.0 * part.top_k * part.expert_elements
        return roof.seconds(tokens * flops / tp, shared * roof.element_bytes / tp) + roof.call_s

    def _routed_s(self, part: Part, tokens: Batch) -> Batch:
        if not part.experts:
            return np.zeros_like(tokens)
        roof, everyone = self.attention.roof, tokens * self.groups
        imbalance = expert_imbalance(everyone * part.top_k, self.cards)
        flops = everyone * 2.0 * part.top_k * part.expert_elements * imbalance / self.cards
        hit = distinct_experts(everyone, part.experts, part.top_k) / self.cards
        return roof.seconds(flops, hit * part.expert_elements * roof.element_bytes)

    def exchange_s(self, tokens: Batch) -> Batch:
        """Return the seconds that rows travel through all layers, there and back."""
        total = np.zeros_like(tokens)
        if self.cards == 1:
            return total
        hidden, card = self.attention.workload.hidden, self.card
        for part in self.attention.workload.of("ffn"):
            if not part.experts:
                continue
            # The card with the most chosen experts takes the most rows and sends them back.
            fullest = expert_imbalance(tokens * self.groups * part.top_k, self.cards)
            rows = tokens / self.attention.tp * fullest
            row = rows * hidden * (self.wire_bytes + RETURN_BYTES)
            near, far = travelled(self.cards, min(self.cards, card.server.cards), part.top_k)
            busy = np.zeros_like(tokens)
            if card.scale_up_bytes_per_s:
                busy = row * near / card.scale_up_bytes_per_s
            if far:
                assert card.nic_bytes_per_s, "columns leave out what has no NIC"
                busy = np.maximum(busy, row * far / (card.nic_bytes_per_s * all_to_all_share()))
            total = total + part.layers * (busy + 2 * self.attention.roof.message_s)
        return total

    def pass_s(self, tokens: Batch, in_flight: int) -> Batch:
        """Return the seconds of one token of ``in_flight`` micro-batches."""
        compute, exchange = self.compute_s(tokens), self.exchange_s(tokens)
        longest = in_flight * np.maximum(compute, exchange)
        return np.asarray(np.maximum(compute + exchange, longest))

    def weight_bytes(self) -> float:
        """Return the bytes of weights on one card."""
        local = routed = 0.0
        for part in self.attention.workload.of("ffn"):
            experts = part.experts * part.expert_elements
            local += part.layers * (part.weight_elements - experts)
            routed += part.layers * experts
        element_bytes = self.attention.roof.element_bytes
        ffn = (local / self.attention.tp + routed / self.cards) * element_bytes
        return self.attention.weight_bytes() + ffn


def travelled(cards: int, near_cards: int, top_k: int) -> tuple[float, float]:
    """Return to how many other cards of its server, and beyond, one token is expected to travel.

    A row goes to every card that holds one of its ``top_k`` experts, straight from its own: in
    decoding nothing is gathered and forwarded within the server that it arrives at.

    >>> travelled(8, 8, 1), travelled(2, 1, 1)
    ((0.875, 0.0), (0.0, 0.5))
    """
    each = 1 - (1 - 1 / cards) ** top_k
    return each * (near_cards - 1), each * (cards - near_cards)


@dataclass(frozen=True, slots=True)
class ColocatedColumn:
    """Colocated instances of one kind at their largest batch."""

    pool: int
    cards: int
    tp: int
    precision: str
    in_flight: int
    batch: int  # tokens of one group's micro-batch
    by_memory: int
    by_time: int
    pass_s: float
    stage: ColocatedStage

    @property
    def tokens_per_s(self) -> float:
        """Return what one instance serves."""
        return self.in_flight * self.batch * self.stage.groups / self.pass_s


def colocated_columns(problem: Problem, budget_s: float) -> Iterator[ColocatedColumn]:
    """Yield every colocated instance that keeps ``budget_s`` a token.

    The largest batch is the best: seconds per token never rise with the batch.
    """
    wire = ELEMENT_BYTES[problem.wire_dtype]
    for index, pool in enumerate(problem.pools):
        if not problem.allows("colocated", pool):
            continue
        for precision in precisions(pool.card, problem.excluded_dtypes):
            roof = Roof.of(pool.card, pool.efficiency, precision)
            for tp in degrees(pool):
                attention = AttentionStage(problem.workload, roof, tp, problem.context)
                for cards in instance_sizes(problem, index, tp):
                    stage = ColocatedStage(attention, pool.card, cards, wire)
                    for in_flight in IN_FLIGHT:
                        column = fitted(index, stage, precision, in_flight, budget_s)
                        if column is not None:
                            yield column


def instance_sizes(problem: Problem, index: int, tp: int) -> list[int]:
    """Return the card counts of an instance: the experts split evenly, whole servers beyond one."""
    pool = problem.pools[index]
    server = pool.server_cards
    sizes = {tp} if not any(p.experts for p in problem.workload.parts) else set()
    for ep in expert_degrees(problem.workload):
        within = ep <= server and (ep == 1 or pool.card.scale_up_bytes_per_s)
        beyond = ep > server and ep % server == 0 and pool.card.nic_bytes_per_s
        if ep % tp == 0 and (within or beyond) and ep // tp <= pool.groups(tp):
            sizes.add(ep)
    return sorted(sizes)


def fitted(
    pool: int, stage: ColocatedStage, precision: str, in_flight: int, budget_s: float
) -> ColocatedColumn | None:
    """Return the column at its largest batch; None if not even one sequence fits."""
    free = stage.card.memory_bytes * MEMORY_SHARE - stage.weight_bytes()
    by_memory = int(max(free, 0) / stage.attention.kv_bytes() / in_flight)
    if by_memory < 1:
        return None
    budget, most = np.array([budget_s]), np.array([float(min(2 * by_memory, MOST_TOKENS))])
    by_time = int(largest_batch(lambda b: stage.pass_s(b, in_flight), budget, most)[0])
    batch = min(by_memory, by_time)
    if batch < 1:
        return None
    pass_s = float(stage.pass_s(np.array([float(batch)]), in_flight)[0])
    tp = stage.attention.tp
    return ColocatedColumn(
        pool, stage.cards, tp, precision, in_flight, batch, by_memory, by_time, pass_s, stage
    )
