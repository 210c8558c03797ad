"""Requests that run out of time, and a queue that says when it is full."""

import time

import pytest
from runtime.checking_executor import CheckingExecutor, assert_nothing_is_left

from step3_hetero.errors import RequestError, TransportTimeout
from step3_hetero.runtime.deadlines import Deadlines
from step3_hetero.runtime.request import Request, SamplingParams


def within(seconds, **how):
    return SamplingParams(max_tokens=200, ignore_eos=True, deadline_s=seconds, **how)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_bad_deadline_is_refused_with_its_value(value):
    with pytest.raises(RequestError, match=r"deadline_s: .* refused; allowed: seconds, over 0"):
        SamplingParams(deadline_s=value)


def test_a_late_request_ends_with_what_it_has_and_frees_its_blocks(checked):
    engine = checked(CheckingExecutor(8))
    number = engine.submit([9] * 50, within(3600))
    for _ in range(5):
        engine.step()
    engine._deadlines.add(number, time.perf_counter())
    (done,) = engine.step()
    assert (done.request_id, done.finish_reason, len(done.token_ids)) == (number, "deadline", 5)
    assert_nothing_is_left(engine)


def test_a_request_is_late_in_the_queue_too(checked):
    engine = checked(CheckingExecutor(8), max_batch=1)
    first = engine.submit([9] * 5, within(None))
    late = engine.submit([8] * 5, within(1e-6))
    (done,) = engine.step()
    assert (done.request_id, done.finish_reason, done.token_ids) == (late, "deadline", ())
    assert len(engine.run([first])[0].token_ids) == 200
    assert_nothing_is_left(engine)


def test_a_deadline_counts_from_the_submission(checked):
    engine = checked(CheckingExecutor(8))
    number = engine.submit([9] * 5, within(0.05))
    time.sleep(0.06)
    assert engine.run([number])[0].token_ids == ()


def test_a_request_in_time_is_not_late(checked):
    engine = checked(CheckingExecutor(8))
    done = engine.generate([9] * 5, within(3600))
    assert done.finish_reason == "length"
    assert len(engine._deadlines) == 0


class Stuck(CheckingExecutor):
    """Lands nothing until told to; ``passes`` is what time does while it is waited for."""

    free = False
    waited_s = None

    def passes(self):
        return

    def collect(self, deadline_s=None):
        if self.free:
            return super().collect(deadline_s)
        self.waited_s = deadline_s
        self.passes()
        raise TransportTimeout("no micro-batch came back")


def test_a_late_request_ends_though_its_micro_batch_does_not_land(checked):
    executor = Stuck(8)
    engine = checked(executor)
    number = engine.submit([9] * 200, within(30))
    executor.passes = lambda: engine._deadlines.add(number, time.perf_counter())
    (done,) = engine.run([number])
    assert (done.finish_reason, done.token_ids) == ("deadline", ())
    assert 0 < executor.waited_s <= 30, "waited for longer than the request may take"
    assert engine.lanes.free_blocks == 6, "its blocks are being written to"
    executor.free = True
    engine.step()
    assert_nothing_is_left(engine)


def test_silence_without_a_deadline_is_the_executors_error(checked):
    engine = checked(Stuck(8))
    with pytest.raises(TransportTimeout, match="no micro-batch came back"):
        engine.generate([9] * 5, within(None))


def test_a_full_queue_refuses_and_stores_nothing(checked):
    engine = checked(CheckingExecutor(8), max_batch=1, max_waiting=2)
    kept = [engine.submit([9] * 5) for _ in range(2)]
    with pytest.raises(
        RequestError, match=r"2 requests wait, runtime\.max_waiting allows 2; ask again"
    ):
        engine.submit([9] * 5)
    assert list(engine._sequences) == kept
    engine.step()
    engine.submit([9] * 5)


def test_a_list_of_requests_may_be_longer_than_the_queue(checked):
    engine = checked(CheckingExecutor(8), max_batch=1, max_waiting=2)
    asked = [Request([9] * 5, SamplingParams(max_tokens=2, ignore_eos=True))] * 5
    assert [len(done.token_ids) for done in engine.generate_all(asked)] == [2] * 5


def test_the_earliest_deadline_comes_first_and_those_done_are_swept_out():
    deadlines = Deadlines()
    for number in range(1000):
        deadlines.add(number, 1000.0 - number)
    for number in range(990):
        deadlines.drop(number)
    assert len(deadlines._order) < 100
    assert deadlines.next() == 1.0
    assert deadlines.passed(3.0) == [999, 998, 997]
    assert len(deadlines) == 7
