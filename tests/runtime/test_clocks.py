"""Durations: sums that join, quantiles within what is promised, and a form for messages."""

import numpy as np
import pytest

from step3_hetero.errors import EdgeMismatch
from step3_hetero.runtime.clocks import WAIT, Durations, StageClock, sum_of


def clock_of(values, role="f", kind="ffn"):
    clock = StageClock()
    for n, seconds in enumerate(values):
        clock.add(role, kind, seconds, n)
    return clock


@pytest.mark.parametrize("part", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_within_what_is_promised(part):
    values = np.random.default_rng(3).lognormal(-7, 2, 1001)
    durations = Durations()
    for seconds in values:
        durations.add(float(seconds))
    exact = np.quantile(values, part, method="inverted_cdf")
    assert durations.quantile_s(part) == pytest.approx(exact, rel=0.045)


def test_nothing_counted_has_quantile_zero_and_zero_seconds_count():
    durations = Durations()
    assert durations.quantile_s(0.5) == 0.0
    durations.add(0.0)
    assert (durations.calls, durations.seconds) == (1, 0.0)


def test_clocks_of_instances_add_up_to_one_clock_over_all_calls():
    values = np.random.default_rng(4).random(40)
    parts = {"a:0": clock_of(values[:13]), "a:1": clock_of(values[13:])}
    total, whole = sum_of(parts), clock_of(values)
    ((key, found),) = total.entries.items()
    assert found.calls == 40 and found.seconds == pytest.approx(values.sum())
    assert found.filed == whole.entries[key].filed
    assert found.sent_bytes == sum(range(13)) + sum(range(27))


def test_clock_comes_back_from_a_message():
    clock = clock_of([0.25, 0.5])
    clock.add("a", WAIT, 1.5)
    assert StageClock.of_wire(clock.to_wire()).to_json() == clock.to_json()


@pytest.mark.parametrize("said", [[["f", "ffn", "x", 1, 0, []]], [[1]], [None]])
def test_what_is_no_clock_is_refused(said):
    with pytest.raises(EdgeMismatch, match="a clock is not told"):
        StageClock.of_wire(said)
