"""The recurrence against simpy, against arithmetic by hand, and its statistics."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from random_pipelines import CONTEXT, batches, plain, random_pipeline
from simpy_pipeline import run

from step3_hetero.errors import RequestError
from step3_hetero.placement import simulate as module
from step3_hetero.placement.pipeline import (
    AttentionGroup,
    FfnGroup,
    LayerRun,
    PredictedPipeline,
)
from step3_hetero.placement.simulate import Scenario, simulate
from step3_hetero.placement.simulate_contexts import Contexts
from step3_hetero.placement.simulate_routes import routes, usual_sets

TOKENS = 6


def pipeline(*, m=3, a=1, f=1, attention_s=1.0, a2f_s=1.0, ffn_s=1.0, f2a_s=1.0, **more):
    """Return five remote layers between ``a`` attention instances and ``f`` sets."""
    return PredictedPipeline(
        m,
        CONTEXT,
        (LayerRun(5, "moe", "remote"),),
        (
            AttentionGroup(
                "h800", "h800", a, 8, 10, {"moe": attention_s}, 0.0, "", a2f_s, f2a_s,
                more.pop("latency_s", 0.0),
            ),
        ),
        (FfnGroup("h20", "h20", f, 16, {"moe": ffn_s}),),
        **more,
    )  # fmt: skip


def tpot_of(found, contexts=None):
    return simulate(found, Scenario(tokens=30, contexts=contexts)).tpot_s["mean"]


@pytest.mark.parametrize("seed", range(50))
def test_agrees_with_simpy_on_a_random_pipeline(seed):
    found = random_pipeline(seed)
    ends, busy = run(plain(found), TOKENS)
    m, n = found.micro_batches, found.attention_instances
    rate, gaps, weights = 0.0, [], []
    for i, batch in enumerate(batches(found)):
        for j in range(m):
            times = [ends[t, j, i] for t in range(TOKENS)]
            rate += float(batch) * (TOKENS - 1) / (times[-1] - times[0])
            gaps += [later - earlier for earlier, later in pairwise(times)]
            weights += [float(batch)] * (TOKENS - 1)

    result = simulate(found, Scenario(tokens=TOKENS))

    assert len(ends) == TOKENS * m * n
    assert result.elapsed_s == pytest.approx(max(ends.values()), rel=1e-3)
    assert result.tokens_per_s == pytest.approx(rate, rel=1e-3)
    assert result.tpot_s["mean"] == pytest.approx(np.average(gaps, weights=weights), rel=1e-3)
    assert result.tpot_s["max"] == pytest.approx(max(gaps), rel=1e-3)
    assert len(busy) == found.ffn_sets


@pytest.mark.parametrize("seed", range(8))
def test_every_token_ends_when_simpy_says(seed, monkeypatch):
    """Not the sums alone: the very times, with sequences of unlike length."""
    found = random_pipeline(100 + seed)
    kept = []
    result_of = module.result_of
    monkeypatch.setattr(module, "result_of", lambda *a: kept.append(a[2]) or result_of(*a))
    contexts = Contexts(CONTEXT, cv=0.7)
    batch = np.array(batches(found), float)
    means = contexts.means(batch, found.micro_batches, seed=3)
    ends, busy = run(plain(found, means.tolist()), TOKENS)

    simulate(found, Scenario(tokens=TOKENS, contexts=contexts, seed=3))

    expected = np.empty_like(kept[0].ends)
    for at, end in ends.items():
        expected[at] = end
    np.testing.assert_allclose(kept[0].ends, expected, rtol=1e-9)
    share = (TOKENS - 1) / TOKENS  # busy seconds are counted after the first token
    np.testing.assert_allclose(kept[0].busy["ffn"], np.array(busy) * share, rtol=1e-9)


def test_random_pipelines_cover_what_the_model_distinguishes():
    found = [random_pipeline(seed) for seed in range(50)]
    split = [p for p in found if p.split]
    assert {p.ffn_serves for p in split} == {"together", "in-turn"}
    assert any(not p.split for p in found)
    assert any(len(p.ffn) > 1 for p in split)
    assert any(p.attention_instances < p.ffn_sets for p in split)
    assert any(p.attention_instances > p.ffn_sets for p in split)


@pytest.mark.parametrize(
    ("m", "layer_s"),
    [(1, 4.0), (2, 4.0), (3, 4.0), (4, 4.0), (5, 5.0), (8, 8.0)],
)
def test_layer_takes_the_longest_stage_m_times_or_the_sum_of_stages(m, layer_s):
    """Four stages of 1 s: max(m x longest, sum), the facts' formula."""
    assert tpot_of(pipeline(m=m)) == pytest.approx(5 * layer_s)


def test_latency_delays_but_occupies_nothing():
    assert tpot_of(pipeline(m=1, latency_s=0.5)) == pytest.approx(5 * 5.0)
    assert tpot_of(pipeline(m=8, latency_s=0.5)) == pytest.approx(5 * 8.0)


def test_two_instances_share_a_set_in_one_pass_or_in_two():
    assert tpot_of(pipeline(m=8, a=2)) == pytest.approx(5 * 8.0)
    assert tpot_of(pipeline(m=8, a=2, ffn_serves="in-turn")) == pytest.approx(5 * 16.0)
    assert tpot_of(pipeline(m=8, a=2, f=2, ffn_serves="in-turn")) == pytest.approx(5 * 8.0)


def test_one_instance_feeds_several_sets_in_turn():
    """A slow set is hidden by three of them: micro-batch j goes to set j mod 3."""
    assert tpot_of(pipeline(m=6, ffn_s=2.0)) == pytest.approx(5 * 12.0)
    assert tpot_of(pipeline(m=6, ffn_s=2.0, f=3)) == pytest.approx(5 * 6.0)
    assert usual_sets(pipeline(m=4, f=3)).ravel().tolist() == [0, 1, 2, 0]


