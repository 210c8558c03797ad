"""The front against roles that a test plays: what comes together, what comes damaged or never."""

import os
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from step3_hetero.afd.doorman import FRONT
from step3_hetero.afd.elsewhere import Watched
from step3_hetero.afd.front import ProcessExecutor
from step3_hetero.afd.launcher import Launcher, Member, Reports, tell
from step3_hetero.afd.link import Link, limits
from step3_hetero.afd.messages import Kind, result_parcel
from step3_hetero.backend import BatchMeta
from step3_hetero.errors import EdgeMismatch, RoleLost, Step3HeteroError
from step3_hetero.runtime.microbatch import BatchResult, Choice, MicroBatch
from step3_hetero.specs import Limits
from step3_hetero.transport.base import CorruptFrame
from step3_hetero.transport.inproc import InprocTransport

pytestmark = pytest.mark.usefixtures("no_leaks")

CONTRACT = {"protocol": 1}
ONE = (Member("a", 0, True),)
FRAME = limits(1 << 20)
TRANSPORT = InprocTransport()


def batch():
    one, none = np.zeros(1, np.int32), np.zeros((1, 1), np.int32)
    meta = BatchMeta(one, one, np.array([0, 1], np.int32), one + 1, none)
    choice = Choice(*(np.zeros(1, np.float32) for _ in range(4)), banned=-1)
    return MicroBatch(one, meta, one, choice, [None])


RESULT = result_parcel(BatchResult(np.array([7], np.int32), [None]))


class Played(Watched):
    """A role whose side of the link the test holds."""

    def __init__(self, member, contract):
        super().__init__(member.name)
        self.contract = contract
        self.listener = TRANSPORT.listen("", FRAME)
        self.link = None
        self.tells(address=self.listener.address)
        self._thread = threading.Thread(target=self._greet, daemon=True)
        self._thread.start()

    def _greet(self):
        with suppress(Step3HeteroError):  # a front that has no use for it goes
            self.link = Link(self.listener.accept(3), FRONT)
            self.link.wants(Kind.HELLO, 10)
            self.link.send(Kind.AGREED, said={"contract": self.contract})
            self.link.wants(Kind.LOAD, 10)
            self.link.send(Kind.READY)

    def end(self, *, at_once=False):
        self._thread.join(10)
        self.listener.close()
        if self.link is not None:
            self.link.close()
        super().end()


class Stage(Launcher):
    def __init__(self, contracts=()):
        self.played = []
        self.contracts = list(contracts)

    def launch(self, member):
        contract = self.contracts.pop(0) if self.contracts else CONTRACT
        self.played.append(Played(member, contract))
        return self.played[-1]


@pytest.fixture
def front():
    """Start a front over played roles: by default one attention instance."""
    made = []

    def start(stage, members=ONE, microbatches=2, **counts):
        made.append(
            ProcessExecutor(
                members, counts or {"a": 1}, stage,
                lambda name, address: Link(TRANSPORT.connect(address, FRAME, 2), name),
                CONTRACT, Limits(8, 8, 8), 4, microbatches, 2.0,
            )
        )  # fmt: skip
        return made[-1]

    yield start
    while made:  # a channel of this transport goes with the last who knows it
        made.pop().close()


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
