"""What a plan must be: monotone, proven, honest about the network and about what is infeasible."""

from dataclasses import replace

import numpy as np
import pytest

from step3_hetero.model.config import FAMILIES
from step3_hetero.placement.asked import request_of, wires_of
from step3_hetero.placement.catalogue import Catalogue
from step3_hetero.placement.columns import steps_ms
from step3_hetero.placement.explain import alternatives, binding
from step3_hetero.placement.infeasible import is_feasible, why_infeasible
from step3_hetero.placement.network import with_host_nics
from step3_hetero.placement.plan_json import About, paper_bound, plan_json
from step3_hetero.placement.plan_pipeline import shares
from step3_hetero.placement.planner import best_split, plan
from step3_hetero.placement.plans import ColocatedPlan, SplitPlan
from step3_hetero.placement.pools import parse_pools
from step3_hetero.placement.workload import step3_workload

STEP3 = step3_workload(FAMILIES["step3"]())
TINY_STEP = 1e-9


def step3_request(*pools, context=8192, tpot_s=0.05, gbit=None, nics=None, **rest):
    found = parse_pools(pools, Catalogue.read())
    found = [replace(p, card=with_host_nics(p.card, gbit, nics)) for p in found]
    return request_of(STEP3, found, context, tpot_s, **rest)


def with_pools(request, change):
    pools = tuple(change(n, pool) for n, pool in enumerate(request.problem.pools))
    problem = replace(request.problem, pools=pools, wires=wires_of(pools))
    return replace(request, problem=problem)


def cheaper(n, pool):
    price = pool.card.usd_per_hour * (0.7 if n == 0 else 1)
    return replace(pool, card=replace(pool.card, usd_per_hour=price))


def test_what_helps_does_help_sometimes():
    request = step3_request("h800=16", "h20=32")
    base = plan(request).winner.score
    assert plan(with_pools(request, cheaper)).winner.score < base
    assert plan(replace(request, tpot_s=0.1)).winner.score < base


def test_paces_of_a_looser_target_contain_those_of_a_tighter_one():
    assert set(steps_ms(33.3)) < set(steps_ms(50.0))
    assert 33.0 in steps_ms(33.3) and 50.0 in steps_ms(50.0)


def test_winner_keeps_its_promises():
    outcome = plan(step3_request("h800=32", "h20=40"))
    best, clocks = outcome.plan, outcome.space.clocks
    assert isinstance(best, SplitPlan)
    assert best.pass_s <= 0.05 * 0.9
    for n, (column, count) in enumerate(best.attention):
        each = best.flow[n].sum() / count
        seconds = float(column.stage.layers_s(np.array([each]))[0])
        assert seconds <= 61 * clocks.stage_s[best.clock] * (1 + 1e-9)
        held = column.stage.weight_bytes() + each * best.micro_batches * column.stage.kv_bytes()
        assert held <= 0.9 * best.pools[column.pool].card.memory_bytes
    used = best.cards(best.pools)
    assert all(used[p.name] <= p.cards for p in best.pools)
    hourly = sum(used[p.name] * p.card.price() for p in best.pools)
    assert outcome.winner.score == pytest.approx(hourly / 3600 / best.tokens_per_s * 1e6)
    assert sum(count for _, _, count in shares(best)) == sum(n for _, n in best.attention)


def test_certificate_closes_and_the_paper_is_below_it():
    for pools in (("h800=32", "h20=40"), ("a800=24",), ("h800=16", "ascend-910b=32")):
        outcome = plan(step3_request(*pools, gbit=400, nics=8))
        score = outcome.winner.score
        assert outcome.bound <= score
        assert outcome.bound == pytest.approx(score, rel=1e-6)
        assert paper_bound(outcome.request.problem.pools, outcome.request) < outcome.bound


def test_split_wins_where_unlike_cards_complement_each_other_and_loses_on_one_pool():
    both, alone = plan(step3_request("h800=16", "h20=40")), plan(step3_request("h800=32"))
    assert isinstance(both.plan, SplitPlan)
    roles = {both.request.problem.pools[c.pool].name for c, _ in both.plan.attention}
    assert roles == {"h20"}, "attention where bandwidth is cheap"
    assert isinstance(alone.plan, ColocatedPlan), "do not split"
    split = best_split(alone.request)
    assert split.plan is not None and split.score > alone.colocated.score


def test_without_host_nics_the_cross_vendor_candidates_name_what_is_missing():
    found = alternatives(plan(step3_request("h800=32", "ascend-910b=64")))
    missing = [a for a in found if a.plan is None and a.loses_on == "network"]
    assert len(missing) == 2
    assert all("server.host_nics" in a.detail for a in missing)


def test_alternatives_are_sorted_cost_no_less_and_say_what_they_lose_on():
    outcome = plan(step3_request("h800=32", "h20=40"))
    found = alternatives(outcome)
    scores = [a.score for a in found]
    assert scores == sorted(scores) and scores[0] > outcome.winner.score
    assert {a.loses_on for a in found} <= {"memory", "stage time", "network", "price"}
    assert len(found) >= 4 and "KV memory of h20" in binding(outcome)


INFEASIBLE = {
    "memory": (("h800=2",), {}, "memory: the ffn weights take 304.1 GB in fp8, 2 h800 offer 144"),
    "latency": (("h800=32",), {"tpot_s": 0.004}, "latency: the fastest plan takes"),
    "demand": (("h800=32",), {"demand": 1e9}, "demand: the pools serve at most"),
    "context": (("h800=16",), {"context": 60_000_000}, "memory: no pool holds its weights beside"),
}