def test_what_comes_between_tokens_is_the_attentions_own_time():
    assert tpot_of(pipeline(m=1, between_tokens_s=0.25)) == pytest.approx(5 * 4.0 + 0.25)


def test_colocated_plan_has_neither_wire_nor_set():
    local = PredictedPipeline(
        2, CONTEXT, (LayerRun(5, "moe", "local"),),
        (AttentionGroup("h20", "h20", 3, 8, 10, {"moe": 2.0}),),
    )  # fmt: skip
    result = simulate(local, Scenario(tokens=10))
    assert result.tpot_s["mean"] == pytest.approx(5 * 2 * 2.0)
    assert [(use.what, use.utilisation) for use in result.roles] == [
        ("attention", pytest.approx(1.0))
    ]
    assert result.tokens_per_s == pytest.approx(3 * 2 * 10 / 20.0)


def test_use_and_bubbles_are_shares_of_the_tpot():
    result = simulate(pipeline(m=1, ffn_s=2.0, f2a_s=0.0), Scenario(tokens=20))
    use = {role.what: role for role in result.roles}
    assert use["attention"].utilisation == pytest.approx(1 / 4)
    assert use["ffn"].utilisation == pytest.approx(2 / 4)
    assert use["f2a"].utilisation == 0.0
    assert use["ffn"].bubble_s == pytest.approx(5 * 4.0 / 2)
    assert result.tokens_per_s_per_card == pytest.approx(result.tokens_per_s / 24)


def test_attention_grows_with_the_context_by_one_token_each():
    found = pipeline(m=1)
    slope = 0.01
    grows = replace(
        found, attention=(replace(found.attention[0], seconds_per_context_token=slope),)
    )
    result = simulate(grows, Scenario(tokens=11))
    assert result.tpot_s["max"] - result.tpot_s["mean"] == pytest.approx(5 * slope * 4.5)
    longer = Contexts(CONTEXT + 100)
    assert tpot_of(grows, longer) - tpot_of(grows) == pytest.approx(5 * slope * 100)


def test_contexts_are_drawn_sequence_by_sequence():
    batch = np.array([1.0, 400.0, 3.0])
    means = Contexts(8192, cv=0.5).means(batch, 2000, seed=0)
    assert means.shape == (2000, 3)
    assert means.mean(axis=0) == pytest.approx([8192] * 3, rel=0.05)
    cv = means.std(axis=0) / means.mean(axis=0)
    assert cv == pytest.approx(0.5 / np.sqrt(batch), rel=0.1)
    drawn = Contexts(8192, sample=(10, 20)).means(np.ones(50), 1, seed=0)
    assert set(drawn.ravel()) == {10.0, 20.0}


def test_jitter_is_seeded_keeps_the_mean_and_costs_time():
    found = pipeline(m=3, a=20, f=10)
    still = simulate(found, Scenario(tokens=40)).tpot_s["mean"]
    runs = [
        simulate(found, Scenario(tokens=40, jitter_cv=0.2, seed=s)).tpot_s["mean"]
        for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert all(still < one < 1.5 * still for one in runs)
    alone = pipeline(m=1, a2f_s=0.0, ffn_s=0.0, f2a_s=0.0)
    shaken = simulate(alone, Scenario(tokens=4000, jitter_cv=0.5, seed=0)).tpot_s
    assert shaken["mean"] == pytest.approx(5.0, rel=0.01)
    assert shaken["p50"] < shaken["p90"] < shaken["p95"] < shaken["p99"] < shaken["max"]


def test_percentiles_weigh_by_sequences():
    """Nine in ten sequences sit on the slow group: its time is the median."""
    fast, slow = (
        AttentionGroup(name, "h20", 1, 8, batch, {"moe": s})
        for name, batch, s in (("fast", 1, 1.0), ("slow", 9, 3.0))
    )
    found = PredictedPipeline(1, CONTEXT, (LayerRun(5, "moe", "local"),), (fast, slow))
    tpot = simulate(found, Scenario(tokens=10)).tpot_s
    assert (tpot["p50"], tpot["max"]) == (pytest.approx(15.0), pytest.approx(15.0))
    assert tpot["mean"] == pytest.approx(0.1 * 5 + 0.9 * 15)


def test_percentile_is_the_least_time_that_so_many_tokens_keep_within():
    """A hundred instances take 1 to 100 s a token."""
    groups = tuple(AttentionGroup(str(n), "h20", 1, 8, 1, {"moe": float(n)}) for n in range(1, 101))
    found = PredictedPipeline(1, CONTEXT, (LayerRun(1, "moe", "local"),), groups)
    tpot = simulate(found, Scenario(tokens=3)).tpot_s
    assert [tpot[f"p{p}"] for p in (50, 90, 95, 99)] == pytest.approx([50, 90, 95, 99])


def test_routes_name_every_active_instance_once():
    found = routes(usual_sets(pipeline(a=7, f=3)), np.arange(7) != 2)
    for route in found:
        members = route.members[route.members < 7]
        assert sorted(members.tolist()) == [0, 1, 3, 4, 5, 6]
        assert (route.sets[route.row[members]] == members % 3).all()


@pytest.mark.parametrize(
    ("tokens", "said"),
    [(1, "tokens: 1 is too few; from 2"), (10**9, "more than fit into memory; at most 33333333")],
)
def test_run_that_cannot_be_is_refused(tokens, said):
    with pytest.raises(RequestError, match=said):
        simulate(pipeline(), Scenario(tokens=tokens))
