"""The planner: the cheapest way to serve a model from pools of unlike cards, with its proof.

Two kinds of plan compete. A split plan runs at one clock; at every clock the planner knows a lower
bound in closed form (the best pair of columns, fractions of instances allowed), and solves the
integer program of `solve` clock by clock in the order of those bounds, until no bound is left below
the best plan found. A colocated plan needs no clock. The cheaper one wins; on a tie, not to split.

What a plan costs: all cards of every instance it uses, by the hour, over the tokens it serves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from step3_hetero.placement import solve
from step3_hetero.placement.colocated import ColocatedColumn, colocated_columns
from step3_hetero.placement.columns import (
    AttentionColumn,
    Clocks,
    FfnColumn,
    WireLimits,
    attention_columns,
    ffn_columns,
)
from step3_hetero.placement.plans import AnyPlan, ColocatedPlan, Request, SplitPlan
from step3_hetero.placement.pools import Pool

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Found:
    """The best plan of one kind and what is proven: no plan of the kind has a better score.

    Scores are cost per token, cost, or minus tokens per second: smaller is better.
    """

    plan: AnyPlan | None
    score: float
    bound: float
    programs: int = 0


@dataclass(frozen=True, slots=True)
class Space:
    """All columns at all clocks, what each pair can pass on, and what the pairs cost.

    Shapes: send, take (clocks, I, J): tokens of one micro-batch that an attention instance sends to
    an FFN set, and that the set takes; 0 where there is no way.
    """

    request: Request
    clocks: Clocks
    attention: tuple[AttentionColumn, ...]
    ffn: tuple[FfnColumn, ...]
    wires: WireLimits
    send: Vector = field(repr=False)
    take: Vector = field(repr=False)

    @classmethod
    def of(cls, request: Request) -> Space:
        """Enumerate the columns up to the request's target."""
        clocks = Clocks.until(request.tpot_s, request.jitter, request.paces)
        least = min(p.efficiency.message_s for p in request.problem.pools)
        messages_s = 2 * request.problem.workload.layers * least
        clocks = clocks.where(clocks.wire_s > messages_s)
        attention = tuple(attention_columns(request.problem, clocks))
        ffn = tuple(ffn_columns(request.problem, clocks))
        wires = WireLimits.of(request.problem, clocks)
        shape = (len(clocks), len(attention), len(ffn))
        send, take = np.zeros(shape), np.zeros(shape)
        for j, f in enumerate(ffn):
            for i, a in enumerate(attention):
                send[:, i, j] = np.minimum(a.capacity, wires.tokens(a.pool, f.pool, a.cards, f.ep))
                take[:, i, j] = np.minimum(f.capacity, wires.tokens(a.pool, f.pool, f.cards, f.ep))
        return cls(request, clocks, attention, ffn, wires, send, take)

    @property
    def rate(self) -> Vector:
        """Return tokens per second for each token of a micro-batch, by clock."""
        rate: Vector = self.clocks.micro_batches / self.clocks.pass_s
        return rate

    def costs(self) -> tuple[Vector, Vector]:
        """Return what one instance of each column adds to the objective."""
        each = np.array([self.request.card_cost(p) for p in self.request.problem.pools])
        a = np.array([each[c.pool] * c.cards for c in self.attention])
        f = np.array([each[c.pool] * c.cards for c in self.ffn])
        return a, f

    def pair_scores(self) -> Vector:
        """Return the cost per token per second of each pair alone, fractions allowed.

        Shapes: (clocks, I, J). A set takes no more than all attention cards can send it, an
        instance sends no more than all sets can take: in a small pool that is what counts.
        """
        cost_a, cost_f = self.costs()
        send = np.minimum(self.send, self._most(self.take, self.ffn, axis=1)[:, None, None])
        take = np.minimum(self.take, self._most(self.send, self.attention, axis=2)[:, None, None])
        with np.errstate(divide="ignore"):
            per_token = cost_a[:, None] / send + cost_f / take
        return np.asarray(per_token / self.rate[:, None, None])

    def _most(
        self, tokens: Vector, columns: Sequence[AttentionColumn] | Sequence[FfnColumn], axis: int
    ) -> Vector:
        """Return the most that all pools together can pass on, each with its best column."""
        total = np.zeros(len(self.clocks))
        best = tokens.max(axis=axis, initial=0)
        sizes = [(c.pool, c.tp, c.cards) for c in columns]
        for p, pool in enumerate(self.request.problem.pools):
            mine = [
                best[:, n] * (pool.groups(tp) // (cards // tp))
                for n, (place, tp, cards) in enumerate(sizes)
                if place == p
            ]
            total += np.max(mine, axis=0) if mine else 0.0
        return total

    def mix(self, clock: int, pools: tuple[int, int] | None = None) -> MixAt:
        """Return the integer program at one clock, without columns that others replace.

        ``pools``: attention on the one, FFN on the other alone.
        """
        send, take = self.send[clock], self.take[clock]
        cards_a = np.array([float(c.cards) for c in self.attention])
        cards_f = np.array([float(c.cards) for c in self.ffn])
        i = solve.undominated(cards_a, send, take, [c.pool for c in self.attention])
        j = solve.undominated(cards_f, take.T, send.T, [c.pool for c in self.ffn])
        if pools is not None:
            i = [n for n in i if self.attention[n].pool == pools[0]]
            j = [n for n in j if self.ffn[n].pool == pools[1]]
        cost_a, cost_f = self.costs()
        used: list[AttentionColumn | FfnColumn] = [self.attention[n] for n in i]
        used += [self.ffn[n] for n in j]
        rows, limits = server_rows(
            self.request.problem.pools, [(c.pool, c.tp, c.cards // c.tp) for c in used]
        )
        at = np.ix_(i, j)
        return MixAt(clock, i, j, solve.Mix(cost_a[i], cost_f[j], send[at], take[at], rows, limits))


def server_rows(
    pools: Sequence[Pool], columns: Sequence[tuple[int, int, int]]
) -> tuple[Vector, Vector]:
    """Return rows and limits that make groups of cards fit servers.

    ``columns`` holds pool, cards of a group and groups of each column. For each size the groups at
    least that large take no more cards than groups of that size could; with sizes that divide each
    other this is not only necessary but enough.
    """
    rows, limits = [], []
    for p, pool in enumerate(pools):
        for size in sorted({tp for q, tp, _ in columns if q == p}):
            row = [float(tp * g) if q == p and tp >= size else 0.0 for q, tp, g in columns]
            rows.append(row)
            limits.append(float(size * pool.groups(size)))
    return np.array(rows).reshape(len(rows), len(columns)), np.array(limits)


@dataclass(frozen=True, slots=True)
class MixAt:
    """A program, its clock, and which columns its rows are."""

    clock: int
    attention: Sequence[int]
    ffn: Sequence[int]
    mix: solve.Mix


def best_split(request: Request, space: Space | None = None) -> Found:
    """Return the best split plan: clocks by their bounds, until none is below the best plan."""
    space = space or Space.of(request)
    none = Found(None, np.inf, np.inf)
    if not space.attention or not space.ffn or not space.wires.per_card:
        return none
    bounds = clock_bounds(space)
    best, programs = none, 0
    proven = np.inf
    for clock in np.argsort(bounds, kind="stable"):
        if not bounds[clock] < clearly_below(best.score):
            break
        at = space.mix(int(clock))
        found, bound = solve_at(space, at, best.score)
        programs += 1
        proven = min(proven, bound)
        if found is not None:
            best = found
    return Found(best.plan, best.score, min(proven, best.score), programs)


def clearly_below(score: float) -> float:
    """Return what a score has to be under to count as better."""
    return score - abs(score) * solve.SAME if np.isfinite(score) else score


def clock_bounds(space: Space) -> Vector:
    """Return a bound on the score of every plan at each clock."""
    request = space.request
    pairs = space.pair_scores().min(axis=(1, 2))
    if request.by_ratio:
        return np.asarray(pairs)
    if request.objective == "tokens":
        pools = request.problem.pools
        total = sum(request.card_cost(p) * p.cards for p in pools)
        return np.asarray(-total / pairs)
    assert request.demand is not None
    tokens = request.demand / space.rate
    cost_a, cost_f = space.costs()
    with np.errstate(divide="ignore"):
        # One side at a time, but at least one instance of each.
        a = cost_a * np.maximum(1, tokens[:, None] / space.send.max(axis=2))
        f = cost_f * np.maximum(1, tokens[:, None] / space.take.max(axis=1))
    return np.asarray(np.maximum(pairs * request.demand, a.min(axis=1) + f.min(axis=1)))


def solve_at(space: Space, at: MixAt, best: float) -> tuple[Found | None, float]:
    """Solve one clock; return a plan that beats ``best``, if any, and the clock's bound."""
    request, rate = space.request, float(space.rate[at.clock])
    if request.by_ratio:
        answer = solve.cheapest_per_token(at.mix, best * rate, request.seconds)
        bound = answer.bound / rate
    elif request.objective == "tokens":
        answer = solve.most_tokens(
            at.mix, request.seconds, -best / rate if np.isfinite(best) else 0.0
        )
        bound = -answer.bound * rate
    else:
        assert request.demand is not None
        answer = solve.cheapest_for(at.mix, request.demand / rate, best, request.seconds)
        bound = answer.bound
    if answer.counts is None:
        return None, bound
    plan = _split_plan(space, at, answer.counts)
    score = score_of(request, plan)
    return (Found(plan, score, bound) if score < best else None), min(bound, score)


def _split_plan(space: Space, at: MixAt, counts: solve.Counts) -> SplitPlan:
    served = counts.tokens * float(space.rate[at.clock])
    used_a = [n for n, count in enumerate(counts.attention) if count]
    used_f = [n for n, count in enumerate(counts.ffn) if count]
    demand = space.request.demand
    return SplitPlan(
        pools=space.request.problem.pools,
        clock=at.clock,
        pass_s=float(space.clocks.pass_s[at.clock]),
        micro_batches=int(space.clocks.micro_batches[at.clock]),
        attention=tuple(
            (space.attention[at.attention[n]], int(counts.attention[n])) for n in used_a
        ),
        ffn=tuple((space.ffn[at.ffn[n]], int(counts.ffn[n])) for n in used_f),
        flow=counts.flow[np.ix_(used_a, used_f)],
        tokens_per_s=served if demand is None else min(served, demand),
        cost=counts.cost,
    )


def score_of(request: Request, plan: AnyPlan) -> float:
    """Return the plan's score: cost per token, cost, or minus tokens per second."""
    if request.objective == "tokens":
        return -plan.tokens_per_s
    return plan.cost / plan.tokens_per_s if request.by_ratio else plan.cost


def all_colocated(request: Request) -> tuple[ColocatedColumn, ...]:
    """Return every colocated column within the request's target."""
    budget = request.tpot_s * (1 - request.jitter)
    return tuple(colocated_columns(request.problem, budget))


def best_colocated(request: Request, columns: Sequence[ColocatedColumn] | None = None) -> Found:
    """Return the best colocated plan of some columns (by default of all)."""
    columns = all_colocated(request) if columns is None else columns
    if not columns:
        return Found(None, np.inf, np.inf)
    cost = np.array([request.card_cost(request.problem.pools[c.pool]) * c.cards for c in columns])
    served = np.array([c.tokens_per_s for c in columns])
    rows, limits = server_rows(
        request.problem.pools, [(c.pool, c.tp, c.cards // c.tp) for c in columns]
    )
    if request.by_ratio:
        best = int(np.argmin(cost / served))
        one = np.zeros(len(columns), np.int64)
        one[best] = 1
        used = rows @ one
        counts = one * int(min(np.floor(limits[used > 0] / used[used > 0])))
        bound = float(cost[best] / served[best])
    else:
        counts, bound = solve.knapsack(cost, served, rows, limits, request.demand, request.seconds)
    if not counts.any():
        return Found(None, np.inf, bound)
    tokens = float(served @ counts)
    plan = ColocatedPlan(
        tuple((c, int(n)) for c, n in zip(columns, counts, strict=True) if n),
        tokens if request.demand is None else min(tokens, request.demand),
        float(cost @ counts),
    )
    score = score_of(request, plan)
    return Found(plan, score, min(bound, score))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Both kinds of plan, and which wins; ``plan`` is None where nothing is feasible."""

    request: Request
    space: Space
    split: Found
    colocated: Found
    columns: tuple[ColocatedColumn, ...] = field(repr=False)
    solve_s: float

    @property
    def winner(self) -> Found:
        """Return the better of the two; on a tie the colocated one."""
        better = self.split.score < clearly_below(self.colocated.score)
        return self.split if better else self.colocated

    @property
    def plan(self) -> AnyPlan | None:
        """Return the winner's plan."""
        return self.winner.plan

    @property
    def bound(self) -> float:
        """Return the proven bound over both kinds."""
        return min(self.split.bound, self.colocated.bound)


def plan(request: Request) -> Outcome:
    """Return the best plan of either kind, and the proof."""
    started = time.perf_counter()
    space = Space.of(request)
    columns = all_colocated(request)
    split, colocated = best_split(request, space), best_colocated(request, columns)
    took = time.perf_counter() - started
    return Outcome(request, space, split, colocated, columns, took)
