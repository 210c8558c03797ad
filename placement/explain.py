"""Why the winner wins: alternatives priced, what each loses on, and what binds the winner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from step3_hetero.placement.columns import AttentionColumn, FfnColumn, degrees, offered
from step3_hetero.placement.network import NoWire, Wire
from step3_hetero.placement.performance import MEMORY_SHARE, precisions
from step3_hetero.placement.planner import Found, Outcome, best_colocated, solve_at
from step3_hetero.placement.plans import AnyPlan, ColocatedPlan, Request, SplitPlan
from step3_hetero.placement.pools import Pool
from step3_hetero.placement.solve import SAME
from step3_hetero.placement.space import Space, Vector
from step3_hetero.placement.workload import ELEMENT_BYTES

MOST_ALTERNATIVES = 10

TELLING = 0.01
"""A limit whose lifting saves less than this part of the cost is not what a plan loses on."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A placement that was not chosen. ``plan`` is None where it does not run at all."""

    label: str
    plan: AnyPlan | None
    score: float
    loses_on: str  # memory, stage time, network, price
    detail: str


def alternatives(outcome: Outcome) -> list[Alternative]:
    """Return the best alternatives, cheapest first, those that do not run last."""
    found = [*_split_alternatives(outcome), *_colocated_alternatives(outcome)]
    winner = outcome.plan
    # Where racks bind, what would be cheaper without them is no alternative.
    least = outcome.winner.score * (1 - SAME) if outcome.winner.score > 0 else -np.inf
    kept = [a for a in found if a.plan is None or not _same(a.plan, winner)]
    kept = [a for a in kept if a.score >= least]
    return sorted(kept, key=lambda a: a.score)[:MOST_ALTERNATIVES]


def _same(a: AnyPlan, b: AnyPlan | None) -> bool:
    return label_of(a) == label_of(b) if b is not None else False


def label_of(plan: AnyPlan) -> str:
    """Return a plan in a few words, as in "40 h20 attention (TP1), 1 x 8 h800 FFN (EP1 x TP8)"."""
    if isinstance(plan, ColocatedPlan):
        parts = [
            f"{n} x {c.cards} {c.stage.card.name} (TP{c.tp}, {c.in_flight} in flight)"
            for c, n in plan.columns
        ]
        return "colocated on " + " and ".join(parts)
    attention = " and ".join(f"{n} x {c.cards} {_card(plan, c.pool)}" for c, n in plan.attention)
    ffn = " and ".join(
        f"{n} x {c.cards} {_card(plan, c.pool)} (EP{c.ep} x TP{c.tp})" for c, n in plan.ffn
    )
    return f"attention on {attention}, FFN on {ffn}, {plan.micro_batches} micro-batches"


def _card(plan: SplitPlan, pool: int) -> str:
    return plan.pools[pool].name


def _split_alternatives(outcome: Outcome) -> Iterator[Alternative]:
    """Yield the best plan of each pair of pools, or why it has none."""
    space, request = outcome.space, outcome.request
    every = space.pair_scores() if space.attention and space.ffn else np.zeros((0, 0, 0))
    for (a, f), wire in request.problem.wires.items():
        names = tuple(request.problem.pools[p].name for p in (a, f))
        label = f"attention on {names[0]}, FFN on {names[1]}"
        if isinstance(wire, NoWire):
            yield Alternative(label, None, np.inf, "network", wire.reason)
            continue
        pair = [request.problem.pools[p] for p in (a, f)]
        if not all(map(request.problem.allows, ("attention", "ffn"), pair)):
            continue
        i, j = _columns(space, a, f)
        if not i or not j:
            yield Alternative(label, None, np.inf, "memory", _too_small(request, a, f, bool(i)))
            continue
        scores = np.full(every.shape[:2], np.inf)
        scores[:, i] = every[:, i][:, :, j].min(axis=2)
        if not np.isfinite(scores).any():
            yield Alternative(label, None, np.inf, *_too_slow(space, i, j))
            continue
        yield from _best_of_pair(outcome, (a, f), scores, label)


PACES_TRIED = 3
"""Best paces solved for an alternative: it is a plan to compare with, not a proven optimum."""


