"""Who sits where after a loss, and what silence and a closed link are taken for."""

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
