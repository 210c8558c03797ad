"""The planner: the cheapest way to serve a model from pools of unlike cards, with its proof.

Two kinds of plan compete. A split plan runs at one pace; at every pace the planner knows a lower
bound in closed form (the best pair of columns, fractions of instances allowed), and solves the
integer program of `solve` pace by pace in the order of those bounds, until no bound is left below
the best plan found. A colocated plan needs no pace. The cheaper one wins; on a tie, not to split.

What a plan costs: all cards of every instance it uses, by the hour, over the tokens it serves.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from step3_hetero.placement import solve
from step3_hetero.placement.colocated import ColocatedColumn, colocated_columns
from step3_hetero.placement.plans import AnyPlan, ColocatedPlan, Request, SplitPlan
from step3_hetero.placement.space import MixAt, Space, Vector, server_rows


@dataclass(frozen=True, slots=True)
class Found:
    """The best plan of one kind and what is proven: no plan of the kind has a better score.

    Scores are cost per token, cost, or minus tokens per second: smaller is better.
    """

    plan: AnyPlan | None
    score: float
    bound: float
    programs: int = 0


def best_split(request: Request, space: Space | None = None, below: float = np.inf) -> Found:
    """Return the best split plan: clocks by their bounds, until none is below the best plan.

    Only one whose score is under ``below`` is looked for.
    """
    space = space or Space.of(request)
    if not space.attention or not space.ffn or not space.wires.any:
        return Found(None, np.inf, np.inf)
    per_token = space.per_token()
    bounds = clock_bounds(space, per_token)
    best, programs, proven = Found(None, below, below), 0, np.inf
    for clock in np.argsort(bounds, kind="stable"):
        if not bounds[clock] < clearly_below(best.score) or programs == request.programs:
            proven = min(proven, bounds[clock])
            break
        for pace_s, bound in paces_at(space, int(clock), per_token[clock]):
            if not bound < clearly_below(best.score) or programs == request.programs:
                proven = min(proven, bound)
                break
            found, bound = solve_at(space, space.mix(int(clock), pace_s), best.score)
            programs += 1
            proven = min(proven, bound)
            best = found or best
    bound = min(proven, best.score)
    if best.plan is None:
        return Found(None, np.inf, bound, programs)
    return Found(best.plan, best.score, bound, programs)


def clearly_below(score: float) -> float:
    """Return what a score has to be under to count as better."""
    return score - abs(score) * solve.SAME if np.isfinite(score) else score


def clock_bounds(space: Space, per_token: Vector) -> Vector:
    """Return a bound on the score of every plan at each clock: its best pair, at its own pace."""
    with np.errstate(divide="ignore"):
        at_own_pace = (per_token.min(axis=2) / space.rate).min(axis=1)
    fastest, passed = space.pass_s.min(axis=1), space.most_passed
    return np.array(
        [
            _bound(space, clock, fastest[clock], pair, float(passed[clock]))
            for clock, pair in enumerate(at_own_pace)
        ]
    )


def paces_at(space: Space, clock: int, per_token: Vector) -> list[tuple[float, float]]:
    """Return the paces of one clock, each with its bound, by their bounds.

    Of all plans at a pace none is cheaper than the best pair whose attention is no slower,
    fractions of instances allowed. Shape: per_token (I, J).
    """
    in_flight, found = float(space.clocks.micro_batches[clock]), []
    for pace_s in np.unique(space.pass_s[clock][np.isfinite(space.pass_s[clock])]):
        least = float(per_token[space.pass_s[clock] <= pace_s].min())
        by_tokens = space.request.objective == "tokens"
        passed = space.most_passed_at(clock, pace_s) if by_tokens else np.inf
        bound = _bound(space, clock, pace_s, least * pace_s / in_flight, passed)
        found.append((float(pace_s), bound))
    return sorted(found, key=lambda each: each[1])


def _bound(space: Space, clock: int, pace_s: float, pair: float, passed: float) -> float:
    """Return the bound on a score from the least cost of a token a second of any pair.

    For most tokens it rests on ``passed``: those of a micro-batch that all pools pass on.
    """
    request = space.request
    if request.by_ratio or not np.isfinite(pair):
        return float(pair)
    if request.objective == "tokens":
        return -passed * float(space.clocks.micro_batches[clock]) / pace_s
    assert request.demand is not None
    tokens = request.demand * pace_s / space.clocks.micro_batches[clock]
    cost_a, cost_f = space.costs()
    with np.errstate(divide="ignore"):
        # One side at a time, but at least one instance of each.
        a = cost_a * np.maximum(1, tokens / space.send[clock].max(axis=1))
        f = cost_f * np.maximum(1, tokens / space.take[clock].max(axis=0))
    return float(max(pair * request.demand, a.min() + f.min()))


def solve_at(space: Space, at: MixAt, best: float) -> tuple[Found | None, float]:
    """Solve one clock; return a plan that beats ``best``, if any, and the clock's bound."""
    request = space.request
    rate = float(space.clocks.micro_batches[at.clock]) / at.pass_s
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
    micro_batches = int(space.clocks.micro_batches[at.clock])
    served = counts.tokens * micro_batches / at.pass_s
    used_a = [n for n, count in enumerate(counts.attention) if count]
    used_f = [n for n, count in enumerate(counts.ffn) if count]
    demand = space.request.demand
    return SplitPlan(
        pools=space.request.problem.pools,
        clock=at.clock,
        pass_s=at.pass_s,
        micro_batches=micro_batches,
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
    """Return the best plan of either kind, and the proof; a split one only if it is the better."""
    started = time.perf_counter()
    space = Space.of(request)
    columns = all_colocated(request)
    colocated = best_colocated(request, columns)
    split = best_split(request, space, below=colocated.score)
    took = time.perf_counter() - started
    return Outcome(request, space, split, colocated, columns, took)
