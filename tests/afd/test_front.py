"""The front against roles that a test plays: what comes together, what comes damaged or never."""

import os
import signal
import time

import pytest
from afd.played import CONTRACT, RESULT, Stage, batch

from step3_hetero.afd.launcher import Member, Reports, tell
from step3_hetero.afd.messages import MOST_EPOCH, Kind
from step3_hetero.afd.seats import Told
from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.transport.base import CorruptFrame

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_result_that_came_with_the_end_of_its_role_is_computed_again(front):
    stage = Stage()
    executor = front(stage)
    first, second = executor.submit(batch()), executor.submit(batch())
    (role,) = stage.played
    role.link.send(Kind.RESULT, first.number, *RESULT)
    role.ended("signal SIGKILL")
    landed = {x.ticket: x.result for x in (executor.collect(5), executor.collect(5))}
    assert landed == {first: None, second: None}
    assert len(stage.played) == 2


def test_results_of_the_other_instance_stay(front):
    stage = Stage()
    executor = front(stage, [Member("a", 0, True), Member("a", 1, True)], a=2)
    lost, kept = executor.submit(batch(), 0), executor.submit(batch(), 1)
    stage.played[1].link.send(Kind.RESULT, kept.number, *RESULT)
    stage.played[0].ended("signal SIGKILL")
    landed = [executor.collect(5) for _ in range(2)]
    assert {x.ticket: x.result is None for x in landed} == {lost: True, kept: False}


def test_a_micro_batch_that_waited_for_an_instance_is_not_run_after_its_loss(front):
    stage = Stage()
    executor = front(stage)
    stage.played[0].link.send(Kind.LEAVING)
    _until(lambda: executor._seats.leading(0).said_it_leaves, executor)
    waiting = executor.submit(batch())
    stage.played[0].ended("exit code 0")
    landed = executor.collect(5)
    assert (landed.ticket, landed.result) == (waiting, None)
    _until(lambda: executor._seats.leading(0).is_ready, executor)
    executor.forget_image(5)  # the last thing that the new one is told
    told = []
    while Kind.FORGET not in told:
        told.append(stage.played[1].link.receive(5).kind)
    assert Kind.BATCH not in told


def _until(condition, executor, deadline_s=10.0):
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until
        executor._attend(0.1)


def test_a_damaged_frame_drops_the_role_and_its_work_is_done_again(front):
    stage = Stage()
    executor = front(stage)
    ticket = executor.submit(batch())
    link = executor._seats.leading(0).link

    def damaged(deadline_s):
        raise CorruptFrame("does not match its checksum")

    link.receive = damaged
    stage.played[0].link.send(Kind.RESULT, ticket.number, *RESULT)
    assert executor.collect(10).result is None
    assert len(stage.played) == 2


def test_what_a_role_heard_damaged_is_told_again_in_order_and_the_second_time_it_is_dropped(front):
    stage = Stage()
    executor = front(stage)
    (role,) = stage.played
    tickets = [executor.submit(batch()).number for _ in range(2)]
    executor.copy_blocks([(0, 1)])

    def told(count):
        heard = []
        while len(heard) < count:
            message = role.link.receive(5)
            if message.kind != Kind.BEAT:
                heard.append((message.epoch, Kind(message.kind), message.seq))
        return heard

    peers, first, second, copy = told(4)
    kinds = (Kind.PEERS, Kind.BATCH, Kind.BATCH, Kind.COPY)
    assert (peers, first, second, copy) == tuple(
        zip((1, 2, 3, 4), kinds, (0, *tickets, 0), strict=True)
    )
    role.link.send(Kind.AGAIN, said={"heard": 2})
    executor._attend(5)
    assert told(2) == [second, copy]
    role.link.send(Kind.RESULT, tickets[0], *RESULT)
    assert executor.collect(5).result is not None
    role.link.send(Kind.AGAIN, said={"heard": 3})
    executor._attend(5)
    assert told(1) == [copy]
    role.link.send(Kind.AGAIN, said={"heard": 3})
    assert executor.collect(10).result is None
    assert len(stage.played) == 2


