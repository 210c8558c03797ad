"""Why nothing is feasible: what kills the last candidate, by how much, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from step3_hetero.placement.columns import Problem, degrees, offered
from step3_hetero.placement.network import NoWire, Wire
from step3_hetero.placement.performance import MEMORY_SHARE, precisions
from step3_hetero.placement.planner import best_colocated, best_split
from step3_hetero.placement.plans import Request
from step3_hetero.placement.pools import MOST_CARDS, Pool
from step3_hetero.placement.space import Space, server_rows
from step3_hetero.placement.workload import ELEMENT_BYTES

SLOWEST_S = 100.0
"""No latency target beyond this is suggested."""

STEPS = 24
"""Halvings of the interval in which a suggestion lies."""


def is_feasible(request: Request) -> bool:
    """Return whether some plan keeps the latency, whatever it costs; a demand is left aside."""
    asked = replace(request, objective="cards", demand=None)
    if best_colocated(asked).plan is not None:
        return True
    space = Space.of(asked)
    pairs = np.argwhere((space.send > 0).any(axis=0)) if space.attention and space.ffn else ()
    return any(_fit_together(space, int(i), int(j)) for i, j in pairs)


def _fit_together(space: Space, i: int, j: int) -> bool:
    """Return whether the servers hold one instance of an attention and of an FFN column."""
    a, f = space.attention[i], space.ffn[j]
    groups = [(a.pool, a.tp, 1), (f.pool, f.tp, f.ep)]
    rows, limits = server_rows(space.request.problem.pools, groups)
    return bool((rows.sum(axis=1) <= limits).all())


def why_infeasible(request: Request) -> str:
    """Return one sentence: the constraint, by how much it is missed, and the nearest change."""
    if request.demand is not None and is_feasible(request):
        return _too_little(request)
    if excluded := _excluded(request.problem):
        return excluded
    changes = list(_changes(request))
    missing = sorted({w.reason for w in request.problem.wires.values() if isinstance(w, NoWire)})
    said = _memory(request.problem) or _time(request)
    help_ = f"; nearest change: {' or '.join(changes)}" if changes else ""
    return said + help_ + (f"; left out: {'; '.join(missing)}" if missing else "")


def _excluded(problem: Problem) -> str:
    """Say which role no pool may run; empty: each has one."""
    for role in ("attention", "ffn"):
        if not any(problem.allows(role, pool) for pool in problem.pools):
            cards = sorted({pool.card.name for pool in problem.pools})
            each = " or ".join(f"--exclude {role}:{card}" for card in cards)
            return f"exclusions: no card is left for {role}; leave out {each}"
    return ""


def _too_little(request: Request) -> str:
    assert request.demand is not None
    asked = replace(request, objective="tokens", demand=None)
    scores = [best_split(asked).score, best_colocated(asked).score]
    most = -min(scores)
    times = request.demand / most
    return (
        f"demand: the pools serve at most {most:.0f} of {request.demand:.0f} tokens/s "
        f"({1 - most / request.demand:.1%} short); nearest change: --demand {np.floor(most):.0f} "
        f"or about {times:.2f} times the cards"
    )


def _memory(problem: Problem) -> str:
    """Say by how much the weights miss the memory of every pool; empty where some pool holds them.

    Attention and FFN may lie in different pools, so each is held against its best pool.
    """
    for stage in ("ffn", "attention"):
        short: list[tuple[float, str]] = []
        for pool in problem.pools:
            allowed = precisions(pool.card, problem.excluded_dtypes)
            if not allowed:
                continue
            need = problem.workload.weight_elements(stage) * ELEMENT_BYTES[allowed[0]]
            have, who = pool.cards * pool.card.memory_bytes * MEMORY_SHARE, ""
            if stage == "ffn":
                have, who = offered(pool, problem.workload, need)
            text = (
                f"memory: the {stage} weights take {need / 1e9:.1f} GB in {allowed[0]}, "
                f"{who or f'{pool.cards} {pool.name} offer'} {have / 1e9:.1f} GB"
            )
            short.append((need - have, text))
        if not short and not any(pool.card.flops_per_s for pool in problem.pools):
            names = " and ".join(pool.name for pool in problem.pools)
            return f"arithmetic: the catalogue has no tflops of {names}"
        if not short:
            return "dtypes: every precision of every card is excluded"
        if min(short)[0] > 0:
            return min(short)[1]
    return ""


def _time(request: Request) -> str:
    least = _least(lambda s: replace(request, tpot_s=s), request.tpot_s, SLOWEST_S)
    if least is None:
        return (
            _apart(request)
            or "memory: no pool holds its weights beside one sequence of this context"
        )
    return (
        f"latency: the fastest plan takes {least * 1e3:.3g} ms a token, jitter margin included, "
        f"the target is {request.tpot_s * 1e3:g} ms ({least / request.tpot_s - 1:.0%} over)"
    )


def _apart(request: Request) -> str:
    """Say that cards which would hold the model have no way to each other; empty: they have."""
    if any(isinstance(wire, Wire) for wire in request.problem.wires.values()):
        return ""
    linked = [p.name for p in request.problem.pools if max(degrees(p)) > 1]
    if linked:
        return ""
    names = " and ".join(p.name for p in request.problem.pools)
    return (
        f"network: no wire and no scale-up link joins cards of {names}, and one alone is too small"
    )


def _changes(request: Request) -> Iterator[str]:
    """Yield the least change of each kind that makes the request feasible."""
    slower = _least(lambda s: replace(request, tpot_s=s), request.tpot_s, SLOWEST_S)
    if slower is not None:
        yield f"--tpot-ms {float(f'{slower * 1e3 * 1.0005:.4g}'):g}"
        return
    for p, pool in enumerate(request.problem.pools):
        more = _least(partial(_with_cards, request, p), pool.cards, MOST_CARDS / 100)
        if more is not None:
            yield f"--pool {pool.name}={int(np.ceil(more))}"
    context = request.problem.context
    shorter = _least(
        lambda times: _with_context(request, max(1, int(context / times))), 1.0, float(context)
    )
    if shorter is not None:
        yield f"--context {max(1, int(context / shorter))}"


def _with_cards(request: Request, p: int, cards: float) -> Request:
    pools = list(request.problem.pools)
    pools[p] = Pool.of(pools[p].card, int(np.ceil(cards)), pools[p].efficiency)
    return replace(request, problem=replace(request.problem, pools=tuple(pools)))


def _with_context(request: Request, context: int) -> Request:
    return replace(request, problem=replace(request.problem, context=context))


def _least(change: Callable[[float], Request], low: float, high: float) -> float | None:
    """Return the least value between two, by ratio, at which the changed request is feasible."""
    top = low
    while not is_feasible(change(top)):
        if top >= high:
            return None
        top = min(top * 2, high)
    bottom = max(low, top / 2)
    for _ in range(STEPS):
        if top / bottom < 1.001 or (low >= 1 and top - bottom < 1 and float(low).is_integer()):
            break
        middle = float(np.sqrt(bottom * top))
        top, bottom = (middle, bottom) if is_feasible(change(middle)) else (top, middle)
    return top
