"""What a row of attention may err by through one score: worked by hand, and on the cases."""

import numpy as np
import pytest

from step3_hetero.backend import BatchMeta
from step3_hetero.conformance.cases import trials
from step3_hetero.conformance.scores import score_slack
from step3_hetero.conformance.tolerance import ROUNDOFF, judge
from step3_hetero.conformance.trial import expected_of

NARROW = (
    "attention[heads=8,kv_heads=2,head_dim=24,queries=40+1+1+7,contexts=40+300+17+200,blocks=12,"
    "padding=1,scale=0.2,kv=int8,float32]"
)


def decoding(*positions):
    """Return one sequence in block 0 with a query at each of ``positions``."""
    at = np.array(positions, np.int32)
    ends = np.array([0, len(at)], np.int32)
    return BatchMeta(at, at, ends, at[-1:] + 1, np.zeros((1, 1), np.int32))


def slack(keys, values, *positions, scaled=False):
    """Return the slack of queries (1, 1) in roundoffs squared; keys and values are pairs."""
    held = np.zeros((2, 1, 128, 1, 2), np.float32)
    held[0, 0, : len(keys), 0], held[1, 0, : len(values), 0] = keys, values
    q = np.ones((len(positions), 1, 2), np.float32)
    found = score_slack(q, (held[0], held[1]), decoding(*positions), 1.0, scaled=scaled)[:, 0]
    return found / ROUNDOFF["float32"] ** 2


def test_exponential_is_rounded_once():
    """Scores 0 and 0, weights ½ and ½, out (½, ½): each value lies |out| away from it."""
    found = slack([[0, 0], [0, 0]], [[1, 0], [0, 1]], 1)
    assert found == pytest.approx([4 * 0.5**2])


@pytest.mark.parametrize(("scaled", "squares"), [(False, 133), (True, 182)])
def test_products_and_sums_are_rounded_and_what_the_scales_make_of_them(scaled, squares):
    """Products 3 and 4, sums 3 and 7, the score by one scale, by two if the cache has its own."""
    assert 3**2 + 4**2 + 3**2 + 7**2 + (2 if scaled else 1) * 7**2 + 1 == squares
    found = slack([[3, 4], [0, 0]], [[1, 0], [0, 1]], 1, scaled=scaled)
    p = 1 / (1 + np.exp(-7.0))
    told = p * (1 - p) * np.sqrt(2) / np.hypot(p, 1 - p)
    assert found == pytest.approx([4 * told**2 * squares])


def test_the_key_that_tells_most_counts_and_not_their_sum():
    two, many = ([[0, 0]] * n for n in (2, 64))
    values = [[1, 0], [0, 1]] * 32
    assert slack(many, values, 63) == pytest.approx(slack(two, values[:2], 1) / 32**2)


def test_a_key_that_a_row_may_not_see_gives_it_nothing():
    found = slack([[0, 0], [0, 0]], [[1, 0], [0, 1]], 0, 1)
    assert found.tolist() == [0, pytest.approx(4 * 0.5**2)]


def test_a_row_may_err_by_one_score_where_that_is_more_than_its_own_rounding():
    _, expected = expected_of(trials()[NARROW])
    want, allowed = expected.want["out"], expected.slack["out"]
    assert allowed.shape == want.shape[:2]
    own = judge(want, want, [r["out"] for r in expected.rounded]).row_bound
    by_score = allowed > own
    assert 0 < by_score.sum() < by_score.size / 2, "one score decides in some rows, not in most"
    for part, within in ((0.9, True), (1.1, False)):
        judged = expected.judged("out", want * (1 + part * np.sqrt(allowed)[..., None]))
        assert ((judged.row_error <= judged.row_bound)[by_score] == within).all()
    assert (expected.judged("out", want).row_bound == np.maximum(own, allowed)).all()


def test_bfloat16_has_no_slack():
    trial = trials()[NARROW.replace("float32]", "bfloat16]")]
    assert expected_of(trial)[1].slack == {}
