"""What a plan costs against context, and against latency: the curves of a report.

Both are the planner's own columns at fractions of instances: what large pools come to. Contexts and
targets are powers of two around what was asked; there are fewer paces, save at the context asked
for, where the curve of the plan must not lie above the plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from step3_hetero.placement.network import Wire
from step3_hetero.placement.planner import Outcome, all_colocated
from step3_hetero.placement.plans import AnyPlan, ColocatedPlan, Request
from step3_hetero.placement.space import Space

AROUND = (1 / 4, 1 / 2, 1, 2, 4)
"""Contexts and targets, of what was asked."""

STEP = 5
"""In the third digit of a pace: 0.5 % to 5 %."""

MOST_LINES = 6
"""Placements whose cost is drawn, the cheapest ones at the context asked for."""


def curves(outcome: Outcome) -> dict[str, Any]:
    """Return ``cost_by_context`` and ``pareto``; nothing where no cost or no plan is there."""
    plan, request = outcome.plan, replace(outcome.request, demand=None)
    if plan is None or request.objective != "usd":
        return {}
    return {
        "cost_by_context": _cost_by_context(request, plan),
        "pareto": _pareto(replace(request, pace_step=STEP), outcome, plan),
    }


def _cost_by_context(request: Request, plan: AnyPlan) -> list[dict[str, Any]]:
    contexts = [max(1, round(request.problem.context * times)) for times in AROUND]
    found = {}
    for context in contexts:
        step = request.pace_step if context == request.problem.context else STEP
        problem = replace(request.problem, context=context)
        asked = replace(request, problem=problem, pace_step=step)
        found[context] = dict(_by_placement(asked))
    at_asked = found[contexts[AROUND.index(1)]]
    chosen = _placement(plan, request)
    labels = sorted(at_asked, key=lambda label: (label != chosen, at_asked[label]))
    return [
        {
            "label": label,
            "chosen": label == chosen,
            "points": [{"context": c, "usd_per_mtok": found[c].get(label)} for c in sorted(found)],
        }
        for label in labels[:MOST_LINES]
    ]


def _placement(plan: AnyPlan, request: Request) -> str:
    """Return where the most of a plan runs, as the curves call it."""
    pools = request.problem.pools
    if isinstance(plan, ColocatedPlan):
        column = max(plan.columns, key=lambda each: each[0].cards * each[1])[0]
        return f"colocated on {pools[column.pool].name}"
    a = max(plan.attention, key=lambda each: each[0].cards * each[1])[0]
    f = max(plan.ffn, key=lambda each: each[0].cards * each[1])[0]
    return _split_label(request, a.pool, f.pool)


def _split_label(request: Request, a: int, f: int) -> str:
    pools = request.problem.pools
    return f"attention on {pools[a].name}, FFN on {pools[f].name}"


def _by_placement(request: Request) -> Iterator[tuple[str, float]]:
    """Yield each placement that is feasible, with its least cost."""
    columns = all_colocated(request)
    for p, pool in enumerate(request.problem.pools):
        card = request.card_cost(pool)
        costs = [card * c.cards / c.tokens_per_s for c in columns if c.pool == p]
        if costs:
            yield f"colocated on {pool.name}", min(costs)
    space = Space.of(request)
    if not space.attention or not space.ffn:
        return
    scores = space.pair_scores().min(axis=0)
    attention = np.array([c.pool for c in space.attention])
    ffn = np.array([c.pool for c in space.ffn])
    for (a, f), wire in request.problem.wires.items():
        of_pair = scores[np.ix_(attention == a, ffn == f)]
        if isinstance(wire, Wire) and np.isfinite(of_pair).any():
            yield _split_label(request, a, f), float(of_pair.min())


def _pareto(request: Request, outcome: Outcome, plan: AnyPlan) -> list[dict[str, Any]]:
    """Return the cheapest placement at each target that a tighter one does not reach as well."""
    found: list[dict[str, Any]] = []
    for times in AROUND:
        tpot_s = request.tpot_s * times
        if times == 1:
            usd = outcome.winner.score / (outcome.request.demand or 1)
            point = {"label": _placement(plan, request), "usd_per_mtok": usd, "chosen": True}
        else:
            costs = dict(_by_placement(replace(request, tpot_s=tpot_s)))
            if not costs:
                continue
            label = min(costs, key=lambda name: costs[name])
            point = {"label": label, "usd_per_mtok": costs[label]}
        if not found or point["usd_per_mtok"] < found[-1]["usd_per_mtok"] or times == 1:
            found.append({"tpot_ms": tpot_s * 1e3, **point})
    return found
