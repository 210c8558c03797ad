"""Links: a peer that is stuck silences nobody else, and lent arrays stay what they were."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from step3_hetero.afd.link import Heart, Link
from step3_hetero.afd.messages import Kind
from step3_hetero.errors import RoleLost, TransportTimeout
from step3_hetero.transport.base import Frame, FrameLimits
from step3_hetero.transport.registry import get_transport

LIMITS = FrameLimits(1 << 16, 1 << 20, 8)


@pytest.fixture(params=["shm", "tcp"])
def pair(request):
    """Return what makes two ends of a link."""
    transport, made = get_transport(request.param), []

    def make():
        listener = transport.listen("", LIMITS)
        here = Link(transport.connect(listener.address, LIMITS, 5), "f:0")
        there = Link(listener.accept(5), "a:0")
        made.extend((here, there, listener))
        return here, there

    yield make
    for end in made:
        end.close()


def fill(link):
    """Send until the peer's buffers are full."""
    with pytest.raises(TransportTimeout):
        while True:
            link.channel.send(Frame(99, 0, 0, b"", [bytes(1000)]), 0)


def test_a_peer_that_takes_nothing_does_not_silence_the_beats_to_others(pair):
    (stuck, _unread), (well, there) = pair(), pair()
    fill(stuck)
    heart = Heart(0.4)
    heart.watch(stuck)
    heart.watch(well)
    start = time.monotonic()
    for _ in range(5):
        assert there.receive(10).kind == Kind.BEAT
    assert time.monotonic() - start < 10  # one send to who is stuck would wait for 30 s
    heart.stop()


def test_a_peer_that_was_stuck_gets_beats_again_and_whole_frames(pair):
    here, there = pair()
    fill(here)
    heart = Heart(0.2)
    heart.watch(here)
    time.sleep(0.3)
    kinds = []
    while Kind.BEAT not in kinds:
        kinds.append(there.channel.receive(10).kind)
    heart.stop()
    assert set(kinds) == {99, Kind.BEAT}


def test_a_beat_does_not_wait_for_a_frame_that_is_under_way(pair):
    here, _ = pair()
    with here._sending:
        beating = threading.Thread(target=here.beat, daemon=True)
        beating.start()
        beating.join(10)
        assert not beating.is_alive()


@pytest.mark.parametrize("kind", [Kind.CALL, Kind.RESULT])
def test_arrays_of_a_message_stay_what_they_were_when_others_come(pair, kind):
    here, there = pair()
    messages = []
    for value in range(4):
        here.send(kind, value, {}, {"u": np.full((50, 64), value, np.float32)})
        messages.append(there.receive(5))
    for value, message in enumerate(messages):
        np.testing.assert_array_equal(message.arrays["u"], np.float32(value))
        assert message.arrays["u"].flags.writeable == (kind == Kind.RESULT)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (Frame(Kind.CALL, 0, 0, b"no JSON"), "whose head does not fit it"),
        (Frame(Kind.CALL, 0, 0, b'{"said": {}, "arrays": [["u", "object", [1]]]}', [b"x" * 8]),
         "dtype 'object'"),
    ],
    ids=["head", "dtype"],
)  # fmt: skip
def test_a_peer_whose_frame_says_nothing_sensible_loses_its_link_alone(pair, frame, why):
    (here, there), (other, well) = pair(), pair()
    here.channel.send(frame, 5)
    with pytest.raises(RoleLost, match=f"a:0 is let go: .*{why}"):
        there.receive(5)
    assert there.closed
    with pytest.raises(RoleLost):
        there.receive(5)
    other.send(Kind.BEAT)
    assert well.receive(5).kind == Kind.BEAT


BIG = {"u": np.zeros(1 << 18, np.float32)}
"""The whole of what a frame may hold; a few of them fill every buffer on the way."""


def sends_until_it_fails(link):
    """Send until that cannot be done any more; return the error and the seconds."""
    start = time.monotonic()
    with pytest.raises((RoleLost, TransportTimeout)) as failed:
        while True:
            link.send(Kind.ANSWER, arrays=BIG)
    return failed.value, time.monotonic() - start


def test_who_sends_to_a_peer_without_signs_of_life_waits_for_a_deadline(pair):
    (here, _silent), (other, well) = pair(), pair()
    heart = Heart(0.4)
    heart.watch(here)
    heart.watch(other)
    _, took_s = sends_until_it_fails(here)
    assert 0.4 < took_s < 10 and here.closed
    assert well.receive(10).kind == Kind.BEAT and not other.closed
    heart.stop()


def test_who_sends_to_a_peer_that_computes_waits_for_it(pair):
    here, there = pair()
    hearts = Heart(0.4), Heart(0.4)
    hearts[0].watch(here)
    hearts[1].watch(there)
    sending = threading.Thread(target=sends_until_it_fails, args=[here], daemon=True)
    sending.start()
    sending.join(3)
    assert sending.is_alive() and not here.closed  # seven deadlines later
    assert there.receive(10).kind in (Kind.ANSWER, Kind.BEAT)
    hearts[1].stop()
    sending.join(10)
    assert not sending.is_alive() and here.closed
    hearts[0].stop()


def test_two_that_wait_for_each_other_in_sending_are_not_taken_for_silent():
    """Frames lie unread, and no sign of life gets past them: a reader may come yet."""
    listener = get_transport("tcp").listen("", LIMITS)
    here = Link(get_transport("tcp").connect(listener.address, LIMITS, 5), "f:0")
    there = Link(listener.accept(5), "a:0")
    heart = Heart(0.3)
    for one in (here, there):
        heart.watch(one)
        threading.Thread(target=sends_until_it_fails, args=[one], daemon=True).start()
    time.sleep(3)  # ten deadlines
    assert not here.closed and not there.closed
    assert here.receive(10).kind in (Kind.ANSWER, Kind.BEAT)
    heart.stop()
    for end in (here, there, listener):
        end.close()


def test_a_front_may_be_stopped_for_as_long_as_it_likes(pair, monkeypatch):
    monkeypatch.setattr("step3_hetero.afd.link.SEND_DEADLINE_S", 2.0)
    here, _stopped = pair()
    heart = Heart(0.2)
    heart.watch(here, patient=True)
    _, took_s = sends_until_it_fails(here)
    assert took_s >= 2.0
    heart.stop()


STOPPED = """
import sys, time
from step3_hetero.afd.link import Heart, Link
from step3_hetero.transport.base import FrameLimits
from step3_hetero.transport.registry import get_transport

name, address = sys.argv[1:]
limits = FrameLimits(1 << 16, 1 << 20, 8)
link = Link(get_transport(name).connect(address, limits, 5), "f:0")
heart = Heart(0.4)
heart.watch(link)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_who_sends_to_a_process_that_is_stopped_goes_on_within_a_few_deadlines(name, stopped):
    listener = get_transport(name).listen("", LIMITS)
    child = subprocess.Popen([sys.executable, "-c", STOPPED, name, listener.address])
    link, heart = Link(listener.accept(30), "a:0"), Heart(0.4)
    heart.watch(link)
    assert link.receive(10).kind == Kind.BEAT
    with stopped(child.pid):
        _, took_s = sends_until_it_fails(link)
    child.kill()
    child.wait(10)
    heart.stop()
    listener.close()
    assert took_s < 10
