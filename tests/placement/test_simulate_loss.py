"""A lost instance: who stalls, for how long, and what goes on afterwards, worked by hand."""

from dataclasses import replace

import pytest

from step3_hetero.errors import RequestError
from step3_hetero.placement.pipeline import (
    AttentionGroup,
    FfnGroup,
    LayerRun,
    PredictedPipeline,
)
from step3_hetero.placement.simulate import Scenario, simulate
from step3_hetero.placement.simulate_loss import Loss

STAGE_S = 0.001
TOKEN_S = 10 * 4 * STAGE_S
"""Ten layers of four equal stages, one micro-batch."""


def pipeline(a=2, f=2, spares=0):
    attention = AttentionGroup(
        "h800", "h800", a, 8, 100, {"moe": STAGE_S}, 0.0, "", STAGE_S, STAGE_S, spares=spares
    )
    ffn = FfnGroup("h20", "h20", f, 8, {"moe": STAGE_S}, spares)
    return PredictedPipeline(1, 4096, (LayerRun(10, "moe", "remote"),), (attention,), (ffn,))


def colocated(a):
    attention = AttentionGroup("h20", "h20", a, 8, 100, {"moe": 4 * STAGE_S})
    return PredictedPipeline(1, 4096, (LayerRun(10, "moe", "local"),), (attention,))


def lose(found, role, at_s, *, tokens=100, deadline_s=0.5):
    return simulate(found, Scenario(tokens=tokens, loss=Loss(role, at_s, deadline_s)))


def test_spare_set_costs_one_pause_and_the_token_in_work():
    """Token 25 is being made at 1.01 s: it is made again from 1.51 s, so it ends at 1.55."""
    result = lose(pipeline(a=1, f=1, spares=1), "ffn", 1.01)
    assert result.loss["resumed"] and result.loss["stalled_instances"] == 1
    assert result.loss["longest_pause_s"] == pytest.approx(1.55 - 1.0)
    assert result.tpot_s["p95"] == pytest.approx(TOKEN_S)
    assert result.elapsed_s == pytest.approx(1.55 + 73 * TOKEN_S)  # 99 of 100 tokens
    assert result.tokens_per_s == pytest.approx(100 * 98 / (result.elapsed_s - TOKEN_S))


def test_token_in_work_is_made_again_from_the_deadline_on():
    """Noticed at 1.02 s, while the token would have been in work until 1.04: it ends at 1.06."""
    result = lose(pipeline(a=1, f=1, spares=1), "ffn", 1.01, deadline_s=0.01)
    assert result.loss["longest_pause_s"] == pytest.approx(0.06)


def test_last_set_without_a_spare_ends_the_run():
    result = lose(pipeline(a=2, f=1), "ffn", 1.01)
    assert result.loss["nothing_left"] and not result.loss["resumed"]
    assert result.elapsed_s == pytest.approx(25 * TOKEN_S)


def test_lost_set_leaves_twice_the_work_to_the_other():
    """Afterwards a pass takes 2 ms in the place of 1: 50 ms a token."""
    result = lose(pipeline(), "ffn", 1.01, tokens=200)
    assert (result.loss["stalled_instances"], result.loss["resumed"]) == (1, True)
    assert result.tpot_s["p90"] == pytest.approx(50 * STAGE_S)
    assert result.loss["longest_pause_s"] == pytest.approx(1.51 - 1.0 + 0.05, abs=0.05)


def test_lost_attention_leaves_its_sequences_to_the_other():
    """Two of four stages' sequences double: every stage takes 2 ms, 80 ms a token, for 200."""
    result = lose(pipeline(), "attention", 1.01, tokens=200)
    assert result.loss["resumed"]
    assert result.tpot_s["p90"] == pytest.approx(80 * STAGE_S)
    alone = simulate(pipeline(a=1, f=1), Scenario(tokens=200)).tokens_per_s
    assert result.tokens_per_s > alone
    assert result.loss["longest_pause_s"] == pytest.approx(1.52 + 0.08 - 1.0, abs=0.05)


def test_attention_that_shares_the_set_stalls_with_the_lost_one():
    assert lose(pipeline(a=4, f=2), "attention", 1.01).loss["stalled_instances"] == 2
    assert lose(pipeline(a=4, f=1), "attention", 1.01).loss["stalled_instances"] == 4
    assert lose(colocated(4), "attention", 1.01).loss["stalled_instances"] == 1


def test_unaffected_instances_go_on_through_the_pause():
    """Colocated, the loss of one of four costs the others a third more work, and no pause."""
    before = simulate(colocated(4), Scenario(tokens=1000))
    result = lose(colocated(4), "attention", 1.01, tokens=1000)
    assert result.tpot_s["max"] == pytest.approx(TOKEN_S * 4 / 3)
    assert result.tokens_per_s == pytest.approx(before.tokens_per_s * 3 / 4, rel=0.01)


def test_loss_after_the_end_did_not_happen():
    still = simulate(pipeline(), Scenario(tokens=10))
    result = lose(pipeline(), "ffn", 60.0, tokens=10)
    assert not result.loss["happened"]
    assert result.tpot_s == still.tpot_s
    assert result.roles == still.roles


def test_set_of_another_group_takes_over_where_it_was_alone():
    found = pipeline(f=1)
    first, second = found.attention[0], replace(found.attention[0], name="b", feeds="other")
    other = replace(found.ffn[0], name="other")
    two = replace(found, attention=(replace(first, feeds="h20"), second), ffn=(found.ffn[0], other))
    result = lose(two, "ffn", 1.01)
    assert result.loss["resumed"] and result.loss["stalled_instances"] == 2


def test_colocated_plan_has_no_set_to_lose():
    with pytest.raises(RequestError, match="--fail ffn: the plan is colocated"):
        lose(colocated(2), "ffn", 1.0)
