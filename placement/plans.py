"""What is asked of the planner, and the two kinds of plan that it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from step3_hetero.placement.colocated import ColocatedColumn
from step3_hetero.placement.columns import (
    PACES,
    STEP,
    AttentionColumn,
    FfnColumn,
    Problem,
)
from step3_hetero.placement.pools import Pool

Vector = npt.NDArray[np.float64]
Objective = Literal["usd", "tokens", "cards"]

JITTER = 0.10
"""The part of the latency target kept free for jitter."""

MILLION = 1e6
SECONDS_PER_HOUR = 3600.0


def money(usd: float | None) -> str:
    """Write dollars per million tokens with three digits that say something.

    >>> money(0.05512), money(1.5), money(1.384e-05), money(None)
    ('$0.0551', '$1.500', '$1.38e-05', '–')
    """
    if usd is None:
        return "–"
    if abs(usd) >= 1:
        return f"${usd:.3f}"
    return f"${usd:.4f}" if abs(usd) >= 0.01 or not usd else f"${usd:.3g}"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: a problem, a latency, and what to make small (or, for tokens, large)."""

    problem: Problem
    tpot_s: float
    objective: Objective = "usd"
    demand: float | None = None  # tokens per second
    jitter: float = JITTER
    paces: tuple[tuple[int, float], ...] = PACES
    seconds: float = 30.0  # of one integer program; one that stops early leaves a gap
    programs: int = 1_000  # solved at most; more leave a gap
    pace_step: int = STEP

    def card_cost(self, pool: Pool) -> float:
        """Return what a card adds to the objective: dollars per million seconds, or one.

        Of plans that serve the most tokens the cheapest counts; where a card has no price, the one
        of the fewest cards.
        """
        if self.objective == "cards":
            return 1.0
        if self.objective == "tokens" and any(
            p.card.usd_per_hour is None for p in self.problem.pools
        ):
            return 1.0
        return pool.card.price() / SECONDS_PER_HOUR * MILLION

    @property
    def by_ratio(self) -> bool:
        """Return whether the objective is a cost per token."""
        return self.demand is None and self.objective != "tokens"


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Instances of attention and FFN columns at one clock."""

    pools: tuple[Pool, ...]
    clock: int
    pass_s: float
    micro_batches: int
    attention: tuple[tuple[AttentionColumn, int], ...]
    ffn: tuple[tuple[FfnColumn, int], ...]
    flow: Vector  # tokens of one micro-batch, (attention, ffn)
    tokens_per_s: float
    cost: float

    def cards(self, pools: Sequence[Pool]) -> dict[str, int]:
        """Return the cards used, by pool."""
        return _cards(pools, (*self.attention, *self.ffn))


@dataclass(frozen=True, slots=True)
class ColocatedPlan:
    """Instances of colocated columns."""

    columns: tuple[tuple[ColocatedColumn, int], ...]
    tokens_per_s: float
    cost: float

    @property
    def pass_s(self) -> float:
        """Return the seconds of a token on the slowest instance."""
        return max(column.pass_s for column, _ in self.columns)

    def cards(self, pools: Sequence[Pool]) -> dict[str, int]:
        """Return the cards used, by pool."""
        return _cards(pools, self.columns)


AnyPlan = SplitPlan | ColocatedPlan

AnyColumn = AttentionColumn | FfnColumn | ColocatedColumn


def _cards(pools: Sequence[Pool], used: Sequence[tuple[AnyColumn, int]]) -> dict[str, int]:
    counted = {pool.name: 0 for pool in pools}
    for column, count in used:
        counted[pools[column.pool].name] += count * column.cards
    return counted
