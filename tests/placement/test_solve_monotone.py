"""What helps never costs more: 8 random instances, each with one thing made better."""

from dataclasses import replace

import pytest
from test_planner_small import instance

from step3_hetero.placement.asked import wires_of
from step3_hetero.placement.planner import best_split, plan
from step3_hetero.placement.pools import Pool

pytest.importorskip("scipy")

CASES = range(8)
SAME = 1e-9
"""Relative difference below which two costs are one."""


def with_pools(request, change):
    pools = tuple(change(n, pool) for n, pool in enumerate(request.problem.pools))
    return replace(request, problem=replace(request.problem, pools=pools, wires=wires_of(pools)))


def cheaper(n, pool):
    """The first pool's card costs less."""
    price = pool.card.usd_per_hour * (0.7 if n == 0 else 1)
    return replace(pool, card=replace(pool.card, usd_per_hour=price))


def with_links(pool, times):
    """Return a pool whose NICs, of cards and of hosts, are so many times as fast."""
    card, server = pool.card, pool.card.server
    rate = server.host_nic_bytes_per_s
    server = replace(server, host_nic_bytes_per_s=rate and rate * times)
    return replace(pool, card=replace(card, nic_bytes_per_s=card.nic_bytes_per_s * times,
                                      server=server))  # fmt: skip


def narrow(_, pool):
    """The links are slow enough that some plans are bound by them."""
    return with_links(pool, 1 / 30)


def faster_link(_, pool):
    """The links are faster."""
    return with_links(pool, 1.5)


def larger(n, pool):
    """There are one or two more cards."""
    return Pool.of(pool.card, pool.cards + 1 + n, pool.efficiency)


CHANGES = {
    "a cheaper card": lambda request: with_pools(request, cheaper),
    "a faster link": lambda request: with_pools(request, faster_link),
    "a larger pool": lambda request: with_pools(request, larger),
    "a looser target": lambda request: replace(request, tpot_s=request.tpot_s * 1.3),
}


@pytest.fixture(scope="module")
def base():
    drawn = [with_pools(instance(n), narrow) for n in CASES]
    requests = [replace(request, objective="usd", demand=None) for request in drawn]
    return [(request, best_split(request), plan(request).winner) for request in requests]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_helps_never_raises_the_cost(base, change):
    lower = 0
    for request, split, winner in base:
        changed = change(request)
        after = best_split(changed)
        assert after.score <= split.score * (1 + SAME)
        assert plan(changed).winner.score <= winner.score * (1 + SAME)
        lower += after.score < split.score * (1 - SAME)
    assert lower, "at least one instance is helped"
