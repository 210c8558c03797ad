"""The planner against brute force: 200 small random instances, counted out one by one."""

import math
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
from scipy.optimize import linprog

from step3_hetero.placement import network
from step3_hetero.placement.asked import request_of
from step3_hetero.placement.attention_cores import GroupedCore
from step3_hetero.placement.catalogue import Card, Server
from step3_hetero.placement.efficiency import Efficiency
from step3_hetero.placement.network import NoWire
from step3_hetero.placement.planner import best_split
from step3_hetero.placement.pools import Pool
from step3_hetero.placement.space import most_passed
from step3_hetero.placement.workload import Part, Workload

CASES = 200
PACES = ((2, 1 / 4), (3, 1 / 3))
JITTER = 0.1
MOST_TOKENS = 10**6
"""More than any of these cards computes in time."""

TOO_SLOW = 40
"""Times as long as others' are the messages of some instances: nothing crosses in time."""

ROOMY = 20
"""Times as much memory have the cards of every other four instances: time limits their batches."""


def card(name, vendor, draw, *, host=True, room=1):
    """Return a small accelerator whose figures are drawn."""
    nics = Server(
        cards=int(draw.choice([2, 4])),
        host_nics=int(draw.integers(1, 3)) if host else None,
        host_nic_bytes_per_s=float(draw.uniform(1e9, 3e11)) if host else None,
        pcie_bytes_per_s=float(draw.uniform(5e10, 1e12)),
    )
    return Card(
        name=name, title=name, vendor=vendor, backend="x", driver_names=(),
        memory_bytes=int(room * draw.uniform(2e6, 2e7)),
        memory_bandwidth_bytes_per_s=float(draw.uniform(1e11, 1e12)),
        flops_per_s=MappingProxyType({"bf16": float(draw.uniform(1e13, 1e14))}),
        scale_up_bytes_per_s=float(draw.uniform(1e11, 1e12)),
        nic_bytes_per_s=float(draw.uniform(5e10, 5e11)),
        usd_per_hour=round(float(draw.uniform(0.3, 3.0)), 2), usd_per_hour_range=None,
        server=nics, sources=MappingProxyType({}),
    )  # fmt: skip


def model(draw):
    """Return two MoE layers that fit a few megabytes."""
    expert = float(draw.integers(50_000, 300_000))
    experts, top_k = 4, int(draw.integers(1, 3))
    elements = float(draw.integers(50_000, 400_000))
    attention = Part("attention", "attention", 2, 2 * elements, GroupedCore(8, 1, 64), elements)
    ffn = Part(
        "ffn-moe", "ffn", 2, 2 * top_k * expert, None, experts * expert, expert, experts, top_k
    )
    head = Part("head", "head", 1, 2e5, None, 1e5)
    return Workload("small", 256, 2, (attention, ffn, head), top_k / experts)


def instance(seed):
    """Return a request over two pools of one to four cards each."""
    draw = np.random.default_rng([0x5EED, seed])
    vendors = ["one", "one"] if draw.random() < 0.5 else ["one", "two"]
    times = TOO_SLOW if seed % 9 == 4 else 1
    room = ROOMY if seed // 4 % 2 else 1
    pools = [
        Pool.of(
            card(f"c{n}", vendor, draw, host=draw.random() < 0.8, room=room),
            int(draw.integers(2, 5)),
            Efficiency(0.8, 0.8, times * float(draw.uniform(1e-7, 3e-6)), True),
        )
        for n, vendor in enumerate(vendors)
    ]  # fmt: skip
    objective = ["usd", "usd", "tokens", "cards"][seed % 4]
    demand = float(draw.uniform(1e4, 4e5)) if objective == "usd" and seed % 8 == 1 else None
    work, context = model(draw), int(draw.integers(50, 500))
    tpot_s = float(draw.choice([0.0001, 0.000103, 0.000106]))
    return request_of(
        work, pools, context, tpot_s,
        objective=objective, demand=demand, paces=PACES, jitter=JITTER,
    )  # fmt: skip


# ----- brute force: its own times, its own batches by counting up, its own enumeration