def _best_of_pair(
    outcome: Outcome, pools: tuple[int, int], scores: Vector, label: str
) -> Iterator[Alternative]:
    space, best = outcome.space, Found(None, np.inf, np.inf)
    for pace in np.argsort(scores, axis=None, kind="stable")[:PACES_TRIED]:
        if np.isfinite(scores.flat[pace]):
            clock, pace_s = int(pace) // scores.shape[1], float(space.pass_s.flat[pace])
            found, _ = solve_at(space, space.mix(clock, pace_s, pools), best.score)
            best = found or best
    if best.plan is None:
        detail = "the pools hold no whole set with the instances it needs"
        yield Alternative(label, None, np.inf, "memory", detail)
        return
    why, detail = _loses(outcome, pools, best)
    yield Alternative(label_of(best.plan), best.plan, best.score, why, detail)


def _columns(space: Space, a: int, f: int) -> tuple[list[int], list[int]]:
    i = [n for n, c in enumerate(space.attention) if c.pool == a]
    j = [n for n, c in enumerate(space.ffn) if c.pool == f]
    return i, j


def _too_small(request: Request, a: int, f: int, attention_fits: bool) -> str:
    pools, workload = request.problem.pools, request.problem.workload
    pool = pools[f] if attention_fits else pools[a]
    stage = "ffn" if attention_fits else "attention"
    allowed = precisions(pool.card, request.problem.excluded_dtypes)
    if not allowed:
        why = "left that is not excluded" if pool.card.flops_per_s else "in the catalogue"
        return f"{pool.name} has no precision {why}"
    need = workload.weight_elements(stage) * ELEMENT_BYTES[allowed[0]]
    if not attention_fits and need <= pool.cards * pool.card.memory_bytes * MEMORY_SHARE:
        held = max(degrees(pool))
        return f"no {held} {pool.name} of a server hold one sequence beside the attention weights"
    have, who = offered(pool, workload, need)
    return (
        f"the {stage} weights take {need / 1e9:.0f} GB in {allowed[0]}, {who} {have / 1e9:.0f} GB"
    )


def _too_slow(space: Space, i: Sequence[int], j: Sequence[int]) -> tuple[str, str]:
    """Say whether time or wires leave nothing of a pair of pools."""
    served = [space.attention[n].capacity.max(initial=0) for n in i]
    taken = [space.ffn[n].capacity.max(initial=0) for n in j]
    if max(served) < 1 or max(taken) < 1:
        stage = "attention" if max(served) < 1 else "FFN"
        return "stage time", f"one token of {stage} alone takes longer than its share of the target"
    return "network", "not one token crosses within the target"


def _loses(outcome: Outcome, pools: tuple[int, int], found: Found) -> tuple[str, str]:
    """Return what an alternative loses on: the limit whose lifting helps it most, else its price.

    Compared at fractions of instances, so that no rounding hides the reason.
    """
    space = outcome.space
    i, j = _columns(space, *pools)
    by_memory = _lifted(space, i, j, "memory")
    by_network = _lifted(space, i, j, "network")
    now = _lifted(space, i, j, "nothing")
    gains = {"memory": now - by_memory, "network": now - by_network}
    best = max(gains, key=lambda name: gains[name])
    wire = space.request.problem.wires[pools]
    hop = f" ({wire.slowest})" if best == "network" and isinstance(wire, Wire) else ""
    behind = _behind(outcome, found)
    if gains[best] > TELLING * now:
        return best, f"{behind}; without its {best} limit{hop} {gains[best] / now:.0%} less"
    plan, winner = found.plan, outcome.plan
    assert plan is not None and winner is not None, "there is a winner that it loses against"
    held = _card_seconds(plan, space.request.problem.pools)
    beside = _card_seconds(winner, space.request.problem.pools)
    if held > beside:
        return "stage time", f"{behind}; {held / beside - 1:.0%} more card seconds a token"
    return "price", f"{behind}; no more card seconds a token, but dearer cards"


def _lifted(space: Space, i: Sequence[int], j: Sequence[int], limit: str) -> float:
    """Return the least cost of a pair of pools with one limit out of the way."""
    cost_a, cost_f = space.costs()
    free_a = np.stack([space.attention[n].capacity for n in i], axis=1)[:, :, None]
    free_f = np.stack([space.ffn[n].capacity for n in j], axis=1)[:, None, :]
    send, take = space.send[:, i][:, :, j], space.take[:, i][:, :, j]
    pass_s = space.pass_s[:, i][:, :, None]
    if limit == "network":
        send, take = np.broadcast_to(free_a, send.shape), np.broadcast_to(free_f, take.shape)
    elif limit == "memory":
        in_time = np.stack([space.attention[n].by_time for n in i], axis=1)[:, :, None]
        send = np.where(send == free_a, np.maximum(in_time, send), send)
        send = np.where(np.isfinite(pass_s), send, 0)
    with np.errstate(divide="ignore"):
        per_token = cost_a[i][:, None] / send + cost_f[j] / take
    each = per_token * pass_s / space.clocks.micro_batches[:, None, None]
    return float(each.min())


