"""The planner's building blocks: every way to run attention or FFN on a pool, and its batch.

A clock is a pace that a whole split plan keeps: ``pass_s`` seconds a token, ``micro_batches`` in
flight. Attention and FFN each get ``share`` of the pass and the wires what is left, so that

    attention + wire + FFN + wire <= pass_s  and  micro_batches * (the longest of them) <= pass_s

hold by construction. At a given clock a column (pool, TP, precision; for FFN also EP) has one
largest batch, found by bisection; a smaller one costs the same cards and serves fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from step3_hetero.placement.network import NoWire, Wire, a2f_bytes, f2a_bytes
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

PACES = (
    (2, 3 / 8),
    (2, 1 / 4),
    (3, 1 / 3),
    (3, 1 / 4),
    (4, 1 / 4),
    (4, 1 / 5),
    (6, 1 / 6),
    (8, 1 / 8),
)
"""Micro-batches in flight, and attention's share of the pass, which is FFN's too.

Full use of the cards is one share for each micro-batch; a smaller one leaves the wires more. A
host-bounced edge makes eight hops, which eight micro-batches keep all busy.
"""

MOST_TOKENS = 2**24
"""No micro-batch is larger."""

FINEST_STEP_MS = 0.1


@dataclass(frozen=True, slots=True)
class Clocks:
    """The paces tried, as arrays of one length."""

    pass_s: npt.NDArray[np.float64]
    micro_batches: npt.NDArray[np.float64]
    share: npt.NDArray[np.float64]

    @classmethod
    def until(
        cls, tpot_s: float, jitter: float, paces: Sequence[tuple[int, float]] = PACES
    ) -> Self:
        """Return every pace up to a target; ``jitter`` is the share of the target kept free.

        Targets are taken at two significant digits of a millisecond (45, 46, ... 99, 100, 110):
        the paces for a looser target contain those for a tighter one, whence a looser target can
        never cost more.
        """
        steps = np.array(two_digit_steps_ms(tpot_s * 1e3)) * 1e-3 * (1 - jitter)
        in_flight, share = np.array(paces, float).T
        return cls(
            np.repeat(steps, len(paces)),
            np.tile(in_flight, len(steps)),
            np.tile(share, len(steps)),
        )

    def where(self, kept: npt.NDArray[np.bool_]) -> Clocks:
        """Return some of the paces."""
        return Clocks(self.pass_s[kept], self.micro_batches[kept], self.share[kept])

    @property
    def stage_s(self) -> npt.NDArray[np.float64]:
        """Return the seconds that attention, and FFN, may take in one pass."""
        return self.share * self.pass_s

    @property
    def wire_s(self) -> npt.NDArray[np.float64]:
        """Return the seconds that both directions may take in one pass, hop by hop."""
        return (1 - 2 * self.share) * self.pass_s

    @property
    def slot_s(self) -> npt.NDArray[np.float64]:
        """Return the seconds that one link may be busy with one micro-batch in one direction."""
        return self.pass_s / self.micro_batches

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.pass_s)


def two_digit_steps_ms(target_ms: float) -> list[float]:
    """Return the numbers of two significant digits up to a target, from `FINEST_STEP_MS` on.

    >>> two_digit_steps_ms(0.125)
    [0.1, 0.11, 0.12]
    """
    steps: list[float] = []
    exponent = round(np.log10(FINEST_STEP_MS)) - 1
    while 10 * 10.0**exponent <= target_ms:
        steps += [float(f"{digits}e{exponent}") for digits in range(10, 100)]
        exponent += 1
    return [step for step in steps if step <= target_ms * (1 + 1e-12)]


@dataclass(frozen=True, slots=True)
class AttentionColumn:
    """Attention instances of one kind, with their largest micro-batch at each clock."""

    pool: int
    tp: int
    precision: str
    stage: AttentionStage
    by_memory: Tokens
    by_time: Tokens

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
                by_time = largest_batch(stage.pass_s, clocks.stage_s, 2 * most)
                yield AttentionColumn(index, tp, precision, stage, by_memory, by_time)


def sequences_held(pool: Pool, stage: AttentionStage) -> float:
    """Return how many sequences fit beside the weights on one instance; below 0: not even they."""
    free = pool.card.memory_bytes * MEMORY_SHARE - stage.weight_bytes()
    return free / stage.kv_bytes()


def ffn_columns(problem: Problem, clocks: Clocks) -> Iterator[FfnColumn]:
    """Yield every kind of FFN set that holds its weights."""
    wire = ELEMENT_BYTES[problem.wire_dtype]
    for index, pool in enumerate(problem.pools):
        for precision in precisions(pool.card, problem.excluded_dtypes):
            roof = Roof.of(pool.card, pool.efficiency, precision)
            for tp in degrees(pool):
                for ep in expert_degrees(problem.workload):
                    stage = FfnStage(problem.workload, roof, tp, ep, wire)
                    fits = stage.weight_bytes() <= pool.card.memory_bytes * MEMORY_SHARE
                    if not fits or pool.groups(tp) < ep:
                        continue
                    most = np.minimum(stage.most_tokens(clocks.stage_s), MOST_TOKENS)
                    batch = largest_batch(stage.pass_s, clocks.stage_s, most)
                    yield FfnColumn(index, tp, ep, precision, stage, batch)


def degrees(pool: Pool) -> list[int]:
    """Return the degrees of tensor parallelism that a pool's servers and links allow."""
    linked = pool.card.scale_up_bytes_per_s is not None
    return [tp for tp in DEGREES if tp <= pool.server_cards and (linked or tp == 1)]


def expert_degrees(workload: Workload) -> list[int]:
    """Return over how many instances the experts can be split: the divisors of their number."""
    experts = [part.experts for part in workload.parts if part.experts]
    if not experts:
        return [1]
    common = int(np.gcd.reduce(experts))
    return [ep for ep in range(1, common + 1) if common % ep == 0]


@dataclass(frozen=True, slots=True)
class WireLimits:
    """Tokens of one micro-batch that one card may send and get back, by pair of pools and clock.

    An FFN set of ``ep`` instances divides both by ``ep``: every instance gets every token.
    """

    per_card: Mapping[tuple[int, int], npt.NDArray[np.float64]]
    kinds: Mapping[tuple[int, int], str]

    @classmethod
    def of(cls, problem: Problem, clocks: Clocks) -> Self:
        """Work out the limits of every pair of pools that a wire joins."""
        out, back = a2f_bytes(problem.workload, problem.wire_dtype), f2a_bytes(problem.workload)
        per_card, kinds = {}, {}
        for (a, f), wire in problem.wires.items():
            if isinstance(wire, NoWire):
                continue
            message_s = max(problem.pools[i].efficiency.message_s for i in (a, f))
            moving_s = clocks.wire_s - 2 * problem.workload.layers * message_s
            row = problem.workload.layers * wire.message_s_per_byte * (out + back)
            busy = problem.workload.layers * wire.busy_s_per_byte * max(out, back)
            per_card[a, f] = np.maximum(np.minimum(moving_s / row, clocks.slot_s / busy), 0)
            kinds[a, f] = wire.kind
        return cls(per_card, kinds)

    def tokens(self, a: int, f: int, cards: int, ep: int) -> Tokens:
        """Return the tokens that ``cards`` cards on one side of the wire can pass on."""
        if (a, f) not in self.per_card:
            return np.zeros(1)
        return np.floor(self.per_card[a, f] * cards / ep * (1 + 1e-12))
