"""Servers and racks as they stand: read strictly, filled without overlap, uplinks respected."""

import math
from collections import Counter

import pytest

from step3_hetero.errors import ConfigError, PlacementError
from step3_hetero.placement.asked import Asked
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.inventory import Inventory
from step3_hetero.placement.network import a2f_bytes, f2a_bytes
from step3_hetero.placement.planner import plan
from step3_hetero.placement.racks import Floor, place_on_racks

TWO_RACKS = """\
version: 1
racks: [{{name: r1, uplink_gbit_per_s: {uplink}}}, {{name: r2, uplink_gbit_per_s: {uplink}}}]
servers:
  - {{rack: r1, card: h800, count: 2}}
  - {{rack: r1, card: h20, count: 1}}
  - {{rack: r2, card: h20, count: 4}}
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "hosts.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def asked(path, **rest):
    return Asked.of(model="step3", pools=[], inventory=str(path), **rest)


def test_pools_are_cards_in_servers_with_like_links_whatever_their_racks(written):
    text = TWO_RACKS.format(uplink=400) + (
        "  - {rack: r2, card: h20, cards: 4, count: 3}\n"
        "  - {rack: r2, card: h20, count: 1, host_nics: 2, host_nic_gbit_per_s: 200}\n"
    )
    pools = {p.name: p for p in Inventory.read(written(text), Catalogue.read()).pools()}
    assert {name: dict(p.servers) for name, p in pools.items()} == {
        "h800": {8: 2}, "h20": {8: 5, 4: 3}, "h20-2": {8: 1}
    }  # fmt: skip
    assert pools["h20"].groups(8) == 5 and pools["h20"].groups(4) == 13
    assert pools["h20-2"].card.server.host_nic_bytes_per_s == 25e9


REFUSED = {
    "version: 2\nservers: [{rack: r, card: h800}]": "hosts.yaml:1: version: expected 1",
    "version: 1\nservers: []": "expected a list with at least one entry",
    "version: 1\nservers:\n  - {rack: r, card: h801}": "hosts.yaml:3: servers.0.card: unknown card",
    "version: 1\nservers:\n  - {rack: r, card: h800, count: -1}": "expected a whole number",
    "version: 1\nservers:\n  - {rack: r, card: h800, nics: 1}": "servers.0.nics: unknown; keys:",
    "version: 1\nracks: [{name: a}]\nservers: [{rack: b, card: h800}]": "unknown rack 'b'",
    "version: 1\nracks: [{name: a}, {name: a}]\nservers: [{rack: a, card: h800}]": "stands twice",
    "version: 1\nracks: [{name: a, uplink_gbit_per_s: fast}]\nservers: [{rack: a, card: h800}]":
        "expected a number",
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), REFUSED.items())
def test_bad_inventory_names_the_line_and_the_key(text, said, written):
    with pytest.raises(ConfigError) as refused:
        Inventory.read(written(text), Catalogue.read())
    assert said in str(refused.value)


def test_excluded_rack_is_gone_and_an_unknown_one_refused(written):
    path = written(TWO_RACKS.format(uplink=400))
    kept = Inventory.read(path, Catalogue.read(), {"r2"})
    assert {s.rack for s in kept.servers} == {"r1"}
    with pytest.raises(PlacementError, match="no such rack; racks: r1, r2"):
        Inventory.read(path, Catalogue.read(), {"r9"})


def placed(path, **rest):
    question = asked(path, **rest)
    return (
        question,
        plan(question.request),
        place_on_racks(plan(question.request), question.servers),
    )


def test_every_group_of_cards_stands_in_one_server_and_none_is_used_twice(written):
    _, _, found = placed(written(TWO_RACKS.format(uplink=100_000)))
    best, used = found.outcome.plan, Counter()
    for rack in found.racks:
        for server in rack["servers"]:
            taken = sum(use["cards"] for use in server["used"])
            assert taken <= server["cards"]
            for use in server["used"]:
                used[use["role"]] += use["cards"]
    assert found.left_out == 0
    assert used["attention"] == sum(n * c.cards for c, n in best.attention)
    assert used["ffn"] == sum(n * c.cards for c, n in best.ffn)


def test_narrow_uplinks_leave_instances_out_and_the_gap_says_so(written):
    _, free, _ = placed(written(TWO_RACKS.format(uplink=100_000)))
    question, _, narrow = placed(written(TWO_RACKS.format(uplink=400)))
    assert narrow.left_out > 0
    best = narrow.outcome
    assert best.winner.score > free.winner.score and best.bound == pytest.approx(free.bound)
    assert "network" in " ".join(question.about_placed(narrow).notes)


def test_traffic_over_an_uplink_stays_within_its_rate(written):
    question, _, found = placed(written(TWO_RACKS.format(uplink=400)), exclude=["colocated"])
    best, problem = found.outcome.plan, question.request.problem
    homes = {}
    for rack in found.racks:
        for server in rack["servers"]:
            for use in server["used"]:
                homes.setdefault(use["role"], []).append(rack["name"])
    away = sum(rack not in set(homes["ffn"]) for rack in homes["attention"])
    (_, count), (sets, _) = best.attention[0], best.ffn[0]
    tokens = away * best.flow.sum() / count * sets.ep * problem.workload.layers
    row = max(a2f_bytes(problem.workload, problem.wire_dtype), f2a_bytes(problem.workload))
    assert tokens * row <= 400e9 / 8 * best.pass_s / best.micro_batches


def test_traffic_is_booked_whole_or_not_at_all(written):
    inventory = Inventory.read(written(TWO_RACKS.format(uplink=8)), Catalogue.read())
    floor = Floor(inventory, slot_s=1.0)  # 1e9 bytes a slot on each uplink, each way
    assert floor.carry("r1", "r2", 6e8, 1e8) and not floor.carry("r1", "r2", 6e8, 1e8)
    assert floor.carry("r1", "r2", 4e8, 1e8), "what was refused left nothing behind"
    assert floor.carry("r1", "r1", 1e12, 1e12), "within a rack nothing limits"
    assert floor.carry("r2", "r1", 8e8, 0.0), "the other direction is free"
    assert not floor.carry("r1", "r2", 0.0, 1e8), "the way back is full by now"


def test_plan_without_inventory_says_what_servers_it_assumes():
    question = Asked.of(model="step3", pools=["h800=12"])
    assert dict(question.request.problem.pools[0].servers) == {8: 1, 4: 1}
    assert "8 h800 a server" in question.about.notes[0]
    assert all(math.isinf(rate) for rate in question.servers.uplinks.values())
