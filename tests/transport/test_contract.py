"""What every transport keeps: frames whole, once, in order; deadlines; the end seen at once."""

import multiprocessing
import os
import select
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import Frame, FrameLimits
from step3_hetero.transport.registry import get_transport, transport_names

LIMITS = FrameLimits(1 << 16, 1 << 24, 8)
NAMES = ("inproc", "nixl", "shm", "tcp")
APART = ("nixl", "shm", "tcp")


@pytest.fixture(params=NAMES)
def name(request):
    if request.param == "nixl" and find_spec("nixl") is None:
        pytest.skip("the package nixl is not installed: make test-nixl")
    return request.param


@pytest.fixture
def ends(name):
    """Return two connected channels."""
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    one = transport.connect(listener.address, LIMITS, 5)
    other = listener.accept(5)
    yield one, other
    for end in (one, other, listener):
        end.close()


def content(frame):
    return (frame.kind, frame.epoch, frame.seq, bytes(frame.head), [bytes(p) for p in frame.parts])


def test_the_four_are_registered():
    assert transport_names() == ["inproc", "nixl", "shm", "tcp"]


def test_frames_arrive_whole_once_and_in_order(ends):
    one, other = ends
    rng = np.random.default_rng(0)
    sizes = [(), (0,), (1,), (3, 0, 5), (7168 * 64, 12, 12), (1 << 22,)] * 3
    frames = [
        Frame(n, n * 2, 2**40 + n, bytes(rng.bytes(n)), [rng.bytes(size) for size in parts])
        for n, parts in enumerate(sizes)
    ]
    sender = threading.Thread(target=lambda: [one.send(f, 10) for f in frames])
    sender.start()
    got = [content(other.receive(10)) for _ in frames]
    sender.join()
    assert got == [content(f) for f in frames]
    with pytest.raises(TransportTimeout):
        other.receive(0.01)


@pytest.mark.parametrize("size", [0, 8192, 8193, LIMITS.head_bytes])
def test_a_head_of_any_size_allowed_arrives(ends, size):
    one, other = ends
    head = np.random.default_rng(size).bytes(size)
    frame = Frame(1, 2, 3, head, [b"part", b"", b"x" * 65])
    one.send(frame, 5)
    assert content(other.receive(5)) == content(frame)


