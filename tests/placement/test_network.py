"""Wires: the figures of the decoding-cost facts, hop by hop and direction by direction."""

from dataclasses import replace

import numpy as np
import pytest

from step3_hetero.model.config import FAMILIES
from step3_hetero.placement.asked import wires_of
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.columns import Clocks, Problem
from step3_hetero.placement.network import (
    CARD,
    HOST,
    NoWire,
    Wire,
    a2f_bytes,
    f2a_bytes,
    message_s,
    shared_nic_s,
    stage_budget_s,
    wire_between,
    with_host_nics,
)
from step3_hetero.placement.pace import Wires
from step3_hetero.placement.pools import Pool
from step3_hetero.placement.workload import step3_workload

OUT_BYTES, BACK_BYTES = 0.9e6, 1.8e6
ROWS, HIDDEN, LAYERS = 128, 7168, 61


@pytest.fixture
def cards():
    catalogue = Catalogue.read()
    return lambda name, gbit=None, nics=None: with_host_nics(catalogue.card(name), gbit, nics)


@pytest.mark.parametrize(
    ("gbit", "summed_us", "return_us"),
    [(25, 6912, 4608), (100, 1728, 1152), (200, 864, 576), (400, 432, 288)],
)
def test_eight_cards_on_one_host_nic_take_what_the_facts_say(gbit, summed_us, return_us):
    rate = gbit * 1e9 / 8
    there, back = (shared_nic_s(size, 8, 1, rate) for size in (OUT_BYTES, BACK_BYTES))
    assert round((there + back) * 1e6) == summed_us
    assert round(max(there, back) * 1e6) == return_us


def test_host_bounce_takes_385_us_on_both_sides_and_248_on_one():
    both, one = [20e9, 25e9, 20e9], [25e9, 20e9]
    sizes = (ROWS * HIDDEN, 2 * ROWS * HIDDEN)
    assert round(sum(message_s(s, both) for s in sizes) * 1e6) == 385
    assert round(sum(message_s(s, one) for s in sizes) * 1e6) == 248


def test_stage_of_50_ms_is_16_6_ms_and_272_us_a_layer():
    stage = stage_budget_s(0.050, 3)
    assert np.floor(stage * 1e4) / 10 == 16.6
    assert int(0.0166 / LAYERS * 1e6) == 272 and int(stage / LAYERS * 1e6) == 273
    assert stage_budget_s(0.050, 4) == 0.0125


def test_one_vendor_uses_the_cards_own_nics_at_the_slower_rate(cards):
    wire = wire_between(cards("h800"), cards("a800"))
    assert wire == Wire(CARD, 1 / 25e9, 1 / 25e9)


def test_two_vendors_share_the_host_nics_hop_after_hop(cards):
    a, b = cards("h800", 400, 1), cards("ascend-910b", 400, 1)
    a, b = (replace(c, server=replace(c.server, pcie_bytes_per_s=25e9)) for c in (a, b))
    wire = wire_between(a, b)
    share = 50e9 / 8
    assert wire.kind == HOST
    assert wire.message_s_per_byte == pytest.approx(1 / 25e9 + 1 / share + 1 / 25e9)
    assert wire.busy_s_per_byte == pytest.approx(1 / share)


def test_missing_host_nics_are_named_and_never_assumed(cards):
    found = wire_between(cards("h800", 400, 1), cards("ascend-910b"))
    assert isinstance(found, NoWire)
    assert "cards.ascend-910b.server.host_nics" in found.reason
    assert "cards.ascend-910b.server.host_nic_gbit_per_s" in found.reason
    assert "cards.h800" not in found.reason.partition("not known")[2]


def test_bytes_of_an_edge_are_those_of_the_architecture_page():
    model = step3_workload(FAMILIES["step3"]())
    assert a2f_bytes(model, "bf16") == 14_354 and f2a_bytes(model) == 14_336
    assert a2f_bytes(model, "int8") == 7168 + 56 * 4 + 3 * 6


@pytest.mark.parametrize("gbit", [25, 100, 200, 400])
def test_a_shared_nic_lets_as_many_tokens_through_as_its_return_direction(gbit, cards):
    """128 tokens a card keep a NIC busy for 4,608 us at 25 Gb/s on the way back."""
    pools = [Pool.of(cards(name, gbit, 1), 8) for name in ("h800", "ascend-910b")]
    pools = [replace(p, efficiency=replace(p.efficiency, message_s=0.0)) for p in pools]
    problem = Problem(step3_workload(FAMILIES["step3"]()), tuple(pools), 8192, wires_of(pools))
    clocks = Clocks(np.array([0.05]), np.array([8.0]), np.array([1 / 8]), LAYERS)
    limit = np.floor(Wires(problem, clocks).per_card(0, 1, clocks.stage_s)[0])
    slot_s = 0.05 / 8 / LAYERS
    exact_us = {25: 4608, 100: 1152, 200: 576, 400: 288}[gbit] * 2 * ROWS * HIDDEN / BACK_BYTES
    assert limit == np.floor(ROWS * slot_s * 1e6 / exact_us)
