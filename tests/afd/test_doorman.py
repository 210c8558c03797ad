"""Who comes to a role's address: a refusal that passes, and what a role does without."""

import threading
import time
import weakref

import pytest

from step3_hetero.afd.doorman import MOST_GREETED, Doorman
from step3_hetero.afd.drain import Drain
from step3_hetero.afd.greeting import say_hello
from step3_hetero.afd.link import Link, limits, ready
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.remote import Remote
from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.transport.registry import get_transport

FRAME = limits(1 << 16)
CONTRACT = {"protocol": 1}


class Door:
    """A role's doorman, and peers of it that have said hello."""

    def __init__(self):
        self.transport = get_transport("tcp")
        self.listener = self.transport.listen("", FRAME)
        self.doorman = Doorman("f:0", CONTRACT, self.listener)
        self.links = []

    def hello(self, name, contract=CONTRACT):
        self.links.append(Link(self.transport.connect(self.listener.address, FRAME, 5), "f:0"))
        say_hello(self.links[-1], contract, name)
        return self.links[-1]

    def agreed(self, name, contract=CONTRACT):
        link = self.hello(name, contract)
        link.wants(Kind.AGREED, 10)
        return link

    def served(self):
        self.links.append(self.doorman.front(Drain(0.0), 10)[0])

    def close(self):
        for link in self.links:
            link.close()
        self.doorman.close()
        self.listener.close()


@pytest.fixture
def door():
    made = Door()
    yield made
    made.close()


def test_role_without_a_front_is_lost_to_its_caller_until_it_has_one(door):
    remote = Remote("f", 0, lambda name, address: door.agreed("a:0"), 5.0)
    remote.point({0: "there"})
    assert remote.links == [] and remote.lost() == [0]
    door.agreed("the front")
    door.served()
    remote.point({0: "there"})
    assert len(remote.links) == 1 and remote.lost() == []


def test_role_of_another_contract_is_no_passing_loss(door):
    remote = Remote("f", 0, lambda name, address: door.agreed("a:0", {"protocol": 2}), 5.0)
    with pytest.raises(EdgeMismatch, match="protocol: 1 and 2"):
        remote.point({0: "there"})


def test_second_front_is_refused_for_now(door):
    door.agreed("the front")
    with pytest.raises(RoleLost, match="f:0 serves another front"):
        door.agreed("the front")


def test_doorman_outlives_the_want_of_threads(door, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread._target == door.doorman._greet:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(MOST_GREETED + 1):  # each gives its place back
            with pytest.raises(RoleLost):
                door.agreed("the front")
    door.agreed("the front")


def test_callers_that_are_gone_are_not_kept(door):
    door.agreed("the front")
    door.served()
    kept, before = [], set(threading.enumerate())
    for number in range(5):
        door.agreed(f"a:{number}")
        ready([door.doorman], 10)
        inside = door.doorman.caller()
        kept.append(weakref.ref(inside))
        inside.close()
    del inside
    for thread in set(threading.enumerate()) - before:  # who greeted them holds them to its end
        thread.join(10)
    assert [link() is None for link in kept] == [True] * 4 + [False]


def test_front_that_says_hello_while_a_role_ends_is_refused_for_now():
    door = Door()
    link = Link(door.transport.connect(door.listener.address, FRAME, 5), "f:0")
    until = time.monotonic() + 10
    while door.doorman._greeted._value == MOST_GREETED and time.monotonic() < until:
        time.sleep(0.01)
    door.close()
    say_hello(link, CONTRACT, "the front")
    with pytest.raises(RoleLost, match="f:0 is ending"):
        link.wants(Kind.AGREED, 10)
    link.close()