def test_both_directions_at_once(ends):
    def ask(channel, seen):
        for n in range(50):
            channel.send(Frame(1, 0, n, b"x", [bytes(100_000)]), 10)
            seen.append(channel.receive(10).seq)

    seen = [], []
    threads = [threading.Thread(target=ask, args=pair) for pair in zip(ends, seen, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == (list(range(50)), list(range(50)))


def test_a_numpy_array_is_a_part_as_it_is(ends):
    one, other = ends
    x = np.arange(1000, dtype=np.float32)
    one.send(Frame(1, 0, 0, b"", [memoryview(x)]), 5)
    np.testing.assert_array_equal(np.frombuffer(other.receive(5).parts[0], np.float32), x)


@pytest.mark.parametrize("name", APART, indirect=True)
@pytest.mark.parametrize("lent", [True, False], ids=["held", "let go"])
def test_memory_under_an_array_stays_as_it_is_and_is_used_again_once_that_is_gone(ends, name, lent):
    one, other = ends
    size = LIMITS.part_bytes // 4
    one.send(Frame(1, 0, 0, b"", [bytes([7]) * size]), 5)
    array = np.frombuffer(other.receive(5).parts[0], np.uint8)
    place = array.ctypes.data
    if not lent:
        del array
    for value in range(8):
        one.send(Frame(1, 0, 1, b"", [bytes([value]) * size]), 5)
        part = other.receive(5).parts[0]
        assert bytes(part) == bytes([value]) * size
        again = np.frombuffer(part, np.uint8).ctypes.data
        if lent:
            assert again != place
            if name == "shm" and value == 2:
                break  # a ring holds no more while the first is held
        elif name == "tcp":
            assert again == place
    if lent:
        assert (array == 7).all()
        assert array.ctypes.data % 64 == 0
        del array


@pytest.mark.parametrize("name", APART, indirect=True)
def test_a_part_looked_at_after_the_next_receive_is_an_error_and_no_other_frame(ends):
    one, other = ends
    for value in (b"first", b"other"):
        one.send(Frame(1, 0, 0, b"", [value]), 5)
    part = other.receive(5).parts[0]
    assert bytes(part) == b"first"
    other.receive(5)
    with pytest.raises(ValueError, match="released"):
        bytes(part)


def test_the_descriptor_is_readable_while_something_waits(ends):
    one, other = ends
    assert select.select([other], [], [], 0)[0] == []
    one.send(Frame(1, 0, 1), 5)
    one.send(Frame(1, 0, 2), 5)
    for _ in range(2):
        assert select.select([other], [], [], 5)[0] == [other]
        other.receive(5)
    assert select.select([other], [], [], 0)[0] == []


@pytest.mark.parametrize(
    "frame",
    [
        Frame(1, 0, 0, bytes(LIMITS.head_bytes + 1)),
        Frame(1, 0, 0, b"", [bytes(LIMITS.part_bytes // 2 + 1)] * 2),
        Frame(1, 0, 0, b"", [b""] * (LIMITS.parts + 1)),
    ],
    ids=["head", "bytes", "parts"],
)
def test_a_frame_larger_than_agreed_is_refused_by_its_sender(ends, frame):
    one, other = ends
    with pytest.raises(EdgeMismatch, match="refused; agreed"):
        one.send(frame, 5)
    one.send(Frame(1, 0, 7), 5)
    assert other.receive(5).seq == 7


def test_the_end_is_seen_at_once_and_after_what_was_sent(ends):
    one, other = ends
    one.send(Frame(1, 0, 9), 5)
    one.close()
    one.close()
    assert other.receive(5).seq == 9
    start = time.monotonic()
    with pytest.raises(RoleLost):
        other.receive(30)
    assert time.monotonic() - start < 5
    with pytest.raises(RoleLost):
        for _ in range(10_000):
            other.send(Frame(1, 0, 0, b"", [bytes(1 << 20)]), 5)


def test_a_peer_that_reads_nothing_is_noticed(name):
    if name == "inproc":
        pytest.skip("its queue has no end")
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    one = transport.connect(listener.address, LIMITS, 5)
    other = listener.accept(5)
    with pytest.raises(TransportTimeout, match=r"nothing for 0\.2 s"):
        for _ in range(1000):
            one.send(Frame(1, 0, 0, b"", [bytes(1 << 22)]), 0.2)
    for end in (one, other, listener):
        end.close()


def test_nobody_there_is_a_timeout(name):
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    with pytest.raises(TransportTimeout, match="nobody came"):
        listener.accept(0.05)
    address = listener.address
    listener.close()
    listener.close()
    with pytest.raises(TransportTimeout, match="nobody listens"):
        transport.connect(address, LIMITS, 0.2)


def test_who_is_not_accepted_yet_is_told_when_the_listener_ends(name):
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    caller = transport.connect(listener.address, LIMITS, 5)
    assert select.select([listener], [], [], 10)[0] == [listener]
    listener.close()
    with pytest.raises(RoleLost):
        caller.receive(10)
    caller.close()


def test_a_caller_that_found_a_listener_of_this_process_as_it_ended_finds_nobody(monkeypatch):
    transport = get_transport("inproc")
    listener = transport.listen("", LIMITS)
    come = listener.come

    def late(channel):
        listener.close()
        come(channel)

    monkeypatch.setattr(listener, "come", late)
    with pytest.raises(TransportTimeout, match="nobody listens"):
        transport.connect(listener.address, LIMITS, 5)


def test_an_address_is_taken_once(name):
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    with pytest.raises(ConfigError, match="cannot listen at"):
        transport.listen(listener.address, LIMITS)
    listener.close()


@pytest.mark.parametrize(
    ("theirs", "key", "said"),
    [
        (FrameLimits(1 << 16, 1 << 23, 8), b"k", "allows frames of"),
        (LIMITS, b"other", "the key"),
        (LIMITS, None, "the key"),
    ],
)
def test_other_limits_and_other_keys_are_refused_and_cost_nobody_else(name, theirs, key, said):
    transport = get_transport(name)
    listener = transport.listen("", LIMITS, b"k")
    with pytest.raises(EdgeMismatch, match=said):
        transport.connect(listener.address, theirs, 5, key)
    friend = transport.connect(listener.address, LIMITS, 5, b"k")
    there = listener.accept(5)
    friend.send(Frame(3, 0, 0), 5)
    assert there.receive(5).kind == 3
    for end in (friend, there, listener):
        end.close()


def echo(name, address, _ready):
    channel = get_transport(name).connect(address, LIMITS, 20)
    while True:
        frame = channel.receive(60)
        channel.send(Frame(frame.kind, frame.epoch, frame.seq, frame.head, frame.parts), 20)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def shared_memory():
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.parametrize("name", APART, indirect=True)
def test_a_killed_process_is_lost_at_once_and_leaves_nothing(name):
    before, names = descriptors(), shared_memory()
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=echo, args=(name, listener.address, None))
    process.start()
    channel = listener.accept(60)
    channel.send(Frame(5, 0, 1, b"head", [b"a" * 900_000, b"b" * 10]), 10)
    back = channel.receive(30)
    assert (back.kind, bytes(back.head), bytes(back.parts[0])) == (5, b"head", b"a" * 900_000)
    del back
    os.kill(process.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RoleLost):
        channel.receive(30)
    assert time.monotonic() - start < 5
    process.join()
    process.close()
    channel.close()
    listener.close()
    deadline = time.monotonic() + 20  # other tests' memory comes and goes, in their own processes
    while (descriptors() > before + 1 or shared_memory() - names) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert descriptors() <= before + 1  # the resource tracker of multiprocessing
    assert shared_memory() <= names
