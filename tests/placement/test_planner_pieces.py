"""Messages over host NICs in pieces: by hand, against pieces walked one by one, and brute force."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from test_planner_small import brute_force, instance

from step3_hetero.afd.link import Link
from step3_hetero.backend import Device
from step3_hetero.placement import network
from step3_hetero.placement.asked import Asked, wires_of
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.explain import binding
from step3_hetero.placement.network import EDGES, HOST, bounced, wire_between, with_host_nics
from step3_hetero.placement.plan_json import About, plan_json
from step3_hetero.placement.plan_pipeline import pipeline_of
from step3_hetero.placement.planner import best_split, plan
from step3_hetero.transport.base import PIECE_BYTES, Channel
from step3_hetero.transport.inproc import InprocChannel
from step3_hetero.transport.nixl import NixlChannel
from step3_hetero.transport.shm import ShmChannel
from step3_hetero.transport.tcp import TcpChannel

pytest.importorskip("scipy")

OUT_BYTES, BACK_BYTES = 128 * 7168, 2 * 128 * 7168
MICRO = 1e6


@cache
def catalogue():
    return Catalogue.read()


def cards(gbit, *rates):
    """Return an H800 and a 910B with eight such host NICs a server and such PCIe."""
    pair = [catalogue().card(name) for name in ("h800", "ascend-910b")]
    return [with_host_nics(c, gbit, 8, rate) for c, rate in zip(pair, rates, strict=True)]


def bounce(channel=TcpChannel, gbit=200, pcie=20, into=None):
    """Return the facts' edge: PCIe of 20 GB/s, one 200 Gb/s host NIC for each card, PCIe again."""
    return bounced(*cards(gbit, pcie, into or pcie), channel)