def attention_s(work, card_, eff, tp, context, tokens):
    """Seconds of attention in both layers, written out again."""
    flops = card_.flops_per_s["bf16"] * eff.arithmetic
    rate = card_.memory_bandwidth_bytes_per_s * eff.bandwidth
    total = 0.0
    for part in work.parts:
        if part.stage == "attention":
            core = max(
                tokens * 8 * 64 * 4 * context / tp / flops, tokens * 2 * 64 * context * 2 / rate
            )
            linear = max(
                tokens * part.linear_flops / tp / flops, part.weight_elements * 2 / tp / rate
            )
            travel = 0.0
            if tp > 1:
                half = tokens * work.hidden * 2 * (tp - 1) / tp / card_.scale_up_bytes_per_s
                travel = 2 * (half + eff.message_s)
            total += part.layers * max(core + linear, travel)
    return total


def head_s(work, card_, eff, tp, tokens):
    """Seconds of the head, once a token, written out again."""
    flops = card_.flops_per_s["bf16"] * eff.arithmetic
    rate = card_.memory_bandwidth_bytes_per_s * eff.bandwidth
    part = next(p for p in work.parts if p.stage == "head")
    return max(tokens * part.linear_flops / tp / flops, part.weight_elements * 2 / tp / rate)


def token_s(request, pool, tp, tokens, body_s, in_flight):
    """Seconds from a token to the next: the layers, and the FFN's wait while the head works.

    The layers are alike: each takes its half of the body. The head holds up each micro-batch in
    turn, less what attention has left of the first layer.
    """
    work, context = request.problem.workload, request.problem.context
    head = head_s(work, pool.card, pool.efficiency, tp, tokens)
    layer = attention_s(work, pool.card, pool.efficiency, tp, context, tokens) / 2
    left = body_s / 2 - in_flight * layer
    return body_s + max(head, in_flight * head - left)


def ffn_s(work, card_, eff, tp, ep, tokens):
    """Seconds of a pass of FFN, written out again: a byte a value arrives, two go back."""
    flops = card_.flops_per_s["bf16"] * eff.arithmetic
    rate = card_.memory_bandwidth_bytes_per_s * eff.bandwidth
    part = next(p for p in work.parts if p.stage == "ffn")
    load = 1.0
    if ep > 1:
        load = min(ep, 1 + math.sqrt(2 * math.log(ep) / (max(tokens * part.top_k, 1) / ep)))
    hit = part.experts * (1 - (1 - part.top_k / part.experts) ** tokens)
    compute = tokens * part.linear_flops * load / (tp * ep) / flops
    memory = hit * part.expert_elements * 2 / (tp * ep) / rate
    travel = 0.0
    if tp > 1:
        there_and_back = tokens * work.hidden * (1 + 2) * (tp - 1) / tp
        travel = there_and_back / card_.scale_up_bytes_per_s + 2 * eff.message_s
    return part.layers * max(compute, memory, travel)


def count_up(seconds, budget, most):
    """Largest whole number from 1 whose seconds fit, counted up by hundreds and then by ones."""
    tokens = 0
    for step in (100, 1):
        while tokens + step <= most and seconds(tokens + step) <= budget:
            tokens += step
    return tokens


def paces(request):
    """Every pace through the layers: steps of 2 in the third digit of a millisecond."""
    for exponent in range(-3, 3):
        for digits in range(100, 1000, 2):
            step = float(f"{digits}e{exponent}")
            if 0.1 <= step <= request.tpot_s * 1e3 * (1 + 1e-12):
                for in_flight, share in request.paces:
                    yield step * 1e-3 * (1 - JITTER), in_flight, share


