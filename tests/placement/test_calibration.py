"""The fitted constants are those of the rows; the rows held out are only reported."""

import pytest

from step3_hetero.placement.calibration import error, fit, leave_one_out, rows, table
from step3_hetero.placement.efficiency import efficiency_of


@pytest.fixture(scope="module")
def fitted():
    return fit(rows("fit"))


def test_fitting_again_gives_the_stored_constants(fitted):
    kept = efficiency_of("nvidia")
    assert fitted.arithmetic == pytest.approx(kept.arithmetic, abs=1e-4)
    assert fitted.bandwidth == pytest.approx(kept.bandwidth, abs=1e-4)
    assert fitted.message_s == pytest.approx(kept.message_s, rel=1e-3)
    assert kept.calibrated


def test_errors_are_those_of_the_page(fitted):
    """docs/calibration.md prints them; a change of the model has to change the page."""
    found = {row.name: error(row, fitted) for row in rows()}
    assert found["MFA layer on H800"] == pytest.approx(0.062, abs=5e-4)
    assert found["MFA layer on H20"] == pytest.approx(0.000, abs=5e-4)
    assert found["MFA layer on A800"] == pytest.approx(-0.059, abs=5e-4)
    assert found["Step-3 2A2F, long-term"] == pytest.approx(0.033, abs=5e-4)
    assert found["DeepSeek-V3 profile, EP128"] == pytest.approx(0.346, abs=5e-4)
    assert found["CloudMatrix DeepSeek-R1, EP320"] is None, "its batch is not published"


def test_rows_that_check_do_not_pull_the_fit(fitted):
    used = {row.name for row in rows("fit")}
    assert {row.name for row in rows("check")}.isdisjoint(used)
    assert set(leave_one_out()) == used


def test_what_is_left_out_is_predicted_by_the_others():
    off = leave_one_out()
    assert off["MFA layer on H20"] == pytest.approx(0.73, abs=0.01), "the one arithmetic-bound row"
    assert abs(off["Step-3 2A2F, peak minute"]) < 0.15


def test_command_prints_every_row():
    printed = "\n".join(table())
    for row in rows():
        assert row.name in printed
    assert "left out" in printed and "+34.6%" in printed


def test_ascend_is_assumed_between_half_of_nvidia_and_all_of_it():
    best = efficiency_of("nvidia")
    low, nominal, high = (efficiency_of("ascend", case) for case in ("low", "nominal", "high"))
    assert high.arithmetic == best.arithmetic and low.arithmetic == pytest.approx(
        best.arithmetic / 2
    )
    assert low.arithmetic < nominal.arithmetic < high.arithmetic
    assert low.message_s > nominal.message_s > high.message_s
    assert not (low.calibrated or nominal.calibrated or high.calibrated)
    assert efficiency_of("a new vendor") == nominal