def walked_s(nbytes, hops, sends, lands):
    """Seconds of a message whose pieces take hop after hop, one at a time on each of them.

    Without ``sends`` nothing goes on the wire before all is copied out; without ``lands`` nothing
    is copied in before all has come.
    """
    sizes = [PIECE_BYTES] * (nbytes // PIECE_BYTES)
    sizes += [nbytes % PIECE_BYTES] if nbytes % PIECE_BYTES else []
    there = [0.0] * len(sizes)
    for number, rate in enumerate(hops):
        if (number == 1 and not sends) or (number == 2 and not lands):
            there = [max(there)] * len(sizes)
        free = 0.0
        for n, size in enumerate(sizes):
            there[n] = free = max(free, there[n]) + size * rate
    return there[-1]


def test_a_bounce_of_385_us_is_232_in_pieces():
    """By hand, 0.05 + 0.04 + 0.05 = 0.14 ns a byte over all hops, 0.05 over the slowest.

    A piece of 524,288 bytes takes 73.400 us over all hops and 26.214 over the slowest. Out, 917,504
    bytes are 1.75 pieces: 73.400 + 0.75 x 26.214 = 93.061. Back, 1,835,008 are 3.5: 73.400 + 2.5 x
    26.214 = 138.936. Together 231.997 us, within the 272 us of a stage; copied whole, 385.352.
    """
    wire = bounce()
    assert wire.message_s(OUT_BYTES) * MICRO == pytest.approx(93.061, abs=1e-3)
    assert wire.message_s(BACK_BYTES) * MICRO == pytest.approx(138.936, abs=1e-3)
    whole = network.message_s(OUT_BYTES + BACK_BYTES, [20e9, 25e9, 20e9])
    assert whole * MICRO == pytest.approx(385.352, abs=1e-3)


def test_each_transport_overlaps_what_it_carries_in_pieces():
    """3.5 pieces of 1,835,008 bytes in all, hops of 0.05, 0.04 and 0.05 ns a byte.

    tcp: 138.936, as above. shm and nixl: the copy out beside the wire, 1 x (0.05 + 0.04) + 2.5 x
    0.05 pieces of 524,288 ns, is 112.722; then all of it in, 91.750: 204.472. inproc: the sum, 0.14
    x 1,835,008 = 256.901.
    """
    want = {TcpChannel: 138.936, ShmChannel: 204.472, NixlChannel: 204.472, InprocChannel: 256.901}
    for channel, us in want.items():
        assert bounce(channel).message_s(BACK_BYTES) * MICRO == pytest.approx(us, abs=1e-3), channel


def test_a_plan_counts_on_the_transport_that_it_names():
    assert EDGES == "tcp" and wire_between(*cards(200, 20, 20)) == bounce()


@pytest.mark.parametrize("channel", [TcpChannel, ShmChannel, InprocChannel, Channel])
def test_whole_pieces_take_what_pieces_walked_one_by_one_take(channel):
    draw = np.random.default_rng(0xB0)
    for _ in range(100):
        rates = draw.uniform(1, 60, 3)
        wire = bounce(channel, gbit=8 * rates[1], pcie=rates[0], into=rates[2])
        hops = [1e-9 / rate for rate in rates]
        count = int(draw.integers(1, 9))
        for nbytes in (count * PIECE_BYTES, int(draw.integers(1, 9 * PIECE_BYTES))):
            walked = walked_s(nbytes, hops, channel.in_pieces, channel.lands)
            if nbytes % PIECE_BYTES == 0 or nbytes < PIECE_BYTES:
                assert wire.message_s(nbytes) == pytest.approx(walked, rel=1e-9)
            assert walked * (1 - 1e-9) <= wire.message_s(nbytes)
            assert wire.message_s(nbytes) <= nbytes * sum(hops) * (1 + 1e-9)


def test_one_piece_takes_the_sum_of_its_hops():
    wire = bounce()
    for nbytes in (1, 7168, PIECE_BYTES):
        assert wire.message_s(nbytes) == nbytes * wire.message_s_per_byte
    rows = PIECE_BYTES / 14336
    budget = np.array([rows * (7168 + 14336) * wire.message_s_per_byte])
    assert wire.rows(budget, 7168, 14336)[0] == pytest.approx(rows, rel=1e-12)


def test_a_faster_hop_never_takes_longer():
    draw = np.random.default_rng(0xFA57)
    for _ in range(300):
        rates = draw.uniform(1, 60, 3)
        faster = rates * np.where(np.arange(3) == draw.integers(3), draw.uniform(1, 3), 1)
        nbytes = int(draw.integers(1, 20 * PIECE_BYTES))
        before, after = (
            bounce(gbit=8 * r[1], pcie=r[0], into=r[2]).message_s(nbytes) for r in (rates, faster)
        )
        assert after <= before * (1 + 1e-12)


def test_rows_are_the_inverse_of_their_seconds():
    draw = np.random.default_rng(0x120)
    for _ in range(200):
        out, back = draw.uniform(1e3, 2e4, 2)
        rows = np.array([draw.uniform(0.5, 2000)])
        wire = bounce(gbit=float(draw.uniform(10, 400)), pcie=float(draw.uniform(5, 60)))
        budget = wire.message_s(float(rows[0] * out)) + wire.message_s(float(rows[0] * back))
        assert wire.rows(np.array([budget]), out, back) == pytest.approx(rows, rel=1e-9)
        assert wire.row_s(rows, out, back) * rows == pytest.approx(budget, rel=1e-9)


def test_slowest_hop_is_named():
    assert bounce(gbit=100).slowest == "the host NICs of h800"
    assert bounce(gbit=400, pcie=25, into=20).slowest == "PCIe of ascend-910b"
    assert bounce(gbit=400, pcie=15, into=20).slowest == "PCIe of h800"


# ----- a plan


@pytest.fixture(scope="module")
def crossing():
    """H800 attention with 910B FFN, 8K, 100 ms, eight host NICs of 100 Gb/s a server."""
    asked = Asked.of(
        model="step3", pools=("h800=32", "ascend-910b=64"), context=8192, tpot_ms=100,
        host_nic_gbit=100, host_nics_per_server=8,
        exclude=("attention:ascend-910b", "ffn:h800"),
    ).request  # fmt: skip
    return plan(asked)


def test_planned_edge_takes_what_the_hand_says(crossing):
    """56 tokens back to a card from each of three members: 56 x 14,336 = 802,816 bytes.

    12.5 GB/s of host NIC and 20 of PCIe: 0.05 + 0.08 + 0.05 ns a byte. One piece takes 94.372 us,
    the 278,528 bytes behind it 0.08 ns each, 22.282; three such messages 349.962. Out, 56 x 7,410
    = 414,960 bytes are one piece: 3 x 74.693 = 224.078. A message's own latency comes on top.
    """
    document = plan_json(crossing, About("step3"))
    (edge,) = document["edges"]
    assert (edge["members"], edge["a2f_message_bytes"], edge["f2a_message_bytes"]) == (
        3, 414_960, 802_816,
    )  # fmt: skip
    assert (edge["a2f_pieces"], edge["f2a_pieces"]) == (1, 2)
    latency_s = max(p.efficiency.message_s for p in crossing.request.problem.pools)
    there_s, back_s = (edge[f"{way}_s"] - latency_s for way in ("a2f", "f2a"))
    assert there_s * MICRO == pytest.approx(224.078, abs=1e-3)
    assert back_s * MICRO == pytest.approx(349.962, abs=1e-3)
    assert edge["slowest_hop"] == "the host NICs of h800"
    (group,) = pipeline_of(crossing.plan, crossing.request.problem).attention
    both_s = group.a2f_s + group.f2a_s + 2 * group.latency_s
    assert both_s == pytest.approx(edge["a2f_s"] + edge["f2a_s"], rel=1e-9)


def test_pieces_make_a_plan_cheaper_than_the_sum(crossing, monkeypatch):
    monkeypatch.setattr(network, "PIECE_BYTES", math.inf)
    request = crossing.request
    whole = best_split(replace(request, problem=replace(request.problem)))
    assert crossing.winner.score == pytest.approx(0.2324, abs=5e-4)
    assert whole.score == pytest.approx(0.2465, abs=5e-4)


def test_binding_names_the_hop_that_holds_attention_back():
    few = Asked.of(
        model="step3", pools=("h800=5", "ascend-910b=32"), context=32768, host_nic_gbit=100,
        host_nics_per_server=8,
    ).request  # fmt: skip
    said = binding(plan(few))
    assert "over its network, whose slowest hop is the host NICs of h800" in said


# ----- what is priced is what the runtime does


class Apart(Device):
    """A device whose memory the host cannot read."""

    def __init__(self):
        self.info = type("Info", (), {"memory_domain": "card"})()


Apart.__abstractmethods__ = frozenset()


@pytest.mark.parametrize("channel", [TcpChannel, ShmChannel, NixlChannel, InprocChannel])
def test_a_link_lands_on_a_device_where_its_channel_says_so(channel):
    link = Link(channel.__new__(channel), "peer")
    link.land_on(Apart())
    assert (link.channel.landing is not None) == channel.lands == (channel is TcpChannel)


# ----- brute force

PIECE = 2048
"""Bytes of a piece that are few enough for these small models to send several."""

CASES = 60


def slow_instance(seed):
    """Return an instance whose two pools meet over host NICs and PCIe that are slow enough."""
    request = instance(seed)
    draw = np.random.default_rng([0xB0, seed])
    pools = []
    for pool, vendor in zip(request.problem.pools, ("one", "two"), strict=True):
        server = replace(
            pool.card.server, host_nics=2, host_nic_bytes_per_s=float(draw.uniform(1e9, 2e10)),
            pcie_bytes_per_s=float(draw.uniform(1e9, 2e10)),
        )  # fmt: skip
        pools.append(replace(pool, card=replace(pool.card, vendor=vendor, server=server)))
    problem = replace(request.problem, pools=tuple(pools), wires=wires_of(pools))
    return replace(request, problem=problem)


@pytest.mark.parametrize("seed", range(CASES))
def test_planner_equals_brute_force_where_messages_are_cut(seed, monkeypatch):
    monkeypatch.setattr(network, "PIECE_BYTES", PIECE)
    request = slow_instance(seed)
    assert {wire.kind for wire in request.problem.wires.values()} >= {HOST}
    found, want = best_split(request), brute_force(request)
    assert (found.plan is None) == math.isinf(want)
    if found.plan is not None:
        assert found.score == pytest.approx(want, rel=1e-7)
        assert found.bound == pytest.approx(found.score, rel=1e-6), "the certificate closes"


def test_cut_messages_are_never_slower_and_help_some_instances(monkeypatch):
    whole = np.array([best_split(slow_instance(seed)).score for seed in range(CASES)])
    monkeypatch.setattr(network, "PIECE_BYTES", PIECE)
    cut = np.array([best_split(slow_instance(seed)).score for seed in range(CASES)])
    solved = np.isfinite(whole)
    gain = (whole[solved] - cut[solved]) / abs(whole[solved])
    assert (gain > -1e-9).all()
    assert (gain > 1e-6).sum() >= 5, "else nothing is tried here"
