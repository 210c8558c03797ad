"""Who sits where after a loss, and what silence and a closed link are taken for."""

import os
import resource
import time

import pytest

from step3_hetero.afd.launcher import Member
from step3_hetero.afd.link import Link, ready
from step3_hetero.afd.seats import Seats, State
from step3_hetero.errors import RoleLost


class Peer:
    """A channel whose descriptor and fate a test sets."""

    def __init__(self, number=-1):
        self.number = number

    def fileno(self):
        return self.number

    def send(self, frame, deadline_s):
        raise RoleLost("the peer is gone")

    def close(self):
        return


@pytest.fixture
def seats():
    members = [Member("a", n, True) for n in range(2)]
    return Seats(members, {"a": 1})


@pytest.mark.parametrize(("state", "place"), [(State.BROKEN, None), (State.STARTING, 0)])
def test_spare_leaves_a_broken_seat_until_its_end_is_seen(state, place, seats):
    lost, spare = seats
    lost.moves(state)
    spare.moves(State.READY)
    seats.needs(spare)
    assert spare.place == place


def test_seat_whose_message_cannot_be_sent_is_broken_and_has_no_link(seats):
    seat = seats.all[0]
    seat.link = Link(Peer(), "a:0")
    seat.moves(State.READY)
    seat.told(1)
    assert seat.link is None and seat.state is State.BROKEN


def test_peer_whose_sign_of_life_lies_unread_is_not_silent(tmp_path):
    with (tmp_path / "beat").open("w+b") as file:  # a file is always readable
        link = Link(Peer(file.fileno()), "f:0")
        link.last_seen = time.monotonic() - 60
        assert link.silent_s() == 0.0


def test_closed_link_is_found_and_does_not_break_the_wait_for_others():
    link = Link(Peer(-1), "f:0")
    assert ready([link], 0.1) == [link]


@pytest.fixture
def high():
    """Return what gives a pipe whose reading end has a number of its own beyond 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard <= 2100:
        pytest.skip(f"no more than {hard} descriptors are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2100), hard))
    opened = []

    def pipe(number):
        low, writing = os.pipe()
        os.dup2(low, number)
        os.close(low)
        opened.extend((number, writing))
        return number, writing

    yield pipe
    for one in opened:
        os.close(one)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_beyond_1023_are_waited_for_and_come_in_their_order(high):
    (first, to_first), (second, to_second) = high(2050), high(1030)
    links = [Link(Peer(n), f"f:{n}") for n in (first, second)]
    assert ready(links, 0.01) == []
    os.write(to_second, b"x")
    assert ready(links, 1) == [links[1]]
    os.write(to_first, b"x")
    assert ready([*links, first], 1) == [*links, first]


def test_end_of_the_other_side_is_something_to_read():
    reading, writing = os.pipe()
    os.close(writing)
    assert ready([reading], 1) == [reading]
    os.close(reading)


def test_descriptor_closed_while_it_is_waited_for_ends_the_wait_for_it_alone():
    reading, writing = os.pipe()
    link, other = Link(Peer(reading), "f:0"), os.eventfd(1)
    os.close(reading)
    os.close(writing)
    assert ready([link, other], 1) == [other]  # it does not say yet that it is closed
    link.close()
    assert ready([link, other], 1) == [link]
    os.close(other)
