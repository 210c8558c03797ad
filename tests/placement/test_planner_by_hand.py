"""The whole planner on instances worked by hand: 20 colocated, 8 split.

Each of the model's two layers has 2 MB of bf16 weights and, at 1,000 tokens of context, 200 kB of
KV a sequence. The 20 have cards without links: their plans are single cards. Card A has 1e12
bytes/s: with b sequences a token takes 2 x (b x 0.2 + 2) us = 0.4 b + 4 us; arithmetic is never the
limit. 90 % of the memory holds 4 MB of weights and 0.4 MB a sequence; 90 % of the target is used.
"""

from types import MappingProxyType

import pytest

from step3_hetero.placement.asked import request_of
from step3_hetero.placement.attention_cores import GroupedCore
from step3_hetero.placement.catalogue import Card, Server
from step3_hetero.placement.efficiency import Efficiency
from step3_hetero.placement.planner import plan
from step3_hetero.placement.plans import SplitPlan
from step3_hetero.placement.pools import Pool
from step3_hetero.placement.workload import Part, Workload

pytest.importorskip("scipy")

MODEL = Workload(
    "by hand", 100, 2,
    (
        Part("attention", "attention", 2, 0.0, GroupedCore(8, 1, 50), 0.0),
        Part("ffn-dense", "ffn", 2, 2e6, None, 1e6),
    ),
    1.0,
)  # fmt: skip


def pool(name, *, price=1.0, memory_mb=100, times=1, count=1, nic=None):
    """Return cards with ``times`` card A's bandwidth; ``nic`` in bytes/s."""
    card = Card(
        name=name, title=name, vendor="one", backend="x", driver_names=(),
        memory_bytes=int(memory_mb * 1e6), memory_bandwidth_bytes_per_s=times * 1e12,
        flops_per_s=MappingProxyType({"bf16": 1e15}), scale_up_bytes_per_s=None,
        nic_bytes_per_s=nic, usd_per_hour=price, usd_per_hour_range=None,
        server=Server(8, None, None, None), sources=MappingProxyType({}),
    )  # fmt: skip
    return Pool.of(card, count, Efficiency(1.0, 1.0, 1e-6, True))


A = pool("a")
FAST = {"times": 2}

