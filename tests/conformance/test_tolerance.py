"""The bound: what it allows, what it does not, worked by hand."""

import ml_dtypes
import numpy as np
import pytest

from step3_hetero.conformance.routing import margins, near_ties
from step3_hetero.conformance.stages import StageCase
from step3_hetero.conformance.tolerance import ROUNDOFF, finite_pattern, judge, row_nmse, same_bits
from step3_hetero.conformance.trial import expected_of

F32 = np.float32


def test_row_error_is_squared_error_over_squared_size():
    want = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1e200, 0.0]])
    got = np.array([[3.0, 4.5], [0.0, 0.0], [0.0, 1e-30], [2e200, 0.0]])
    assert row_nmse(got, want).tolist() == pytest.approx([0.01, 0.0, np.inf, 1.0])


def test_a_row_is_allowed_four_times_its_own_error_or_that_of_the_mean_row():
    want = np.ones((2, 4))
    rounded = np.ones((2, 4), F32)
    rounded[0] += F32(2.0**-10)  # row 0 errs by 2^-20, row 1 not at all: the mean is 2^-21
    judged = judge(want.astype(F32), want, [rounded])
    assert judged.row_bound == pytest.approx([4 * 2.0**-20 + 2.0**-48, 4 * 2.0**-21 + 2.0**-48])


def test_the_larger_of_two_roundings_counts():
    want = np.ones((1, 4))
    fine, coarse = np.ones((1, 4), F32), np.full((1, 4), 1 + 2.0**-10, F32)
    bounds = [judge(fine, want, rounded).row_bound[0] for rounded in ([fine], [fine, coarse])]
    assert bounds[0] == pytest.approx(ROUNDOFF["float32"] ** 2)
    assert bounds[1] == pytest.approx(4 * 2.0**-20, rel=1e-6)


def test_one_wrong_element_hides_in_its_row_and_is_found_by_itself():
    rng = np.random.default_rng(0)
    want = rng.standard_normal((4, 4096))
    rounded = want.astype(ml_dtypes.bfloat16)
    got = rounded.astype(F32)
    got[2, 7] += 0.1
    judged = judge(got.astype(ml_dtypes.bfloat16), want, [rounded])
    assert not (judged.row_error > judged.row_bound).any()
    assert np.argwhere(judged.element_error > judged.element_bound).tolist() == [[2, 7]]


def test_non_finite_places_are_no_errors_but_have_a_pattern():
    want = np.array([[1.0, 2.0, 3.0]])
    got = np.array([[1.0, np.inf, 3.0]], F32)
    judged = judge(got, want, [got])
    assert judged.row_error.tolist() == [0.0]
    assert finite_pattern(got).tolist() == [[0, 1, 0]]


def test_bits_are_compared_by_value_and_dtype():
    one = np.array([0.0, np.nan], F32)
    assert same_bits(one, np.array([-0.0, np.nan], F32))
    assert not same_bits(one, one.astype(np.float64))
    assert not same_bits(np.array([1.0], F32), np.array([np.nextafter(F32(1), F32(2))]))


def test_a_row_is_a_near_tie_when_rounding_reaches_across_its_margin():
    exact = np.array([[5.0, 3.0, 2.9, 0.0], [5.0, 3.0, 1.0, 0.0]])
    rounded = exact + 0.03 * np.array([[1, -1, 1, -1], [1, -1, 1, -1]])
    assert margins(exact, 2).tolist() == pytest.approx([0.1, 2.0])
    assert near_ties(exact, rounded, 2).tolist() == [True, False]


def test_row_of_weights_may_err_by_what_rounding_of_the_logits_makes_of_it():
    trial = StageCase("attention", "float32", "odd", 1, (1, 1), (129, 40))
    _, expected = expected_of(trial)
    assert expected.slack.keys() == {"weights"}
    want, slack = expected.want["weights"], expected.slack["weights"]
    for part, within in ((0.9, True), (1.1, False)):
        factor = 1 + part * np.sqrt(slack)[:, None]
        judged = expected.judged("weights", (want * factor).astype(np.float32))
        assert ((judged.row_error <= judged.row_bound) == within).all()
        assert ((judged.element_error <= judged.element_bound) == within).all()