def columns_at(request, body_s, in_flight, share):
    """Attention (pool, tp, tokens, layer, token) and FFN (pool, tp, ep, tokens) at one pace."""
    work, context = request.problem.workload, request.problem.context
    attention, ffn = [], []
    for p, pool in enumerate(request.problem.pools):
        memory = 0.9 * pool.card.memory_bytes
        for tp in (1, 2, 4):
            if tp > pool.server_cards:
                continue
            weights = sum(
                part.layers * part.weight_elements * 2 / tp
                for part in work.parts if part.stage in ("attention", "head")
            )  # fmt: skip
            held = (memory - weights) / (2 * 2 * 64 * context * 2)
            batch = count_up(
                partial(attention_s, work, pool.card, pool.efficiency, tp, context),
                share * body_s,
                max(0, math.floor(held / in_flight)),
            )
            pace = token_s(request, pool, tp, batch, body_s, in_flight)
            if batch and pace <= request.tpot_s * (1 - JITTER) * (1 + 1e-9):
                layer = attention_s(work, pool.card, pool.efficiency, tp, context, batch) / 2
                attention.append((p, tp, batch, layer, pace))
            for ep in (1, 2, 4):
                part = next(q for q in work.parts if q.stage == "ffn")
                if part.layers * part.weight_elements * 2 / (tp * ep) > memory:
                    continue
                if pool.groups(tp) < ep:
                    continue
                taken = count_up(
                    partial(ffn_s, work, pool.card, pool.efficiency, tp, ep),
                    share * body_s,
                    MOST_TOKENS,
                )
                if taken:
                    ffn.append((p, tp, ep, taken))
    return attention, ffn


def row_bytes(request):
    """Bytes of a row to FFN and back: int8 there, bf16 back."""
    work = request.problem.workload
    top_k = next(p.top_k for p in work.parts if p.stage == "ffn")
    return work.hidden + 4 * math.ceil(work.hidden / 128) + 6 * top_k, 2 * work.hidden


def message_s(wire, nbytes):
    """Seconds of one message: its first piece takes all hops, every further one the slowest."""
    first = min(nbytes, network.PIECE_BYTES)
    if wire.kind == network.CARD:
        return nbytes * wire.busy_s_per_byte
    return first * wire.message_s_per_byte + (nbytes - first) * wire.busy_s_per_byte


def most_rows(seconds, budget):
    """Largest number of rows, parts of one allowed, whose seconds fit: halved to the last bit."""
    low, high = 0.0, 1.0
    while seconds(high) <= budget:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return low


def wire_tokens(request, ways, attention, ffn, most, clock):
    """Tokens that an attention instance sends, and an FFN set takes, by the hop.

    ``attention``: tp, seconds of a layer; ``ffn``: tp, ep; ``most``: tokens that each computes.
    A card sends its part to each of ep members, one message after the other; a card of a member
    takes messages of what an instance sends.
    """
    (tp, layer), (tf, ep), (body_s, share) = attention, ffn, clock
    wire = request.problem.wires[ways]
    if isinstance(wire, NoWire):
        return 0, 0
    out, back = row_bytes(request)
    message = max(request.problem.pools[n].efficiency.message_s for n in ways)
    left = (1 - share) * body_s / 2 - layer - 2 * message
    if left <= 0:
        return 0, 0

    def there_and_back(rows):
        return message_s(wire, rows * out) + message_s(wire, rows * back)

    busy = share * body_s / 2 / (wire.busy_s_per_byte * max(out, back))
    rows = min(most_rows(there_and_back, left / ep), busy / ep)
    send = min(most[0], math.floor(rows * tp * (1 + 1e-12)))
    if not send:
        return 0, 0
    longest = min(send / tf, most_rows(there_and_back, left))
    rows = min(left / there_and_back(longest) * longest, busy)
    return send, min(most[1], math.floor(rows * tf * (1 + 1e-12)))


def fits_servers(pools, groups):
    """Whether groups (pool, cards) can be put into servers: first the largest, tried exactly."""
    for p, pool in enumerate(pools):
        free = [size for size, count in pool.servers.items() for _ in range(count)]
        for cards in sorted((c for q, c in groups if q == p), reverse=True):
            place = next((n for n, room in enumerate(sorted(free)) if room >= cards), None)
            if place is None:
                return False
            free = sorted(free)
            free[place] -= cards
    return True