BY_HAND = {
    # (90 - 4) / 0.4 = 215 sequences; 0.4 x 215 + 4 = 90 us.
    "memory is the limit": ([A], 1000, {}, {"a": 1}, 215 / 90),
    # 45 us are for use: (45 - 4) / 0.4 = 102.5, so 102; 44.8 us.
    "time is the limit": ([A], 50, {}, {"a": 1}, 102 / 44.8),
    # (4.5 - 4) / 0.4 = 1.25: one sequence in 4.4 us.
    "one sequence fits": ([pool("a", memory_mb=5)], 1000, {}, {"a": 1}, 1 / 4.4),
    # 3.6 MB for 4 MB.
    "weights do not fit": ([pool("a", memory_mb=4)], 1000, {}, None, None),
    # 3.6 us for 4.4.
    "one sequence is too slow": ([A], 4, {}, None, None),
    "the cheaper of two like cards": ([A, pool("b", price=1.1)], 1000, {}, {"a": 1}, 215 / 90),
    # B takes 45 us: half of A's time for 1.5 times the price.
    "twice as fast for half as much again": (
        [A, pool("b", price=1.5, **FAST)], 1000, {}, {"b": 1}, 215 / 45,
    ),
    "twice as fast for more than twice": (
        [A, pool("b", price=2.1, **FAST)], 1000, {}, {"a": 1}, 215 / 90,
    ),
    # B: (180 - 4) / 0.4 = 440 in 180 us; 180 / 440 x 1.1 = 0.450 over A's 90 / 215 = 0.419.
    "twice the memory for a tenth more": (
        [A, pool("b", price=1.1, memory_mb=200)], 1000, {}, {"a": 1}, 215 / 90,
    ),
    # 180 / 440 x 1.02 = 0.4173 under 0.4186.
    "twice the memory for a fiftieth more": (
        [A, pool("b", price=1.02, memory_mb=200)], 1000, {}, {"b": 1}, 440 / 180,
    ),
    # At 50 us both hold 102 sequences: the memory is for nothing.
    "memory that time leaves empty": (
        [A, pool("b", price=1.02, memory_mb=200)], 50, {}, {"a": 1}, 102 / 44.8,
    ),
    # Per card B serves twice as much, whatever it costs.
    "fewest cards": (
        [A, pool("b", price=9.0, **FAST)], 1000, {"objective": "cards"}, {"b": 1}, 215 / 45,
    ),
    # All three cards: 3 x 215 / 90.
    "most tokens": (
        [pool("a", count=3)], 1000, {"objective": "tokens"}, {"a": 3}, 3 * 215 / 90,
    ),
    # 215 / 90 and 215 / 45 together.
    "most tokens of two pools": (
        [A, pool("b", **FAST)], 1000, {"objective": "tokens"}, {"a": 1, "b": 1}, 215 / 30,
    ),
    # One card serves 2.389 a us: 5 a us need three.
    "a demand of three cards": ([pool("a", count=8)], 1000, {"demand": 5e6}, {"a": 3}, 5),
    # Two serve 4.778.
    "a demand that two cards just meet": (
        [pool("a", count=8)], 1000, {"demand": 4.777e6}, {"a": 2}, 4.777,
    ),
    "a demand that two cards just miss": (
        [pool("a", count=8)], 1000, {"demand": 4.779e6}, {"a": 3}, 4.779,
    ),
    # A serves 2.389 for $1; B 4.778 for $1.5.
    "a demand that the cheap card meets": (
        [A, pool("b", price=1.5, **FAST)], 1000, {"demand": 2e6}, {"a": 1}, 2,
    ),
    "a demand that takes both": (
        [A, pool("b", price=1.5, **FAST)], 1000, {"demand": 6e6}, {"a": 1, "b": 1}, 6,
    ),
    # Both serve 7.167 together.
    "a demand that both miss": ([A, pool("b", **FAST)], 1000, {"demand": 7.17e6}, None, None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("pools", "tpot_us", "rest", "cards", "per_us"), BY_HAND.values(), ids=BY_HAND
)
def test_plan_equals_the_hand(pools, tpot_us, rest, cards, per_us):
    outcome = plan(request_of(MODEL, pools, 1000, tpot_us * 1e-6, **rest))
    if cards is None:
        assert outcome.plan is None
        return
    used = {name: n for name, n in outcome.plan.cards(pools).items() if n}
    assert used == cards
    assert outcome.plan.tokens_per_s == pytest.approx(per_us * 1e6, rel=1e-9)
    assert outcome.bound == pytest.approx(outcome.winner.score, rel=1e-6), "and it is proven"


def test_there_are_twenty():
    assert len(BY_HAND) == 20


# Split: 100 us are asked and one pace is tried, 90 us through two layers of 45, two micro-batches,
# a quarter of a layer for each pass: 11.25 us. Card C (0.4 x A's bandwidth, 4.4 MB) holds no FFN:
# 3.96 MB for 4. As attention it holds 3.96 / 0.4 = 9.9 sequences, 4 a micro-batch, in 2 us.
# Card F (2 x A's, 4.45 MB) holds 4 MB of FFN and no sequence beside it: 0.005 / 0.4. As FFN it
# takes 5,625 tokens in 11.25 us, so one serves all; as attention 4.005 / 0.8: 5 a micro-batch.
# So nobody serves alone, and each C adds 2 x 4 tokens in 90 us.
NIC = 1e12


def halves(c=3, f=1, nic=NIC):
    """Return card C, for attention alone, and card F, for FFN or attention."""
    return [
        pool("c", memory_mb=4.4, times=0.4, count=c, nic=nic),
        pool("f", memory_mb=4.45, times=2, count=f, nic=nic, price=2.0),
    ]


SPLIT = {
    # The more C share F's price the better.
    "one FFN for three": (halves(), {}, {"c": 3, "f": 1}, 24 / 90),
    "fewest cards a token": (halves(), {"objective": "cards"}, {"c": 3, "f": 1}, 24 / 90),
    # The second F does attention: (3 x 4 + 5) x 2 tokens.
    "most tokens": (halves(f=2), {"objective": "tokens"}, {"c": 3, "f": 2}, 34 / 90),
    # One C serves 0.089 a us, two 0.1778.
    "a demand of two": (halves(), {"demand": 0.15e6}, {"c": 2, "f": 1}, 0.15),
    "a demand that two just miss": (halves(), {"demand": 0.178e6}, {"c": 3, "f": 1}, 0.178),
    # Three serve 0.2667.
    "a demand that all miss": (halves(), {"demand": 0.267e6}, None, None),
    "no wire": (halves(nic=None), {}, None, None),
    # 200 bytes a token back, 11.25 us for them: 62.4 MB/s pass 3.51, so 3, into F from everyone.
    "a wire that passes three": (halves(nic=62.4e6), {}, {"c": 1, "f": 1}, 6 / 90),
}


@pytest.mark.parametrize(("pools", "rest", "cards", "per_us"), SPLIT.values(), ids=SPLIT)
def test_split_plan_equals_the_hand(pools, rest, cards, per_us):
    outcome = plan(request_of(MODEL, pools, 1000, 100e-6, paces=((2, 1 / 4),), **rest))
    if cards is None:
        assert outcome.plan is None
        return
    assert isinstance(outcome.plan, SplitPlan)
    assert {name: n for name, n in outcome.plan.cards(pools).items() if n} == cards
    assert outcome.plan.tokens_per_s == pytest.approx(per_us * 1e6, rel=1e-9)
    assert outcome.bound == pytest.approx(outcome.winner.score, rel=1e-6), "and it is proven"
