"""The planner's building blocks: every way to run attention or FFN on a pool, and its batch.

A clock is a pace that a whole split plan keeps through the layers: ``body_s`` seconds a token,
``micro_batches`` in flight. Each layer has one ``slot`` of it; attention, FFN and a link in one
direction each get ``share`` of the slot at most, and the wires what attention and the FFN's share
leave, so that in every layer

    attention + wire + FFN + wire <= slot  and  micro_batches * (the longest of them) <= slot

hold where all layers are alike. At a given clock a column (pool, TP, precision; for FFN also EP)
has one largest batch, found by bisection; a smaller one costs the same cards and serves fewer
tokens. Embedding, head and kinds of layer that differ from each other come on top: `pace.pass_s`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from step3_hetero.placement.network import NoWire, Wire
from step3_hetero.placement.performance import (
    MEMORY_SHARE,
    AttentionStage,
    Batch,
    FfnStage,
    Roof,
    precisions,
)
from step3_hetero.placement.pools import Pool
from step3_hetero.placement.workload import ELEMENT_BYTES, Workload

Tokens = npt.NDArray[np.float64]
"""Whole numbers of tokens, one for each clock."""

DEGREES = (1, 2, 4, 8)
"""Of tensor parallelism: a power of two of cards within one server."""

PACES = ((2, 3 / 8), (3, 1 / 3), (4, 1 / 4), (6, 1 / 6), (8, 1 / 8))
"""Micro-batches in flight, and the FFN's share of a layer, which is attention's at most.

Full use of the cards is one share for each micro-batch; two of them leave the wires something. A
host-bounced edge makes eight hops, which eight micro-batches keep all busy.
"""

MOST_TOKENS = 2**24
"""No micro-batch is larger."""

FINEST_MS = 0.1

STEP = 2
"""In the third digit of a pace in milliseconds: 0.2 % to 2 %."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """The paces tried, as arrays of one length."""

    body_s: npt.NDArray[np.float64]
    micro_batches: npt.NDArray[np.float64]
    share: npt.NDArray[np.float64]
    layers: int

    @classmethod
    def until(
        cls,
        tpot_s: float,
        jitter: float,
        layers: int,
        paces: Sequence[tuple[int, float]] = PACES,
        step: int = STEP,
    ) -> Self:
        """Return every pace up to a target; ``jitter`` is the share of the target kept free.

        The paces for a looser target contain those for a tighter one, whence a looser target can
        never cost more.
        """
        steps = np.array(steps_ms(tpot_s * 1e3, step)) * 1e-3 * (1 - jitter)
        in_flight, share = np.array(paces, float).T
        return cls(
            np.repeat(steps, len(paces)),
            np.tile(in_flight, len(steps)),
            np.tile(share, len(steps)),
            layers,
        )

    def where(self, kept: npt.NDArray[np.bool_]) -> Clocks:
        """Return some of the paces."""
        return Clocks(self.body_s[kept], self.micro_batches[kept], self.share[kept], self.layers)

    @property
    def slot_s(self) -> npt.NDArray[np.float64]:
        """Return the seconds of one layer."""
        return self.body_s / self.layers

    @property
    def stage_s(self) -> npt.NDArray[np.float64]:
        """Return the seconds of a layer that one micro-batch may keep any of them busy."""
        return self.share * self.slot_s

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.body_s)


def steps_ms(target_ms: float, step: int = STEP) -> list[float]:
    """Return the paces up to a target, from `FINEST_MS` on.

    >>> steps_ms(0.103)
    [0.1, 0.102]
    """
    steps: list[float] = []
    exponent = round(np.log10(FINEST_MS)) - 2
    while 100 * 10.0**exponent <= target_ms:
        steps += [float(f"{digits}e{exponent}") for digits in range(100, 1000, step)]
        exponent += 1
    return [pace for pace in steps if pace <= target_ms * (1 + 1e-12)]


@dataclass(frozen=True, slots=True)
class AttentionColumn:
    """Attention instances of one kind, with their largest micro-batch at each clock."""

    pool: int
    tp: int
    precision: str
    stage: AttentionStage
    by_memory: Tokens
    by_time: Tokens
    longest_s: npt.NDArray[np.float64]
    """Seconds of one layer of the longest kind at this batch, at most the clock's share."""

    @property
    def cards(self) -> int:
        """Return the cards of one instance."""
        return self.tp

    @property
    def capacity(self) -> Tokens:
        """Return the tokens of one micro-batch of one instance."""
        return np.minimum(self.by_memory, self.by_time)


