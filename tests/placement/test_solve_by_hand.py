"""The integer program against answers worked by hand; the working stands beside each."""

import os

import numpy as np
import pytest

from step3_hetero.placement.solve import (
    Mix,
    cheapest_for,
    cheapest_per_token,
    knapsack,
    most_tokens,
    quietly,
    undominated,
)

SECONDS = 10.0


def mix(a, f, pools, send=None, take=None):
    """Return a program. a, f: (pool, cards, dollars, tokens) of each column; pools: cards in each.

    ``send`` and ``take`` overrule the tokens pair by pair.
    """
    columns = [*a, *f]
    rows = [[float(c[1]) if c[0] == p else 0.0 for c in columns] for p in range(len(pools))]
    tokens_a = np.array([[float(c[3])] * len(f) for c in a])
    tokens_f = np.array([[float(c[3]) for c in f]] * len(a))
    return Mix(
        np.array([float(c[2]) for c in a]), np.array([float(c[2]) for c in f]),
        tokens_a if send is None else np.array(send, float),
        tokens_f if take is None else np.array(take, float),
        np.array(rows), np.array(pools, float),
    )  # fmt: skip


A, F = (0, 1, 1, 10), (1, 4, 4, 40)
"""An attention card of $1 that sends 10 tokens; an FFN set of 4 cards and $4 that takes 40."""

PER_TOKEN = {
    # 4 instances send the 40 that one set takes: (4 + 4) / 40.
    "four instances fill a set": (mix([A], [F], [8, 8]), 8 / 40),
    # Only 3 instances: the set is 3/4 full: (3 + 4) / 30.
    "too few instances": (mix([A], [F], [3, 8]), 7 / 30),
    # A set takes 35. One set: 7/30 with 3, 8/35 with 4. Two sets take 70 from 7: (7 + 8) / 70.
    "two sets share an instance": (mix([A], [(1, 4, 4, 35)], [8, 8]), 15 / 70),
    # $2 for 7 tokens, $3 for 20. Sets 1: 7/14, 9/20; 2: 16/35, 18/40; 3: 25/56, 27/60: 25/56.
    "a set left a little empty": (mix([(0, 1, 2, 7)], [(1, 1, 3, 20)], [9, 3]), 25 / 56),
    # One pool of 10: one set leaves 6 cards, 4 fill it: 8/40. Two sets leave 2 cards: 10/20.
    "both from one pool": (mix([A], [(0, 4, 4, 40)], [10]), 8 / 40),
    # Cheap cards: 2 only. 2 cheap + 1 dear (20 tokens, $3) fill the set: (2 + 3 + 4) / 40 = .225;
    # 2 dear: 10/40 = .25; 2 cheap alone: 6/20 = .3.
    "two kinds of attention mixed": (
        mix([A, (2, 1, 3, 20)], [F], [2, 4, 5]), 9 / 40
    ),
    # The big set with 5 instances of 8: 9/40 = .225; small sets ($1, 8): 2/8; all: 19/80 = .2375.
    "the better of two kinds of FFN": (
        mix([(0, 1, 1, 8)], [F, (2, 1, 1, 8)], [10, 4, 5]), 9 / 40
    ),
    # To the $4 set the wire passes 5 an instance: 8 instances, 12/40. To the $6 set 10: 10/40.
    "a narrow wire to the cheaper set": (
        mix([A], [F, (2, 4, 6, 40)], [8, 4, 4], send=[[5, 10]]), 10 / 40
    ),
    # No whole number of instances of 97 fills a set of 2048 but 2048 to 97: 1/97 + 8/2048.
    "a million cards hold the exact unit": (
        mix([(0, 1, 1, 97)], [(1, 8, 8, 2048)], [10**6, 10**6]), 1 / 97 + 8 / 2048
    ),
    # An instance may divide itself: a takes to f1 15 of its 10s, to f2 too: 3 instances send 30,
    # sets of 15 at $1 each, two of them of two kinds: (3 + 2) / 30.
    "an instance divides itself": (
        mix([A], [(1, 1, 1, 15), (2, 1, 1, 15)], [3, 1, 1]), 5 / 30
    ),
}  # fmt: skip


@pytest.mark.parametrize(("program", "want"), PER_TOKEN.values(), ids=PER_TOKEN)
def test_least_cost_per_token_equals_the_hand(program, want):
    answer = cheapest_per_token(program, np.inf, SECONDS)
    assert answer.counts.ratio == pytest.approx(want, rel=1e-9)
    assert answer.bound == pytest.approx(want, rel=1e-6) and answer.bound <= want * (1 + 1e-12)


DEMANDED = {
    # 5 instances for 50; two sets, since one takes 40: 5 + 8.
    "the second set for ten tokens": (mix([A], [F], [8, 8]), 50, 13),
    # 4 instances, one set.
    "exactly full": (mix([A], [F], [8, 8]), 40, 8),
    # One token more: a fifth instance and a second set.
    "one token too many": (mix([A], [F], [8, 8]), 41, 13),
    # 5 instances; one big set ($4, 40) and one small ($2, 10) take 50; 3 small take only 30.
    "big and small set": (mix([A], [F, (2, 1, 2, 10)], [10, 4, 3]), 50, 11),
    # Two sets take 80 at most.
    "more than the sets take": (mix([A], [F], [20, 8]), 81, None),
}


