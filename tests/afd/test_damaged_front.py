"""Frames of the front that arrive damaged: asked for again, in order, and no role's end."""

import numpy as np
import pytest

from step3_hetero import SamplingParams, load
from step3_hetero.afd import local
from step3_hetero.afd.doorman import FRONT
from step3_hetero.afd.driver import Driver
from step3_hetero.afd.elsewhere import Threads
from step3_hetero.afd.link import Link, Message
from step3_hetero.afd.messages import MOST_EPOCH, Kind
from step3_hetero.afd.wire import Wire
from step3_hetero.afd.worker import Worker
from step3_hetero.transport.base import CorruptFrame

DAMAGED = CorruptFrame("does not match its checksum")


class Front:
    """A link whose messages, or damages, the test gives."""

    name = FRONT

    def __init__(self, *came):
        self.came = list(came)
        self.posted = []

    def receive(self, deadline_s):
        one = self.came.pop(0)
        if isinstance(one, Exception):
            raise one
        return one

    def post(self, kind, seq=0, said=None, arrays=None):
        self.posted.append((kind, said))


class Heard:
    """A program that notes what it is told to forget."""

    def __init__(self):
        self.keys = []

    def forget_image(self, key):
        self.keys.append(key)


def forget(number, key=None):
    return Message(Kind.FORGET, number, 0, {"key": number if key is None else key}, {})


def read_all(*came):
    front, program = Front(*came), Heard()
    driver = Driver(program, [], {"embed": "a"}, {}, Wire(), Wire())
    while front.came:
        assert driver._from_front(front)
    return program.keys, front.posted


def test_what_comes_behind_a_damaged_frame_waits_for_it():
    keys, posted = read_all(forget(1), DAMAGED, forget(3), forget(2), forget(3), forget(4))
    assert keys == [1, 2, 3, 4]
    assert posted == [(Kind.AGAIN, {"heard": 1})]


def test_a_damaged_sign_of_life_has_nothing_done_twice():
    keys, _ = read_all(forget(1), DAMAGED, forget(2), forget(2), forget(3), forget(3))
    assert keys == [1, 2, 3]


def test_signs_of_life_have_no_number_and_numbers_begin_again():
    beat = Message(Kind.BEAT, 0, 0, {}, {})
    front, program = Front(beat, forget(MOST_EPOCH), beat, forget(1), forget(3)), Heard()
    driver = Driver(program, [], {"embed": "a"}, {}, Wire(), Wire())
    driver._heard = MOST_EPOCH - 1
    while front.came:
        assert driver._from_front(front)
    assert program.keys == [MOST_EPOCH, 1]


def test_the_wish_to_stop_is_heard_whatever_was_damaged_before():
    front = Front(DAMAGED, Message(Kind.STOP, 9, 0, {}, {}))
    driver = Driver(Heard(), [], {"embed": "a"}, {}, Wire(), Wire())
    assert driver._from_front(front)
    assert not driver._from_front(front)


def test_a_worker_outlives_a_damaged_frame_of_the_front():
    worker = Worker({}, Wire(), Wire(), 8)
    assert worker._from_front(Front(DAMAGED))


@pytest.mark.parametrize("which", [(1,), (2,), (3, 7, 11)], ids=str)
def test_tokens_are_those_of_an_undisturbed_run_and_no_role_begins_anew(
    write_config, monkeypatch, which
):
    pytest.importorskip("torch")
    launched, seen, receive = [], [], Link.receive

    def in_threads(resolved, *_):
        def serve(member, tell, drain):
            launched.append(member.name)
            local.serve_role(resolved.config, member.role, member.number, "", tell, drain)

        return Threads(serve)

    def received(self, deadline_s):
        message = receive(self, deadline_s)
        served = self.name == FRONT and message.kind not in (Kind.LOAD, Kind.STOP)
        if served and message.epoch > max(seen, default=0):
            seen.append(message.epoch)
            if message.epoch in which:
                raise DAMAGED
        return message

    monkeypatch.setattr(local, "_own_launcher", in_threads)
    config = write_config(transport__kind="tcp", runtime__microbatches=2)
    ids = np.random.default_rng(3).integers(7, 64, 200).tolist()

    def answers():
        with load(config) as engine:
            params = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=1)
            got = [engine.generate(ids, params) for _ in range(2)]  # the second copies a block
        return [(c.token_ids, [p.chosen for p in c.logprobs]) for c in got]

    want = answers()
    launched.clear()
    monkeypatch.setattr(Link, "receive", received)
    assert answers() == want
    assert max(seen) > max(which)
    assert sorted(launched) == ["a:0", "f:0"]