def counts_of(pools, columns):
    """Every way to have instances of columns, each (pool, groups, cards of a group)."""
    most = [pools[p].cards // (g * tp) for p, g, tp in columns]

    def further(counts, free):
        if len(counts) == len(columns):
            groups = [
                (p, tp) for n, (p, g, tp) in zip(counts, columns, strict=True) for _ in range(n * g)
            ]
            if fits_servers(pools, groups):
                yield tuple(counts)
            return
        p, g, tp = columns[len(counts)]
        for n in range(min(most[len(counts)], free[p] // (g * tp)) + 1):
            left = [f - n * g * tp * (q == p) for q, f in enumerate(free)]
            yield from further([*counts, n], left)

    yield from further([], [pool.cards for pool in pools])


def best_flow(n_a, n_f, send, take):
    """Most tokens that instances n_a and sets n_f pass on."""
    pairs = [(i, j) for i in range(len(n_a)) for j in range(len(n_f)) if send[i][j] and take[i][j]]
    pairs = [(i, j) for i, j in pairs if n_a[i] and n_f[j]]
    if not pairs:
        return 0.0
    if len(pairs) == 1:
        i, j = pairs[0]
        return min(n_a[i] * send[i][j], n_f[j] * take[i][j])
    matrix = np.zeros((len(n_a) + len(n_f), len(pairs)))
    for k, (i, j) in enumerate(pairs):
        matrix[i, k], matrix[len(n_a) + j, k] = 1 / send[i][j], 1 / take[i][j]
    found = linprog(-np.ones(len(pairs)), A_ub=matrix, b_ub=[*n_a, *n_f], method="highs")
    return -found.fun


def brute_force(request):
    """The best score of any split plan: every pace, every count of every column."""
    pools, best = request.problem.pools, math.inf
    ways = {}
    price = [
        1.0 if request.objective == "cards" else p.card.usd_per_hour / 3600 * 1e6 for p in pools
    ]
    for body_s, in_flight, share in paces(request):
        attention, ffn = columns_at(request, body_s, in_flight, share)
        if not attention or not ffn:
            continue
        passed = [
            [wire_tokens(request, (p, q), (tp, layer), (tf, ep), (a, f), (body_s, share))
             for q, tf, ep, f in ffn] for p, tp, a, layer, _ in attention
        ]  # fmt: skip
        send, take = ([[pair[k] for pair in row] for row in passed] for k in (0, 1))
        columns = [(p, 1, tp) for p, tp, *_ in attention] + [(q, ep, tp) for q, tp, ep, _ in ffn]
        key = tuple(columns)
        ways[key] = ways.get(key) or list(counts_of(pools, columns))
        for counts in ways[key]:
            n_a, n_f = counts[: len(attention)], counts[len(attention) :]
            if not any(n_a) or not any(n_f):
                continue
            pace = max(a[4] for a, n in zip(attention, n_a, strict=True) if n)
            cost = sum(n * g * tp * price[p] for n, (p, g, tp) in zip(counts, columns, strict=True))
            most = min(
                sum(n * max(row) for n, row in zip(n_a, send, strict=True)),
                sum(n * max(row) for n, row in zip(n_f, zip(*take, strict=True), strict=True)),
            )
            if not most or score(request, cost, most * in_flight / pace) >= best:
                continue  # even if every instance were full
            served = best_flow(n_a, n_f, send, take) * in_flight / pace
            if served > 0:
                best = min(best, score(request, cost, served))
    return best


def score(request, cost, served):
    """Smaller is better: minus tokens, cost where the demand is met, or cost per token."""
    if request.objective == "tokens":
        return -served
    if request.demand is not None:
        return cost if served >= request.demand * (1 - 1e-9) else math.inf
    return cost / served


@pytest.mark.parametrize("seed", range(CASES))
def test_planner_equals_brute_force(seed):
    request = instance(seed)
    found, want = best_split(request), brute_force(request)
    assert (found.plan is None) == math.isinf(want)
    if found.plan is not None:
        assert found.score == pytest.approx(want, rel=1e-7)
        assert found.bound <= found.score
        assert found.bound == pytest.approx(found.score, rel=1e-6), "the certificate closes"


def test_random_instances_are_of_both_kinds():
    kinds = [best_split(instance(seed)).plan is not None for seed in range(1, CASES, 8)]
    assert any(kinds) and not all(kinds)


def test_a_pool_that_does_nothing_at_a_pace_passes_nothing_on():
    """One pool, two paces: x of it does attention, where 4e9 x = 2e9 (1 - x); then it does none."""
    most = most_passed(np.array([[4e9, 0.0], [0.0, 0.0]]), np.array([[2e9, 0.0], [0.0, 1e9]]))
    assert most == pytest.approx([4e9 / 3, 0])