@dataclass(frozen=True, slots=True)
class FfnColumn:
    """FFN sets of one kind, with the largest micro-batch they take at each clock."""

    pool: int
    tp: int
    ep: int
    precision: str
    stage: FfnStage
    capacity: Tokens

    @property
    def cards(self) -> int:
        """Return the cards of one set."""
        return self.tp * self.ep


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be planned: model, pools, and the wires that may be used."""

    workload: Workload
    pools: tuple[Pool, ...]
    context: int
    wires: Mapping[tuple[int, int], Wire | NoWire]
    excluded_dtypes: frozenset[str] = frozenset()
    excluded_roles: frozenset[tuple[str, str]] = frozenset()
    """("attention", card), ("ffn", card), ("colocated", "")."""

    def allows(self, role: str, pool: Pool) -> bool:
        """Return whether a pool may run a role: attention, ffn, or colocated for both."""
        if role == "colocated":
            both = self.allows("attention", pool) and self.allows("ffn", pool)
            return both and ("colocated", "") not in self.excluded_roles
        return (role, pool.card.name) not in self.excluded_roles

    @property
    def wire_dtype(self) -> str:
        """Return the dtype from attention to FFN: eight bits with scales unless excluded."""
        eight = [d for d in ("fp8", "int8") if d not in self.excluded_dtypes]
        both = all("fp8" in pool.card.flops_per_s for pool in self.pools)
        return next((d for d in eight if d == "int8" or both), "bf16")


def largest_batch(seconds: Callable[[Batch], Batch], budget_s: Batch, most: Batch) -> Tokens:
    """Return the largest whole batch, at most ``most``, whose seconds fit each budget; 0: none.

    ``seconds`` must not fall as the batch grows.
    """
    low, high = np.zeros_like(budget_s), np.floor(np.maximum(most, 0)) + 1
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        fits = seconds(np.maximum(middle, 1)) <= budget_s
        fits |= middle < 1
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return low


def attention_columns(problem: Problem, clocks: Clocks) -> Iterator[AttentionColumn]:
    """Yield every kind of attention instance that holds its weights and some sequence."""
    for index, pool in enumerate(problem.pools):
        if not problem.allows("attention", pool):
            continue
        for precision in precisions(pool.card, problem.excluded_dtypes):
            roof = Roof.of(pool.card, pool.efficiency, precision)
            for tp in degrees(pool):
                stage = AttentionStage(problem.workload, roof, tp, problem.context)
                held = sequences_held(pool, stage)
                by_memory = np.floor(np.maximum(held, 0) / clocks.micro_batches)
                most = np.minimum(by_memory, MOST_TOKENS)
                if not most.any():
                    continue
                # What time alone would allow is only wanted for the explanation: one above.
                by_time = largest_batch(stage.layers_s, clocks.share * clocks.body_s, 2 * most)
                batch = np.minimum(by_memory, by_time)
                longest_s = np.minimum(stage.longest_s(np.maximum(batch, 1)), clocks.stage_s)
                yield AttentionColumn(index, tp, precision, stage, by_memory, by_time, longest_s)


def sequences_held(pool: Pool, stage: AttentionStage) -> float:
    """Return how many sequences fit beside the weights on one instance; below 0: not even they."""
    free = pool.card.memory_bytes * MEMORY_SHARE - stage.weight_bytes()
    return free / stage.kv_bytes()


def ffn_columns(problem: Problem, clocks: Clocks) -> Iterator[FfnColumn]:
    """Yield every kind of FFN set that holds its weights."""
    wire = ELEMENT_BYTES[problem.wire_dtype]
    for index, pool in enumerate(problem.pools):
        if not problem.allows("ffn", pool):
            continue
        for precision in precisions(pool.card, problem.excluded_dtypes):
            roof = Roof.of(pool.card, pool.efficiency, precision)
            for tp in degrees(pool):
                for ep in expert_degrees(problem.workload):
                    stage = FfnStage(problem.workload, roof, tp, ep, wire)
                    fits = stage.weight_bytes() <= pool.card.memory_bytes * MEMORY_SHARE
                    if not fits or pool.groups(tp) < ep:
                        continue
                    most = np.minimum(stage.most_tokens(clocks.stage_s), MOST_TOKENS)
                    batch = largest_batch(stage.longest_s, clocks.stage_s, most)
                    yield FfnColumn(index, tp, ep, precision, stage, batch)


def degrees(pool: Pool) -> list[int]:
    """Return the degrees of tensor parallelism that a pool's servers and links allow."""
    linked = pool.card.scale_up_bytes_per_s is not None
    return [tp for tp in DEGREES if tp <= pool.server_cards and (linked or tp == 1)]


def largest_set(pool: Pool, workload: Workload) -> int:
    """Return the cards of the largest FFN set that a pool's servers hold."""
    sets = [
        tp * ep for tp in degrees(pool) for ep in expert_degrees(workload) if ep <= pool.groups(tp)
    ]
    return max(sets, default=0)


def offered(pool: Pool, workload: Workload, need_bytes: float) -> tuple[float, str]:
    """Return the bytes that a pool offers to FFN weights, and who offers them, in words.

    All of its cards; where these would do, the largest set that comes out even.
    """
    each = pool.card.memory_bytes * MEMORY_SHARE
    if need_bytes > pool.cards * each:
        return pool.cards * each, f"{pool.cards} {pool.name} offer"
    held = largest_set(pool, workload)
    return held * each, f"the largest set of {pool.cards} {pool.name} has {held}, which offer"


def expert_degrees(workload: Workload) -> list[int]:
    """Return over how many instances the experts can be split: the divisors of their number."""
    experts = [part.experts for part in workload.parts if part.experts]
    if not experts:
        return [1]
    common = int(np.gcd.reduce(experts))
    return [ep for ep in range(1, common + 1) if common % ep == 0]
