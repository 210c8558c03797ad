"""An emulated link between processes: late, narrow, whole, in order, and ended like any other."""

import select
import threading
import time

import pytest

from step3_hetero.afd.emulated import SEND_S, EmulatedChannel, over
from step3_hetero.emulate.delay import MOST_WAITING
from step3_hetero.emulate.link import Link
from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import CorruptFrame, Frame, FrameLimits
from step3_hetero.transport.registry import get_transport

LIMITS = FrameLimits(1 << 16, 1 << 24, 8)


@pytest.fixture(params=["inproc", "shm", "tcp"])
def ends_over(request):
    """Return a function: two connected channels, the first over an emulated link."""
    transport = get_transport(request.param)
    listener = transport.listen("", LIMITS)
    opened = [listener]

    def make(link):
        one = EmulatedChannel(transport.connect(listener.address, LIMITS, 10), link)
        other = listener.accept(10)
        opened.extend([one, other])
        return one, other

    yield make
    for end in opened:
        end.close()


def frame(seq, nbytes=1000):
    return Frame(3, 4, seq, b"head", [bytes([seq % 256]) * nbytes, b"x"])


def content(frame):
    return (frame.kind, frame.epoch, frame.seq, bytes(frame.head), [bytes(p) for p in frame.parts])


def test_frames_arrive_whole_once_and_in_order_both_ways(ends_over):
    one, other = ends_over(Link(0.01, 1e9))
    frames = [frame(seq, seq * 5000) for seq in range(MOST_WAITING * 2)]
    sender = threading.Thread(target=lambda: [one.send(f, 10) for f in frames])
    sender.start()
    assert [content(other.receive(10)) for _ in frames] == [content(f) for f in frames]
    sender.join()
    sender = threading.Thread(target=lambda: [other.send(f, 10) for f in frames])
    sender.start()
    assert [content(one.receive(10)) for _ in frames] == [content(f) for f in frames]
    sender.join()
    for end in (one, other):
        with pytest.raises(TransportTimeout):
            end.receive(0.05)


def test_buffers_may_be_used_again_after_send(ends_over):
    one, other = ends_over(Link(0.2))
    buffer = bytearray(b"before")
    one.send(Frame(1, 0, 0, b"", [memoryview(buffer)]), 5)
    buffer[:] = b"after!"
    assert bytes(other.receive(10).parts[0]) == b"before"


def test_each_way_takes_its_latency_and_sending_takes_none(ends_over):
    one, other = ends_over(Link(0.5))
    start = time.monotonic()
    for seq in range(10):
        one.send(frame(seq), 5)
    assert time.monotonic() - start < 2.5  # ten latencies are 5 s
    other.receive(10)
    assert time.monotonic() - start >= 0.5
    for _ in range(9):
        other.receive(10)
    assert time.monotonic() - start < 4  # they lie side by side
    start = time.monotonic()
    other.send(frame(3), 5)
    one.receive(10)
    assert time.monotonic() - start >= 0.5


def test_a_narrow_link_takes_bytes_one_after_another(ends_over):
    one, other = ends_over(Link(0.0, 1e6))
    start = time.monotonic()
    for seq in range(3):
        one.send(frame(seq, 200_000), 5)
    assert [other.receive(10).seq for _ in range(3)] == [0, 1, 2]
    assert time.monotonic() - start >= 0.6


def test_the_descriptor_is_readable_once_a_frame_is_there_and_not_before(ends_over):
    one, other = ends_over(Link(1.5))
    other.send(frame(1), 5)
    assert select.select([one], [], [], 0.1)[0] == []
    assert select.select([one], [], [], 10)[0] == [one]
    assert one.receive(5).seq == 1
    assert select.select([one], [], [], 0)[0] == []


def test_a_link_that_is_full_is_told_by_the_deadline(ends_over):
    one, _ = ends_over(Link(30.0))
    with pytest.raises(TransportTimeout, match=r"took nothing for 0\.1 s"):
        for seq in range(MOST_WAITING + 1):
            one.send(frame(seq), 0.1)


def test_the_peers_end_is_seen_after_what_it_sent_and_stays(ends_over):
    one, other = ends_over(Link(0.2))
    other.send(frame(9), 5)
    other.close()
    assert one.receive(10).seq == 9
    for _ in range(2):
        with pytest.raises(RoleLost):
            one.receive(10)
        assert select.select([one], [], [], 0)[0] == [one]


