"""Who is slow: beside peers at once, alone beside its own beginning; told once."""

from types import SimpleNamespace

import pytest

from step3_hetero.runtime.clocks import StageClock
from step3_hetero.runtime.paces import Paces, table_of

CALLS = 20


def counting(paces):
    """Return what files calls of members, (name, seconds), and gives what is told of them."""
    clock = StageClock()

    def count(*members, calls=CALLS, kind="ffn"):
        for name, seconds in members:
            for _ in range(calls):
                clock.add(name, kind, seconds)
        return paces.take("a:0", clock)

    return count


@pytest.fixture
def paces():
    return Paces(window_calls=CALLS, look_s=0.0)


def ratios(paces):
    return {r.member: (r.against, r.ratio) for r in paces.rows()}


def test_slow_member_is_told_of_once_with_its_times_and_its_peers(paces):
    count = counting(paces)
    ((member, line),) = count(("f:0", 0.01), ("f:1", 0.03), ("f:2", 0.01))
    assert member == "f:1"
    said = "slow: ffn takes 29.925 ms in the median of 20 calls, 3.1 times that of its peers"
    assert line == f"{said} (9.702 ms)"
    assert count(("f:0", 0.01), ("f:1", 0.03), ("f:2", 0.01)) == []


def test_member_that_becomes_slow_late_is_told_of_though_its_whole_run_is_not_slow(paces):
    count = counting(paces)
    assert count(("f:0", 0.01), ("f:1", 0.01), calls=10 * CALLS) == []
    ((member, _),) = count(("f:0", 0.01), ("f:1", 0.02))
    assert member == "f:1" and ratios(paces)["f:1"][1] == 1.0


@pytest.mark.parametrize(
    "members",
    [
        [("f:0", 0.010), ("f:1", 0.014)],
        [("f:0", 0.01), ("a:0", 0.1)],
        [("f:0", 0.01)],
    ],
    ids=["under the bound", "another role", "alone"],
)
def test_nobody_else_is_told_of(paces, members):
    count = counting(paces)
    assert [count(*members) for _ in range(5)] == [[]] * 5


def test_a_few_slow_calls_are_a_pause_and_no_slow_member(paces):
    count = counting(paces)
    count(("f:0", 0.01), ("f:1", 0.01))
    assert count(("f:1", 0.5), calls=CALLS // 4) == []
    assert count(("f:0", 0.01), ("f:1", 0.01)) == []


def test_another_kind_of_work_is_compared_with_its_own(paces):
    count = counting(paces)
    count(("f:0", 0.01), ("f:1", 0.01))
    assert count(("f:0", 0.1), ("f:1", 0.1), kind="ffn round trip") == []
    assert len(paces.rows()) == 4


def test_alone_it_is_held_against_its_own_beginning():
    paces = Paces(beginning_s=0.0, window_calls=CALLS, look_s=0.0)
    count = counting(paces)
    count(("f:0", 0.01))
    assert ratios(paces) == {"f:0": (None, None)}
    count(("f:0", 0.01))
    count(("f:0", 0.02))
    against, ratio = ratios(paces)["f:0"]
    assert against == "beginning" and ratio == pytest.approx(2.0, rel=0.1)


def test_teller_that_began_anew_is_counted_from_nothing(paces):
    count = counting(paces)
    count(("f:0", 0.01), ("f:1", 0.01), calls=5 * CALLS)
    ((member, _),) = counting(paces)(("f:0", 0.01), ("f:1", 0.04))
    assert member == "f:1" and [r.calls for r in paces.rows()] == [CALLS, CALLS]


def test_clocks_of_several_tellers_are_one_member_s_pace(paces):
    for teller in ("a:0", "a:1"):
        clock = StageClock()
        clock.add("f:0", "ffn", 0.01)
        paces.take(teller, clock)
    (row,) = paces.rows()
    assert (row.calls, row.mean_s) == (2, 0.01)


def test_rows_and_table_say_mean_median_and_95th_percentile(paces):
    clock = StageClock()
    for number in range(100):
        clock.add("f:10", "ffn", 0.001 if number < 90 else 0.1)
        clock.add("f:9", "ffn", 0.001)
    paces.take("a:0", clock)
    nine, ten = paces.rows()  # by number, not by letter
    assert (nine.member, ten.member) == ("f:9", "f:10")
    assert ten.mean_s == pytest.approx(0.0109)
    assert ten.p50_s == pytest.approx(0.001, rel=0.045)
    assert ten.p95_s == pytest.approx(0.1, rel=0.045)
    header, rows = table_of([nine, ten])
    told = dict(zip(header, rows[1], strict=True))
    assert (told["member"], told["calls"], told["mean ms"]) == ("f:10", "100", "10.900")
    assert (told["ratio"], told["against"]) == ("1.00", "peers")
    assert ten.to_json()["role"] == "f"


def test_slow_member_whose_peer_tells_later_is_told_of_then(paces):
    told = []
    for member, seconds in (("f:1", 0.03), ("f:0", 0.01)):
        clock = StageClock()
        for _ in range(CALLS):
            clock.add(member, "ffn", seconds)
        told.append([name for name, _ in paces.take(member, clock)])
    assert told == [[], ["f:1"]]


def test_clocks_are_added_up_once_a_while_and_rows_are_of_now(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(
        "step3_hetero.runtime.paces.time", SimpleNamespace(monotonic=lambda: now_s[0])
    )
    paces = Paces(window_calls=CALLS, look_s=0.2)
    count = counting(paces)
    assert count(("f:0", 0.01), ("f:1", 0.01)) == []
    assert count(("f:1", 0.05)) == []
    assert {r.member: r.calls for r in paces.rows()} == {"f:0": CALLS, "f:1": 2 * CALLS}
    now_s[0] = 0.25
    assert [member for member, _ in count(("f:0", 0.01))] == ["f:1"]