@pytest.mark.parametrize(("pools", "rest", "said"), INFEASIBLE.values(), ids=INFEASIBLE)
def test_infeasible_says_which_constraint_and_what_would_help(pools, rest, said):
    request = step3_request(*pools, **rest)
    assert plan(request).plan is None
    reason = why_infeasible(request)
    assert reason.startswith(said) and "nearest change: --" in reason


def test_a_pool_that_holds_the_weights_but_no_even_set_of_them_says_so():
    """Five H800 offer 360 GB, but 48 experts and columns come out even over four at most: 288."""
    found = alternatives(plan(step3_request("h800=5", "h20=32")))
    said = [a.detail for a in found if a.label.endswith("FFN on h800")]
    assert len(said) == 2
    assert all("the largest set of 5 h800 has 4, which offer 288 GB" in detail for detail in said)


def test_five_h800_alone_say_that_four_are_the_largest_set():
    reason = why_infeasible(step3_request("h800=5"))
    assert "304.1 GB in fp8, the largest set of 5 h800 has 4, which offer 288.0 GB" in reason
    assert "--pool h800=6" in reason


def test_a_role_that_no_pool_may_run_is_named_with_its_exclusion():
    request = step3_request("h800=16", "h20=16")
    roles = frozenset({("ffn", "h800"), ("ffn", "h20")})
    request = replace(request, problem=replace(request.problem, excluded_roles=roles))
    left_out = "--exclude ffn:h20 or --exclude ffn:h800"
    said = f"exclusions: no card is left for ffn; leave out {left_out}"
    assert why_infeasible(request) == said


def test_a_card_without_arithmetic_is_not_called_excluded():
    reason = why_infeasible(step3_request("ascend-910b1=64", objective="tokens"))
    assert reason.startswith("arithmetic: the catalogue has no tflops of ascend-910b1")


def test_most_tokens_need_no_price():
    """The catalogue has no price of a 910C; the fewest cards serve the most then."""
    best = plan(step3_request("ascend-910c=64", objective="tokens")).plan
    priced = step3_request("ascend-910c=64", objective="tokens")
    assert best is not None and best.tokens_per_s > 0
    request = with_pools(priced, lambda _, p: replace(p, card=replace(p.card, usd_per_hour=1.0)))
    assert plan(request).plan.tokens_per_s == pytest.approx(best.tokens_per_s, rel=1e-9)


def test_cards_that_nothing_joins_lack_a_network_and_not_memory():
    """64 L20 have 3 TB; the catalogue knows neither a scale-up link nor a NIC of theirs."""
    reason = why_infeasible(step3_request("l20=64", objective="tokens"))
    assert reason.startswith("network: no wire and no scale-up link joins cards of l20")
    assert "memory" not in reason and "cards.l20.server.host_nics" in reason


def test_the_nearest_change_does_help_and_a_little_less_does_not():
    slow = step3_request("h800=32", tpot_s=0.004)
    said = float(why_infeasible(slow).rpartition("--tpot-ms ")[2]) * 1e-3
    assert is_feasible(replace(slow, tpot_s=said)) and not is_feasible(
        replace(slow, tpot_s=said * 0.99)
    )
    small = step3_request("h800=2")
    cards = int(why_infeasible(small).rpartition("h800=")[2])
    assert is_feasible(step3_request(f"h800={cards}"))
    assert not is_feasible(step3_request(f"h800={cards - 1}"))
    greedy = step3_request("h800=32", demand=1e9)
    most = float(why_infeasible(greedy).partition("--demand ")[2].split()[0])
    assert plan(replace(greedy, demand=most)).plan is not None
    assert plan(replace(greedy, demand=most * 1.01)).plan is None


def test_json_has_the_promised_keys_and_a_range_for_what_is_not_calibrated():
    outcome = plan(step3_request("h800=16", "ascend-910b=64", gbit=400, nics=8))
    document = plan_json(outcome, About("step3"))
    promised = "feasible objective_usd_per_mtok lower_bound gap paper_bound tpot_ms tokens_per_s"
    promised += " cards attention ffn split alternatives solve_s"
    assert set(promised.split()) <= set(document)
    low, high = document["usd_per_mtok_range"]
    assert low <= document["objective_usd_per_mtok"] <= high * (1 + 1e-9)
    assert sum(document["breakdown"].values()) == pytest.approx(document["objective_usd_per_mtok"])
    assert any("requantised to int8" in note for note in document["notes"])
    assert any("uncalibrated" in note for note in document["notes"])


def test_demand_is_served_at_the_least_cost_and_charged_for_what_is_served():
    request = step3_request("h800=32", "h20=40", demand=30_000.0)
    outcome = plan(request)
    assert outcome.plan.tokens_per_s == 30_000.0
    more = plan(replace(request, demand=60_000.0))
    assert more.winner.score >= outcome.winner.score
    free = plan(replace(request, demand=None)).winner.score
    assert outcome.winner.score / 30_000.0 >= free * (1 - 1e-9), "a ratio cannot be beaten"


def test_a_million_cards_of_four_kinds_are_planned_with_proof():
    request = step3_request(
        *(f"{name}=1000000" for name in ("h800", "h20", "a800", "ascend-910b")), gbit=400, nics=8
    )
    outcome = plan(request)
    assert outcome.bound == pytest.approx(outcome.winner.score, rel=1e-6)
    assert outcome.winner.score <= plan(step3_request("h20=1000000")).winner.score