@pytest.mark.parametrize(("program", "tokens", "want"), DEMANDED.values(), ids=DEMANDED)
def test_least_cost_for_a_demand_equals_the_hand(program, tokens, want):
    answer = cheapest_for(program, tokens, np.inf, SECONDS)
    if want is None:
        assert answer.counts is None and answer.bound == np.inf
    else:
        assert answer.counts.cost == pytest.approx(want)
        assert answer.bound == pytest.approx(want)


MOST = {
    # 8 instances send 80, two sets of 35 take 70; 7 instances do: 7 + 8.
    "sets are the limit": (mix([A], [(1, 4, 4, 35)], [8, 8]), 70, 15),
    # 6 instances send 60: 6 + 8.
    "instances are the limit": (mix([A], [F], [6, 8]), 60, 14),
    # 16 cards: 3 sets and 4 instances 40; 2 sets and 8 instances 80: all 16 cards.
    "one pool shared out": (mix([A], [(0, 4, 4, 40)], [16]), 80, 16),
    # 15 cards: 2 sets and 7 instances.
    "one card less": (mix([A], [(0, 4, 4, 40)], [15]), 70, 15),
}


@pytest.mark.parametrize(("program", "tokens", "cost"), MOST.values(), ids=MOST)
def test_most_tokens_equal_the_hand(program, tokens, cost):
    answer = most_tokens(program, SECONDS)
    assert answer.counts.tokens == pytest.approx(tokens)
    assert answer.counts.cost == pytest.approx(cost), "the cheapest of those that serve as many"


NOTHING = {
    "no wire": mix([A], [F], [8, 8], send=[[0]]),
    "a pool too small for a set": mix([A], [F], [8, 3]),
}


@pytest.mark.parametrize("program", NOTHING.values(), ids=NOTHING)
def test_what_cannot_run_has_no_answer(program):
    assert cheapest_per_token(program, np.inf, SECONDS).counts is None
    assert most_tokens(program, SECONDS).counts is None


def test_a_score_that_is_to_be_beaten_is_not_merely_met():
    program = PER_TOKEN["four instances fill a set"][0]
    assert cheapest_per_token(program, 8 / 40, SECONDS).counts is None
    assert cheapest_per_token(program, 8 / 40 * 1.001, SECONDS).counts is not None


def test_a_solver_that_gives_up_is_asked_again():
    """HiGHS of scipy 1.17: "Solve error" where the cost has to be a hair under the optimum.

    Of the first attention column one instance ($844.44) and the cheap set ($422.22) serve 8.46
    tokens for $1266.67, which is the least: the others cost $1638.89 and more.
    """
    program = Mix(
        np.array([844.4444444444445, 1638.888888888889]),
        np.array([422.2222222222222, 819.4444444444445, 844.4444444444445]),
        np.array([[303.0, 0, 303], [0, 201, 0]]),
        np.array([[1819.0, 0, 3639], [0, 1061, 0]]),
        np.array([[2.0, 0, 1, 0, 2], [2, 0, 0, 0, 2], [0, 2, 0, 1, 0], [0, 2, 0, 0, 0]]),
        np.array([3.0, 2, 3, 2]),
    )
    answer = cheapest_for(program, 8.464817012691357, 1266.6666666666667, SECONDS)
    assert answer.counts is None
    assert answer.bound == pytest.approx(1266.6666666666667, rel=1e-6)


def test_knapsack_takes_the_cheapest_that_serve_enough():
    # $3 for 10 (two of them), $5 for 20 (one): 30 tokens cost 8; 40 cost 11; 41 cannot be.
    rows, limits = np.eye(2), np.array([2.0, 1.0])
    cost, served = np.array([3.0, 5.0]), np.array([10.0, 20.0])
    for tokens, want in ((30, 8), (40, 11)):
        counts, bound = knapsack(cost, served, rows, limits, tokens, SECONDS)
        assert cost @ counts == pytest.approx(want) == pytest.approx(bound)
    assert not knapsack(cost, served, rows, limits, 41, SECONDS)[0].any()


def test_a_column_goes_only_where_whole_copies_of_another_do_as_much():
    cards = np.array([1.0, 2.0, 3.0])
    give = np.array([[10.0], [20.0], [31.0]])
    same = np.ones((3, 1))
    assert undominated(cards, give, same, [0, 0, 0]) == [0, 2], "2 x 10 is 20, 3 x 10 is not 31"
    assert undominated(cards, give, same, [0, 1, 0]) == [0, 1, 2], "another pool's stays"
    gets = np.array([[1.0], [2.0], [1.0]])
    assert 1 in undominated(cards, give, gets, [0, 0, 0]), "it is reached better"
    two, three = np.array([[20.0], [30.0]]), np.array([2.0, 3.0])
    assert undominated(three, two, np.ones((2, 1)), [0, 0]) == [0, 1], "one of 2 is no 1.5"


def test_a_solver_that_writes_past_python_does_not_reach_stdout(capfd):
    def talks(number):
        os.write(1, b"HiGHS says something")
        return number + 1

    print("{", end="")
    assert quietly(talks, 41) == 42
    print("}", end="")
    assert capfd.readouterr().out == "{}"
