"""A set answers as one: whole, in the members' order, once; what it has not answered is re-sent."""

import time

import pytest

from step3_hetero.afd.link import Message
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.remote import Remote
from step3_hetero.errors import RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.transport.base import CorruptFrame


class Peer:
    """A link to an instance whose answers the test gives."""

    def __init__(self, name):
        self.name = name
        self.calls = []
        self.coming = []
        self.closed = False
        self.silent = 0.0

    def post(self, kind, seq, said, arrays, *, epoch):
        assert kind == Kind.CALL
        self.calls.append((seq, epoch, said["call"]))

    def receive(self, deadline_s):
        message = self.coming.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    def silent_s(self):
        return self.silent

    def close(self):
        self.closed = True


class Role:
    """A role of ``instances`` as one caller sees it, and the links that it has opened."""

    def __init__(self, instances, ep, first=0):
        self.peers = {}
        self.remote = Remote("f", first, self.connect, 2.0, ep)
        self.live(range(instances))

    def connect(self, name, address):
        number = int(name.split(":")[1])
        self.peers[number] = Peer(f"{name} at {address}")
        return self.peers[number]

    def live(self, numbers):
        self.remote.point({n: f"address {time.monotonic_ns()}" for n in numbers})

    def says(self, number, message):
        """Let one instance say something, and return what the caller takes of it."""
        peer = self.peers[number]
        peer.coming.append(message)
        return self.remote.read(peer)

    def answers(self, number, seq, epoch):
        return self.says(number, Message(Kind.ANSWER, epoch, seq, {"from": number}, {}))

    def asked(self):
        return {n: [(seq, epoch) for seq, epoch, _ in p.calls] for n, p in self.peers.items()}

    def whole(self, seq):
        parts = self.remote.whole(seq)
        return parts and [part.said["from"] for part in parts]


def test_every_member_is_asked_and_answers_come_in_their_order():
    role = Role(4, ep=2)
    sent = role.remote.call(7, {"call": 100}, {})
    assert [s.member for s in sent] == [0, 1]
    assert role.asked() == {0: [(7, 1)], 1: [(7, 1)], 2: [], 3: []}
    assert [role.peers[n].calls[0][2] for n in (0, 1)] == [100, 102]
    assert role.answers(1, 7, 1) and role.whole(7) is None
    assert role.answers(0, 7, 1) and role.whole(7) == [0, 1]


def test_callers_begin_with_different_sets():
    role = Role(4, ep=2, first=1)
    role.remote.call(7, {}, {})
    assert role.asked() == {0: [], 1: [], 2: [(7, 1)], 3: [(7, 1)]}


def test_call_goes_whole_to_the_replica_and_the_lost_sets_partial_sums_count_for_nothing():
    role = Role(4, ep=2)
    role.remote.call(7, {}, {})
    assert role.answers(0, 7, 1)
    assert role.says(1, RoleLost("f:1")) is None
    assert role.asked()[2] == role.asked()[3] == [(7, 2)]
    assert role.remote.lost() == [1]
    assert role.answers(0, 7, 1) is None  # what it still had under way
    assert role.answers(2, 7, 2) and role.whole(7) is None
    assert role.answers(3, 7, 2) and role.whole(7) == [2, 3]


def test_call_waits_until_the_set_is_complete_again_and_is_then_asked_of_every_member():
    role = Role(2, ep=2)
    role.remote.call(7, {}, {})
    assert role.answers(0, 7, 1)
    role.says(1, RoleLost("f:1"))
    role.remote.call(8, {}, {})
    assert role.asked()[0] == [(7, 1)]
    role.live([1])
    assert role.asked() == {0: [(7, 1), (7, 2), (8, 1)], 1: [(7, 2), (8, 1)]}
    assert role.answers(1, 7, 2) and role.whole(7) is None
    assert role.answers(0, 7, 1) is None and role.whole(7) is None
    assert role.answers(0, 7, 2) and role.whole(7) == [0, 1]


def test_second_answer_of_a_member_is_dropped():
    role = Role(2, ep=2)
    role.remote.call(7, {}, {})
    assert role.answers(0, 7, 1)
    assert role.answers(0, 7, 1) is None and role.whole(7) is None
    assert role.answers(1, 7, 1) and role.whole(7) == [0, 1]
    assert role.answers(1, 7, 1) is None


@pytest.mark.parametrize("damage", [CorruptFrame("crc"), Message(Kind.AGAIN, 0, 0, {}, {})])
def test_damaged_frame_is_sent_again_to_its_member_alone_and_the_second_time_drops_it(damage):
    role = Role(2, ep=2)
    role.remote.call(7, {}, {})
    role.remote.call(8, {}, {})
    role.answers(0, 7, 1)
    role.says(0, damage)
    assert role.asked() == {0: [(7, 1), (8, 1), (8, 1)], 1: [(7, 1), (8, 1)]}
    assert role.answers(1, 7, 1) and role.whole(7) == [0, 1]
    assert role.remote.lost() == []
    role.says(0, damage)
    assert role.remote.lost() == [0] and role.peers[0].closed


def test_member_that_is_silent_while_it_owes_is_lost_and_one_that_owes_nothing_is_not():
    role = Role(2, ep=2)
    role.remote.call(7, {}, {})
    role.answers(0, 7, 1)
    for peer in role.peers.values():
        peer.silent = 3.0
    assert role.remote.lost() == [1]


def test_member_that_is_gone_when_it_is_asked_leaves_the_call_to_the_replica():
    role = Role(4, ep=2)
    role.remote.call(7, {}, {})
    assert role.says(1, RoleLost("f:1")) is None  # what was posted did not leave
    assert role.asked() == {0: [(7, 1)], 1: [(7, 1)], 2: [(7, 2)], 3: [(7, 2)]}
    assert role.remote.lost() == [1]


def test_what_a_member_cannot_do_is_told_in_its_own_words():
    role = Role(2, ep=2)
    role.remote.call(7, {}, {})
    with pytest.raises(Step3HeteroError, match="no such stage"):
        role.says(1, Message(Kind.FAILED, 1, 7, {"why": "no such stage"}, {}))


@pytest.mark.parametrize("passing", [RoleLost("busy"), TransportTimeout("mute"), CorruptFrame("")])
def test_member_that_cannot_be_reached_for_now_is_told_lost_and_reached_later(passing, monkeypatch):
    role = Role(1, ep=1)

    def fail(name, address):
        raise passing

    with monkeypatch.context() as patched:
        patched.setattr(role.remote, "_connect", fail)
        role.live([0])
    assert role.remote.links == [] and role.remote.lost() == [0]
    role.live([0])
    assert role.remote.links == [role.peers[0]] and role.remote.lost() == []
