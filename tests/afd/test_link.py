"""Links: a peer that is stuck silences nobody else, and lent arrays stay what they were."""

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
