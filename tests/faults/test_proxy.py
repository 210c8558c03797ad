"""The proxy does what it says: nothing is lost unasked, and each fault is seen as itself."""

import threading
import time
from contextlib import suppress

import pytest

from faults.proxy import BACK, THERE, FaultyProxy
from step3_hetero.emulate.link import Link
from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import CorruptFrame, Frame, FrameLimits
from step3_hetero.transport.registry import get_transport

LIMITS = FrameLimits(1 << 16, 1 << 24, 8)
GONE = (RoleLost, TransportTimeout, EdgeMismatch)


@pytest.fixture
def listener():
    found = get_transport("tcp").listen("", LIMITS)
    yield found
    found.close()


@pytest.fixture
def proxy(listener):
    made = FaultyProxy(listener.address)
    yield made
    made.close()


@pytest.fixture
def join(listener, proxy):
    """Return a function that connects through the proxy and gives both ends."""
    opened = []

    def join():
        opened.extend([connect(proxy, 10), listener.accept(10)])
        return opened[-2:]

    yield join
    for end in opened:
        end.close()


def connect(proxy, deadline_s):
    return get_transport("tcp").connect(proxy.address, LIMITS, deadline_s)


def frame(seq, nbytes=100_000):
    return Frame(1, 0, seq, b"head", [bytes(nbytes)])


def test_without_a_fault_frames_pass_whole_in_order_and_are_counted(join, proxy):
    one, other = join()
    for seq in range(20):
        one.send(frame(seq, 1000 * seq), 10)
    assert [(f.seq, len(f.parts[0])) for f in (other.receive(10) for _ in range(20))] == [
        (seq, 1000 * seq) for seq in range(20)
    ]
    other.send(frame(7), 10)
    assert one.receive(10).seq == 7
    assert (proxy.frames[THERE], proxy.connections, proxy.flipped) == (20, 1, 0)
    assert proxy.nbytes[THERE] > 190_000 and proxy.nbytes[BACK] > 100_000


@pytest.mark.parametrize("direction", [THERE, BACK])
def test_a_flipped_byte_is_caught_by_the_checksum_and_only_that_frame_is_lost(
    join, proxy, direction
):
    ends = join()
    sender, receiver = ends if direction == THERE else ends[::-1]
    proxy.corrupt_next(direction, least_bytes=1000)
    sender.send(frame(1, 10), 10)
    sender.send(frame(2), 10)
    sender.send(frame(3), 10)
    assert receiver.receive(10).seq == 1
    with pytest.raises(CorruptFrame):
        receiver.receive(10)
    assert receiver.receive(10).seq == 3
    assert proxy.flipped == 1


def test_a_cut_link_is_seen_by_both_ends_and_carries_again_once_healed(join, proxy):
    one, other = join()
    proxy.cut()
    for end in (one, other):
        with pytest.raises(RoleLost):
            end.receive(10)
    with pytest.raises(GONE):
        connect(proxy, 0.3)
    assert proxy.refused >= 1
    proxy.heal()
    one, other = join()
    one.send(frame(5), 10)
    assert other.receive(10).seq == 5


def test_a_stalled_link_carries_nothing_and_loses_nothing(join, proxy):
    one, other = join()
    proxy.stall(1.0)
    start = time.monotonic()
    one.send(frame(1), 10)
    with pytest.raises(TransportTimeout):
        other.receive(0.3)
    assert other.receive(20).seq == 1
    assert time.monotonic() - start >= 1.0


def test_a_slow_link_takes_its_latency_and_its_bytes(join, proxy):
    one, other = join()
    proxy.slow(Link(0.2, 1e6))
    start = time.monotonic()
    one.send(frame(1, 300_000), 10)
    one.send(frame(2, 300_000), 10)
    assert [other.receive(20).seq for _ in range(2)] == [1, 2]
    assert time.monotonic() - start >= 0.8  # 600 kB at 1 MB/s, and 0.2 s
    proxy.slow(Link())
    other.send(frame(3), 10)
    assert one.receive(10).seq == 3


def test_an_order_is_obeyed_once_in_the_midst_of_the_frame_by_which_it_is_due(join, proxy):
    one, other = join()
    proxy.when(150_000, proxy.cut)
    one.send(frame(1), 10)
    assert other.receive(10).seq == 1
    with suppress(*GONE):
        one.send(frame(2), 10)
    with pytest.raises(RoleLost):
        other.receive(10)
    proxy.heal()
    one, other = join()
    one.send(frame(3), 10)
    one.send(frame(4), 10)
    assert [other.receive(10).seq for _ in range(2)] == [3, 4]


def test_spared_connections_live_through_everything(listener):
    proxy = FaultyProxy(listener.address, spared=1)
    front, role = connect(proxy, 10), listener.accept(10)
    caller, called = connect(proxy, 10), listener.accept(10)
    proxy.cut()
    proxy.corrupt_next()
    proxy.stall(60)
    with pytest.raises(RoleLost):
        called.receive(10)
    front.send(frame(1), 10)
    assert role.receive(10).seq == 1
    proxy.close()
    with pytest.raises(RoleLost):
        role.receive(10)
    for end in (front, role, caller, called):
        end.close()


def test_no_thread_is_left_behind(listener):
    before = threading.active_count()
    proxy = FaultyProxy(listener.address)
    ends = [connect(proxy, 10), listener.accept(10)]
    proxy.close()
    for end in ends:
        end.close()
    until = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() <= before