def _card_seconds(plan: AnyPlan, pools: Sequence[Pool]) -> float:
    return sum(plan.cards(pools).values()) / plan.tokens_per_s


def _behind(outcome: Outcome, found: Found) -> str:
    winner = outcome.winner.score
    if outcome.request.objective == "tokens":
        return f"{1 - found.score / winner:.1%} fewer tokens"
    unit = "cards" if outcome.request.objective == "cards" else "cost"
    return f"{found.score / winner - 1:.1%} more {unit}"


def _colocated_alternatives(outcome: Outcome) -> Iterator[Alternative]:
    """Yield the colocated plan of each pool and, where the winner does not split, the split one."""
    pools = outcome.request.problem.pools
    for p, pool in enumerate(pools):
        if not outcome.request.problem.allows("colocated", pool):
            continue
        found = best_colocated(outcome.request, [c for c in outcome.columns if c.pool == p])
        label = f"colocated on {pool.name}"
        if found.plan is None:
            yield Alternative(label, None, np.inf, "memory", _why_not_colocated(outcome, p))
            continue
        assert isinstance(found.plan, ColocatedPlan)
        column = found.plan.columns[0][0]
        why = "memory" if column.batch == column.by_memory else "stage time"
        detail = f"{_behind(outcome, found)}; {column.batch} sequences a group, bound by {why}"
        yield Alternative(label_of(found.plan), found.plan, found.score, why, detail)


def _why_not_colocated(outcome: Outcome, p: int) -> str:
    request = outcome.request
    pool = request.problem.pools[p]
    if request.demand is not None:
        alone = replace(request, demand=None, objective="cards")
        found = best_colocated(alone, [c for c in outcome.columns if c.pool == p])
        if found.plan is not None:
            most = found.plan.tokens_per_s
            return f"{pool.cards} {pool.name} serve {most:.0f} of {request.demand:.0f} tokens/s"
    return f"no instance of {pool.name} holds the model and a sequence within the target"


def binding(outcome: Outcome) -> str:
    """Return the constraint that keeps the winner from being better, in a sentence."""
    plan = outcome.plan
    if plan is None:
        return ""
    target = f"the target of {outcome.request.tpot_s * 1e3:g} ms"
    if isinstance(plan, ColocatedPlan):
        column = plan.columns[0][0]
        card = column.stage.card.name
        if column.batch == column.by_memory:
            return f"The KV memory of {card} is full at {column.batch} sequences a group."
        return f"On {card} {column.batch} sequences a group fill {target}."
    said = ", and ".join(_split_binding(outcome.space, plan, target))
    return f"{said[:1].upper()}{said[1:]}."


def _over_network(space: Space, a: AttentionColumn, fed: FfnColumn) -> str:
    """Name the slowest hop to the sets that an attention column feeds."""
    wire = space.request.problem.wires[a.pool, fed.pool]
    assert isinstance(wire, Wire), "a column feeds none without a wire"
    return f"over its network, whose slowest hop is {wire.slowest}"


def _split_binding(space: Space, plan: SplitPlan, target: str) -> Iterator[str]:
    for n, (a, count) in enumerate(plan.attention):
        each, batch = plan.flow[n].sum() / count, a.capacity[plan.clock]
        name = plan.pools[a.pool].name
        if each < batch * (1 - TELLING):
            room = f"{each:.0f} of the {batch:.0f} tokens that an instance could"
            fed = plan.ffn[int(np.argmax(plan.flow[n]))][0]
            wired = space.send[plan.clock, space.attention.index(a), space.ffn.index(fed)]
            why = "because FFN sets come whole" if wired >= batch else _over_network(space, a, fed)
            yield f"attention on {name} sends {room}, {why}"
        elif a.by_memory[plan.clock] <= a.by_time[plan.clock]:
            yield f"the KV memory of {name} is full at {batch:.0f} tokens of a micro-batch"
        else:
            yield f"attention on {name} fills its share of {target}"
    for n, (f, count) in enumerate(plan.ffn):
        each, batch = plan.flow[:, n].sum() / count, f.capacity[plan.clock]
        name = plan.pools[f.pool].name
        if each >= batch * (1 - TELLING):
            yield f"the FFN on {name} fills its share at {batch:.0f} tokens of a micro-batch"