def test_what_was_sent_leaves_before_the_end(ends_over):
    one, other = ends_over(Link(0.5))
    one.send(frame(1), 5)
    one.close()
    one.close()
    assert other.receive(10).seq == 1
    with pytest.raises(RoleLost):
        other.receive(10)
    with pytest.raises(RoleLost):
        one.send(frame(2), 1)
    with pytest.raises(RoleLost):
        one.receive(1)


class Broken:
    """A channel that gives what it is told to, and takes nothing."""

    peer = "nobody"

    def __init__(self, *came):
        self.came = list(came)

    def send(self, frame, deadline_s):
        raise RoleLost("nobody is gone")

    def receive(self, deadline_s):
        if not self.came:
            time.sleep(deadline_s)
            raise TransportTimeout("nothing")
        if isinstance(self.came[0], Exception):
            raise self.came.pop(0)
        return self.came.pop(0)

    def close(self):
        self.closed = True


def test_a_corrupt_frame_is_told_and_the_channel_goes_on():
    one = EmulatedChannel(Broken(CorruptFrame("flipped"), frame(1)), Link(0.01))
    with pytest.raises(CorruptFrame):
        one.receive(10)
    assert one.receive(10).seq == 1
    one.close()


def test_bytes_that_are_no_frame_end_the_channel():
    one = EmulatedChannel(Broken(EdgeMismatch("no frame"), frame(1)), Link(0.01))
    for _ in range(2):
        with pytest.raises(EdgeMismatch):
            one.receive(10)
    one.close()


def test_each_so_manyth_frame_with_tensors_arrives_damaged(capsys):
    sign_of_life = Frame(1, 0, 0, b"{}")
    came = [frame(1), sign_of_life, frame(2), sign_of_life, frame(3), frame(4), frame(5)]
    one = EmulatedChannel(Broken(*came), Link(corrupt_every=2))
    found = []
    for _ in came:
        try:
            found.append(one.receive(10).seq)
        except CorruptFrame:
            found.append("damaged")
    assert found == [1, 0, "damaged", 0, 3, "damaged", 5]
    told = capsys.readouterr().err.splitlines()
    assert told == [f"emulated link to nobody: damaged at frame {n}" for n in (2, 4)]
    one.close()


def test_a_connection_is_cut_when_so_many_frames_have_come():
    one = EmulatedChannel(Broken(frame(1), frame(2), frame(3)), Link(cut_every=2))
    assert one.receive(10).seq == 1
    for _ in range(2):
        with pytest.raises(RoleLost, match="cut at frame 2"):
            one.receive(10)
    with pytest.raises(RoleLost, match="cut at frame 2"):
        one.send(frame(4), 1)
    one.close()


def test_that_the_peer_is_gone_is_told_by_a_later_send():
    one = EmulatedChannel(Broken(), Link(0.01))
    one.send(frame(1), 5)
    with pytest.raises(RoleLost, match="nobody is gone"):
        for _ in range(1000):
            time.sleep(0.01)
            one.send(frame(2), 5)
    one.close()


def test_no_thread_is_left_behind(ends_over):
    before = threading.active_count()
    one, other = ends_over(Link(0.1))
    one.send(frame(1), 5)
    one.close()
    other.close()
    assert threading.active_count() <= before + 1  # the listener may still be greeting


def test_only_links_that_are_emulated_are_wrapped():
    plain = Broken()
    assert over({}, "f:0", plain) is plain
    assert over({"g": Link(1.0)}, "f:0", plain) is plain
    wrapped = over({"f": Link(1.0)}, "f:1", plain)
    assert isinstance(wrapped, EmulatedChannel)
    wrapped.close()


@pytest.mark.parametrize("ends_over", ["shm", "tcp"], indirect=True)
def test_close_waits_no_longer_than_frames_may_take_to_leave(ends_over):
    one, _unread = ends_over(Link(0.0))
    with pytest.raises(TransportTimeout):
        for seq in range(500):  # until the peer's buffers are full, and this side's
            one.send(frame(seq, 1 << 20), 0.5)
    start = time.monotonic()
    one.close()
    assert time.monotonic() - start < 15.0 < SEND_S / 2
