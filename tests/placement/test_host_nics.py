"""H800 attention and 910B FFN over host NICs of 25 to 400 Gb/s: docs/planner.md has the figures."""

import numpy as np
import pytest

from step3_hetero.placement.asked import Asked
from step3_hetero.placement.explain import alternatives
from step3_hetero.placement.pace import Wires
from step3_hetero.placement.planner import best_split, plan
from step3_hetero.placement.plans import ColocatedPlan, SplitPlan
from step3_hetero.placement.space import Space

pytest.importorskip("scipy")

RATES = (25, 100, 200, 400)
ONLY_CROSSING = ("attention:ascend-910b", "ffn:h800")
"""Exclusions that leave H800 attention with 910B FFN, and no plan that does not split."""


def asked(*pools, context, gbit, nics, exclude=()):
    return Asked.of(
        model="step3", pools=pools, context=context, host_nic_gbit=gbit, host_nics_per_server=nics,
        exclude=exclude,
    ).request  # fmt: skip


def roles(best, pools):
    """Return the cards of each side."""
    return tuple(
        {pools[column.pool].name for column, _ in side} for side in (best.attention, best.ffn)
    )


@pytest.fixture(scope="module")
def few_h800():
    """Five H800 do not hold the FFN's 304 GB; at 32K a plan may use them for attention."""
    return {
        gbit: plan(asked("h800=5", "ascend-910b=32", context=32768, gbit=gbit, nics=8))
        for gbit in RATES
    }


def test_at_25_gbit_the_answer_is_not_to_split(few_h800):
    outcome = few_h800[25]
    assert isinstance(outcome.plan, ColocatedPlan)
    assert outcome.plan.cards(outcome.request.problem.pools)["h800"] == 0


@pytest.mark.parametrize("gbit", [100, 200, 400])
def test_faster_nics_put_attention_on_the_h800(few_h800, gbit):
    outcome = few_h800[gbit]
    best = outcome.plan
    assert isinstance(best, SplitPlan)
    attention, ffn = roles(best, best.pools)
    assert "h800" in attention and ffn == {"ascend-910b"}
    assert outcome.bound == pytest.approx(outcome.winner.score, rel=1e-6)


def test_what_the_nics_let_through_sets_the_price(few_h800):
    usd = [few_h800[gbit].winner.score for gbit in RATES]
    assert usd == pytest.approx([1.113, 1.108, 1.058, 1.058], abs=5e-4)
    sent = [few_h800[gbit].plan.flow.sum() for gbit in RATES[1:]]
    assert sent[0] < sent[1] == pytest.approx(sent[2]), "from 200 Gb/s on memory is the limit"


ALONE = {1: (5.029, 1.665, 0.891, 0.547), 8: (0.891, 0.403, 0.313, 0.276)}
"""$/Mtok of H800 attention with 910B FFN alone, fractions of instances, by NICs a server."""


@pytest.mark.parametrize("nics", [1, 8])
def test_where_either_card_holds_the_model_crossing_loses_at_every_rate(nics):
    found = []
    for gbit in RATES:
        crossing = asked(
            "h800=1000", "ascend-910b=1000", context=8192, gbit=gbit, nics=nics,
            exclude=ONLY_CROSSING,
        )  # fmt: skip
        assert plan(crossing).colocated.plan is None
        found.append(float(Space.of(crossing).pair_scores().min()))
    assert found == pytest.approx(ALONE[nics], abs=5e-4)
    free = plan(asked("h800=32", "ascend-910b=64", context=8192, gbit=400, nics=nics))
    assert isinstance(free.plan, ColocatedPlan) and free.winner.score < found[-1]
    lost = [a for a in alternatives(free) if "h800, FFN on" in a.label and "910b" in a.label]
    assert all(a.loses_on in ("network", "price", "memory") for a in lost)


def test_rows_that_pass_follow_from_the_return_direction():
    """128 rows of 1.8 MB in all, 8 cards, one NIC: 4,608 us at 25 Gb/s, 288 at 400.

    A link has its share of a layer: at 45 ms, eight micro-batches and 61 layers 92 us, so that
    128 x 92 / 4,608 rows pass at 25 Gb/s.
    """
    for gbit, exact_us in zip(RATES, (4608, 1152, 576, 288), strict=True):
        request = asked("h800=8", "ascend-910b=8", context=8192, gbit=gbit, nics=1)
        space = Space.of(request)
        rows = Wires(request.problem, space.clocks).per_card(0, 1, np.zeros(len(space.clocks)))
        by_link = 128 * space.clocks.stage_s * 1e6 / exact_us * (1.8e6 / (128 * 14336))
        assert (rows <= by_link * (1 + 1e-9)).all()
        eight = space.clocks.micro_batches == 8
        if gbit <= 100:
            longest = np.argmax(space.clocks.body_s * eight)
            assert rows[longest] == pytest.approx(by_link[longest], rel=1e-6), "the link is full"


def test_excluded_roles_leave_what_was_asked_for():
    request = asked(
        "h800=32", "ascend-910b=64", context=8192, gbit=400, nics=8, exclude=ONLY_CROSSING
    )
    best = best_split(request).plan
    assert roles(best, best.pools) == ({"h800"}, {"ascend-910b"})
    split = asked("h800=32", context=8192, gbit=None, nics=None, exclude=("colocated",))
    assert isinstance(plan(split).plan, SplitPlan)
