"""Calls and answers larger than every buffer between them: nobody waits for who waits for him."""

import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from step3_hetero.afd import link as link_module
from step3_hetero.afd.link import Link, ready
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.remote import Remote
from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport import tcp
from step3_hetero.transport.base import FrameLimits
from step3_hetero.transport.registry import get_transport

NBYTES = 4 << 20
"""Several times what both sockets of a connection hold, once they are asked for little."""

LIMITS = FrameLimits(1 << 16, NBYTES, 8)
UNDERWAY = 3
GIVE_UP_S = 5.0


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Little room in the kernel, and little patience: who waits for himself is seen soon."""
    monkeypatch.setattr(tcp, "BUFFER_BYTES", 128 << 10)
    monkeypatch.setattr(link_module, "SEND_DEADLINE_S", GIVE_UP_S)


@pytest.fixture(params=["tcp", "shm"])
def transport(request):
    return get_transport(request.param)


class Answering(threading.Thread):
    """A worker of one thread, as `Worker` is: reads a call of anyone, sends the answer, goes on."""

    def __init__(self, transport, callers):
        super().__init__(daemon=True)
        self.listener = transport.listen("", LIMITS)
        self.over = threading.Event()
        self.callers = callers
        self.start()

    def run(self):
        links = [Link(self.listener.accept(30), "a caller") for _ in range(self.callers)]
        with suppress(RoleLost, TransportTimeout):
            while not self.over.is_set():
                for one in ready(links, 0.05):
                    self.answer(one)
        for one in links:
            one.close()
        self.listener.close()

    @staticmethod
    def answer(link):
        call = link.receive(GIVE_UP_S)
        link.send(Kind.ANSWER, call.seq, {}, call.arrays, epoch=call.epoch)


def remote_at(transport, worker, role="f", deadline_s=60.0):
    """Return a role whose one instance is ``worker``."""
    remote = Remote(
        role, 0, lambda name, at: Link(transport.connect(at, LIMITS, 30), name), deadline_s
    )
    remote.point({0: worker.listener.address})
    return remote


def answered(remote, link):
    """Return role, number and content of an answer that has come; what lent it is let go."""
    answer = remote.read(link)
    if answer is None:
        return []
    (whole,) = remote.whole(answer.seq)
    return [(remote.role, answer.seq, int(whole.arrays["u"][-1]))]


def drive(remotes, got):
    """Ask each remote `UNDERWAY` times before reading anything, then read all answers."""
    for seq in range(UNDERWAY):
        for number, remote in enumerate(remotes):
            remote.call(seq, {}, {"u": np.full(NBYTES, 10 * number + seq, np.uint8)})
    until = time.monotonic() + 60
    while len(got) < UNDERWAY * len(remotes) and time.monotonic() < until:
        for link in ready([x for remote in remotes for x in remote.links], 0.05):
            remote = next(r for r in remotes if link in r.links)
            got.extend(answered(remote, link))
        if any(remote.lost() for remote in remotes):
            return


def test_a_caller_with_several_large_calls_under_way_gets_all_answers(transport):
    worker, got = Answering(transport, 1), []
    remote = remote_at(transport, worker)
    drive([remote], got)
    worker.over.set()
    remote.close()
    worker.join(30)
    assert got == [("f", seq, seq) for seq in range(UNDERWAY)]


def test_callers_and_workers_in_a_ring_do_not_wait_for_each_other(transport):
    workers = [Answering(transport, 2), Answering(transport, 2)]
    callers, got = [], [[], []]
    for mine in got:
        order = workers if mine is got[0] else workers[::-1]
        remotes = [remote_at(transport, w, f"r{n}") for n, w in enumerate(order)]
        callers.append((threading.Thread(target=drive, args=(remotes, mine)), remotes))
    for thread, _ in callers:
        thread.start()
    for thread, _ in callers:
        thread.join(90)
    for worker in workers:
        worker.over.set()
    for _, remotes in callers:
        for remote in remotes:
            remote.close()
    want = [(f"r{n}", seq, 10 * n + seq) for n in range(2) for seq in range(UNDERWAY)]
    assert [sorted(mine) for mine in got] == [want, want]


def test_a_member_whose_answers_wait_for_another_member_is_not_held_up(transport):
    worker, silent = Answering(transport, 1), transport.listen("", LIMITS)
    remote = Remote("f", 0, lambda name, at: Link(transport.connect(at, LIMITS, 30), name), 60, 2)
    remote.point({0: worker.listener.address, 1: silent.address})
    count, got, until = 2 * UNDERWAY, [], time.monotonic() + 4 * GIVE_UP_S
    for seq in range(count):
        remote.call(seq, {}, {"u": np.full(NBYTES, seq, np.uint8)})
    while len(got) < count and time.monotonic() < until:
        got += [remote.read(link).seq for link in ready(remote.links, 0.05)]
    held = [int(remote._asked[seq].answers[0].arrays["u"][-1]) for seq in got]
    worker.over.set()
    remote.close()
    silent.close()
    worker.join(30)
    assert got == held == list(range(count))


def test_a_worker_that_is_stopped_is_seen_by_its_silence_and_keeps_no_thread(transport):
    class Stopped:
        listener = transport.listen("", LIMITS)

    stopped = Stopped()
    remote = remote_at(transport, stopped, deadline_s=0.3)
    channel = stopped.listener.accept(30)
    before, start = set(threading.enumerate()), time.monotonic()
    for seq in range(UNDERWAY):
        remote.call(seq, {}, {"u": np.zeros(NBYTES, np.uint8)})
    while not (lost := remote.lost()) and time.monotonic() < start + 30:
        assert ready(remote.links, 0.05) == []
    assert lost == [0]
    assert time.monotonic() - start < GIVE_UP_S
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive(), f"{thread.name} is left"
    channel.close()
    stopped.listener.close()


@pytest.fixture
def pair(transport):
    listener = transport.listen("", LIMITS)
    here = Link(transport.connect(listener.address, LIMITS, 30), "f:0")
    there = Link(listener.accept(30), "a:0")
    yield here, there
    for end in (here, there, listener):
        end.close()


def test_a_message_too_large_is_told_once_to_who_reads_and_closes_the_link(pair):
    here, _ = pair
    here.post(Kind.CALL, 1, {}, {"u": np.zeros(NBYTES + 1, np.uint8)})
    assert here.flush(30)
    assert ready([here], 30) == [here]
    with pytest.raises(EdgeMismatch, match="refused; agreed"):
        here.receive(0)
    assert ready([here], 30) == [here]
    with pytest.raises(RoleLost):
        here.receive(0)


def test_what_was_posted_has_left_in_its_order_once_it_is_flushed(pair):
    here, there = pair
    for seq in range(5):
        here.post(Kind.CALL, seq, {}, {"u": np.zeros(NBYTES, np.uint8)})
    assert not here.flush(0.05)
    assert [there.receive(30).seq for _ in range(5)] == list(range(5))
    assert here.flush(30)


def test_a_link_closed_while_a_message_leaves_lets_who_flushes_go(pair):
    here, _ = pair
    for seq in range(5):
        here.post(Kind.CALL, seq, {}, {"u": np.zeros(NBYTES, np.uint8)})
    threading.Timer(0.2, here.close).start()
    assert here.flush(30)