@pytest.mark.parametrize("heard", [-1, "x", None])
def test_a_role_that_heard_nonsense_is_refused_by_name(front, heard):
    stage = Stage()
    executor = front(stage)
    stage.played[0].link.send(Kind.AGAIN, said={"heard": heard})
    with pytest.raises(EdgeMismatch, match=r"^a:0: heard: "):
        executor._attend(5)


def test_numbers_of_what_is_told_begin_again_where_a_frame_has_no_more():
    told = Told()
    told._last = MOST_EPOCH - 1
    numbers = [told.add((Kind.BATCH, n)) for n in range(4)]
    assert numbers == [MOST_EPOCH, 1, 2, 3]
    assert [n for n, _ in told.after(MOST_EPOCH)] == [1, 2, 3]
    told.heard(1)
    assert [n for n, _ in told.after(0)] == [2, 3]


def test_a_role_that_leaves_is_no_death(front):
    stage = Stage()
    executor = front(stage)
    for count in range(1, 9):  # more often than an instance may die
        stage.played[-1].link.send(Kind.LEAVING)
        _until(lambda: executor._seats.leading(0).said_it_leaves, executor)
        stage.played[-1].ended("exit code 0")
        _until(lambda n=count: len(stage.played) == n + 1, executor)
        _until(lambda: executor._seats.leading(0).is_ready, executor)


def test_a_role_that_dies_too_often_fails_the_requests(front):
    stage = Stage()
    executor = front(stage)
    with pytest.raises(RoleLost, match=r"a:0 ended with signal SIGKILL, 6 times in a row"):
        for _ in range(9):
            count = len(stage.played)
            stage.played[-1].ended("signal SIGKILL")
            _until(lambda n=count: len(stage.played) > n, executor)
            _until(lambda: executor._seats.leading(0).is_ready, executor)


def test_a_role_that_agrees_to_another_contract_is_refused(front):
    stage = Stage([CONTRACT, {"protocol": 2}])
    executor = front(stage)
    stage.played[0].ended("signal SIGKILL")
    with pytest.raises(EdgeMismatch, match="protocol: 1 and 2"):
        _until(lambda: False, executor)


def test_reports_are_facts_and_nothing_else():
    reading, writing = os.pipe()
    reports = Reports(reading)
    tell(writing, address="x", loaded=2)
    os.write(writing, b'no fact\n[1]\n{"sta')
    assert reports.read() == [{"address": "x", "loaded": 2}]
    os.write(writing, b'te": "ready"}\n')
    assert reports.read() == [{"state": "ready"}]
    os.close(writing)
    assert reports.read() == [] and not reports.is_open


class Reusing(Stage):
    """Its second role tells its end by the number by which the first one's reports came."""

    def launch(self, member):
        if not self.played:
            self.number = super().launch(member).reports.fileno()
            return self.played[0]
        held = os.open(os.devnull, os.O_RDONLY)
        if held != self.number:  # nothing else of the new role gets it meanwhile
            os.dup2(held, self.number)
            os.close(held)
        role = super().launch(member)
        os.dup2(role._bell, self.number)
        os.close(role._bell)
        role._bell = self.number
        return role


def test_a_descriptor_s_number_that_is_another_s_in_the_same_round_ends_nobody_else(front):
    stage = Reusing()
    executor = front(stage)
    first = stage.played[0]
    first.tells(said="something to read")
    first.ended("signal SIGKILL")  # both are found in one round, the end first
    executor._attend(1)
    assert len(stage.played) == 2 and stage.played[1].fileno() == stage.number
    seat = executor._seats.leading(0)
    assert seat.deaths == 1 and seat.handle is stage.played[1]
    _until(lambda: seat.is_ready, executor)
    assert len(stage.played) == 2


@pytest.mark.parametrize("number", [1, 2], ids=["first", "second"])
def test_an_interrupt_while_a_role_is_started_waits_until_it_has_a_seat_and_ends_it(front, number):
    class Interrupted(Stage):
        def launch(self, member):
            role = super().launch(member)
            if len(self.played) == number:
                signal.raise_signal(signal.SIGINT)
                self.heard_later = True
            return role

    stage = Interrupted()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        front(stage, [Member("a", 0, True), Member("a", 1, True)], a=2)
    assert stage.heard_later and len(stage.played) == number
    assert not any(role._is_open for role in stage.played)
    assert signal.getsignal(signal.SIGINT) is before
