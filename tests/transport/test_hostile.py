"""What strangers may send: it costs them their connection, and nobody else anything."""

import errno
import os
import resource
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport import listening, shm, tcp
from step3_hetero.transport.base import CorruptFrame, Frame
from step3_hetero.transport.framing import VERSION
from step3_hetero.transport.registry import get_transport
from step3_hetero.transport.sockets import HELLO, HELLO_MAGIC
from step3_hetero.transport.tcp import is_loopback, split
from transport.strangers import (
    LIMITS,
    frame_bytes,
    greeted,
    header_bytes,
    raw,
    shm_ring,
    still_serves,
)

APART = ("shm", "tcp")


@pytest.fixture(params=APART)
def name(request):
    return request.param


@pytest.fixture
def listener(name):
    listening = get_transport(name).listen("", LIMITS)
    yield listening
    listening.close()


@pytest.fixture
def agreed(name, listener):
    """Return a bare socket that has shaken hands, and the channel at its other end."""
    sock = greeted(raw(name, listener.address))
    if name == "shm":
        shm_ring(sock)
    channel = listener.accept(5)
    yield sock, channel
    sock.close()
    channel.close()


only_tcp = pytest.mark.parametrize("name", ["tcp"], indirect=True)


@only_tcp
@pytest.mark.parametrize("place", [-1, -5, -12], ids=["sum", "part", "head"])
def test_a_damaged_payload_is_told_and_the_channel_goes_on(agreed, place):
    sock, channel = agreed
    good = frame_bytes()
    damaged = bytearray(good)
    damaged[place] ^= 1
    sock.sendall(damaged + good)
    with pytest.raises(CorruptFrame):
        channel.receive(5)
    assert bytes(channel.receive(5).parts[0]) == b"abcd"


@only_tcp
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(64),
        header_bytes(0, [1 << 60]),
        header_bytes(0, [1 << 63, 1 << 63]),
        header_bytes(1 << 31, []),
        header_bytes(0, [1] * 60_000),
        header_bytes(4, [4], version=VERSION + 1),
        frame_bytes()[:10] + b"\xff" + frame_bytes()[11:],
    ],
    ids=["HTTP", "large part", "sum past 64 bits", "large head", "many parts", "another version",
         "damaged header"],
)  # fmt: skip
def test_no_frame_or_one_larger_than_agreed_ends_the_connection_before_memory(
    name, listener, agreed, data
):
    sock, channel = agreed
    sock.sendall(data)
    with pytest.raises(EdgeMismatch):
        channel.receive(5)
    assert len(channel._buffer) == 0
    with pytest.raises(RoleLost):
        channel.receive(5)
    still_serves(name, listener)


def test_another_version_is_told_with_both_and_costs_nobody_else_anything(name, listener):
    sock = raw(name, listener.address)
    theirs = HELLO.unpack(sock.recv(HELLO.size, socket.MSG_WAITALL))
    sock.sendall(HELLO.pack(HELLO_MAGIC, VERSION + 1, *theirs[2:]))
    with suppress(ConnectionResetError):
        assert sock.recv(1) == b""
    sock.close()
    still_serves(name, listener)


def test_a_caller_told_of_another_version_says_both():
    here, there = socket.socketpair()
    there.sendall(HELLO.pack(HELLO_MAGIC, VERSION + 1, 1, 1, 1, bytes(32)))
    with pytest.raises(EdgeMismatch, match=f"version {VERSION + 1}, this side .* {VERSION}; inst"):
        greeted(here)
    here.close()
    there.close()


def test_a_proof_sent_back_to_its_maker_is_none(name, listener):
    """Answers that do not name their side could be reflected."""
    sock = raw(name, listener.address)
    theirs = sock.recv(HELLO.size, socket.MSG_WAITALL)
    sock.sendall(theirs)
    proof = sock.recv(32, socket.MSG_WAITALL)
    sock.sendall(proof)
    assert sock.recv(1) == b""
    sock.close()
    with pytest.raises(TransportTimeout):
        listener.accept(0.1)


def drip(sock, data, stop, pause_s=0.05):
    """Send a byte now and then until told to stop, or cut off."""
    with suppress(OSError):
        for place in range(len(data)):
            if stop.wait(pause_s):
                return
            sock.send(data[place : place + 1])


@only_tcp
def test_peers_that_greet_byte_by_byte_have_one_deadline_for_all_of_it(name, monkeypatch):
    monkeypatch.setattr(tcp, "HANDSHAKE_S", 0.6)
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    sock, stop = raw(name, listener.address), threading.Event()
    sock.recv(HELLO.size, socket.MSG_WAITALL)
    greeting = HELLO.pack(HELLO_MAGIC, VERSION, 1, 1, 1, bytes(32)) * 10  # 27 s at a byte a pause
    dripping = threading.Thread(target=drip, args=(sock, greeting, stop))
    dripping.start()
    dripping.join(15)
    cut_off = not dripping.is_alive()
    stop.set()
    dripping.join()
    sock.close()
    assert cut_off
    still_serves(name, listener)
    listener.close()


def test_more_silent_peers_than_may_wait_lock_nobody_out(name, listener, monkeypatch):
    for transport in (tcp, shm):  # it does not wait for them to time out
        monkeypatch.setattr(transport, "HANDSHAKE_S", 60.0)
    silent = [raw(name, listener.address) for _ in range(3 * listening.MOST_PENDING)]
    still_serves(name, listener)
    for sock in silent:
        sock.close()


def test_peers_that_nobody_accepts_are_kept_to_a_number(name, monkeypatch):
    monkeypatch.setattr(listening, "MOST_WAITING", 3)
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    ours = [transport.connect(listener.address, LIMITS, 5) for _ in range(3)]
    until = time.monotonic() + 10  # who connects has been greeted before it stands in the queue
    while listener._queue.qsize() < 3 and time.monotonic() < until:
        time.sleep(0.01)
    extra = None
    with suppress(EdgeMismatch, RoleLost):
        extra = transport.connect(listener.address, LIMITS, 5)
        with pytest.raises(RoleLost):
            extra.receive(5)
    taken = [listener.accept(5) for _ in ours]
    with pytest.raises(TransportTimeout):
        listener.accept(0.1)
    for end in (*ours, *taken, *filter(None, [extra]), listener):
        end.close()


def test_a_listener_outlives_the_want_of_descriptors(name, listener):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    family = socket.AF_INET if name == "tcp" else socket.AF_UNIX
    kind = socket.SOCK_STREAM if name == "tcp" else socket.SOCK_SEQPACKET
    peers, taken = [socket.socket(family, kind) for _ in range(3)], []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    try:
        with pytest.raises(OSError) as full:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        assert full.value.errno == errno.EMFILE
        for one in peers:  # the kernel keeps a descriptor for the first that comes
            one.connect(split(listener.address) if name == "tcp" else "\0" + listener.address[1:])
        time.sleep(3 * listening.PAUSE_S)  # no descriptor is left for the others
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
    for one in peers:
        one.close()
    still_serves(name, listener)


def test_a_listener_outlives_the_want_of_threads(name, listener, monkeypatch):
    start = threading.Thread.start

    def refuse(thread):
        if thread._target == listener._meet:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        sock = raw(name, listener.address)
        assert sock.recv(1) == b""
        sock.close()
        assert not listener._pending
    still_serves(name, listener)


@only_tcp
@pytest.mark.parametrize("whole", [False, True], ids=["in the header", "in the payload"])
def test_a_peer_that_dies_within_a_frame_is_lost(agreed, whole):
    sock, channel = agreed
    sock.sendall(frame_bytes()[: -6 if whole else 10])
    sock.close()
    with pytest.raises(RoleLost, match="closed the connection"):
        channel.receive(5)


@only_tcp
@pytest.mark.parametrize("drips", [False, True], ids=["silent", "a byte now and then"])
def test_a_peer_too_slow_within_a_frame_is_lost_within_a_bound(agreed, monkeypatch, drips):
    monkeypatch.setattr(tcp, "STALL_S", 0.5)
    sock, channel = agreed
    stop = threading.Event()
    data = frame_bytes([bytes(1000)]) if drips else b""
    sock.sendall(frame_bytes()[:10] if not drips else data[:60])
    thread = threading.Thread(target=drip, args=(sock, data[60:], stop))
    thread.start()
    start = time.monotonic()
    with pytest.raises(RoleLost, match="stalled within a frame"):
        channel.receive(0.1)
    took = time.monotonic() - start
    stop.set()
    thread.join()
    assert took < 10  # the rest of the frame would take 47 s
    with pytest.raises(RoleLost):
        channel.receive(0.1)


def test_a_send_that_cannot_begin_leaves_the_channel_whole(name):
    transport = get_transport(name)
    listener = transport.listen("", LIMITS)
    one = transport.connect(listener.address, LIMITS, 5)
    other = listener.accept(5)
    sent = 0
    with pytest.raises(TransportTimeout):
        while True:  # until the buffers are full of whole frames
            one.send(Frame(1, 0, sent, bytes(1000)), 0)
            sent += 1
    got = [other.receive(5).seq for _ in range(sent // 2)]
    one.send(Frame(2, 0, sent, bytes(1000)), 5)
    got += [other.receive(5).seq for _ in range(sent + 1 - len(got))]
    assert got == list(range(sent + 1))
    for end in (one, other, listener):
        end.close()


def test_closing_wakes_who_waits_and_may_be_done_twice_from_anywhere(name, listener):
    one = get_transport(name).connect(listener.address, LIMITS, 5)
    other, told = listener.accept(5), []

    def wait():
        with pytest.raises(RoleLost) as lost:
            one.receive(60)
        told.append(lost.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.05)
    closing = [threading.Thread(target=one.close) for _ in range(4)]
    for thread in closing:
        thread.start()
    for thread in (*closing, waiting):
        thread.join(20)
        assert not thread.is_alive()
    assert len(told) == 1
    with pytest.raises(RoleLost):
        one.send(Frame(1, 0, 0, b"", [b"x"]), 1)
    with pytest.raises(RoleLost):
        one.receive(1)
    other.close()


def test_an_address_that_others_reach_needs_a_key():
    with pytest.raises(ConfigError, match="can be reached from other machines: give a key"):
        get_transport("tcp").listen("0.0.0.0:0", LIMITS)
    listening = get_transport("tcp").listen("0.0.0.0:0", LIMITS, b"secret")
    listening.close()
    assert not is_loopback("example.org")


@pytest.mark.parametrize("address", ["host", ":1", "h:x", "h:70000"])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(ConfigError, match="refused; expected host:port"):
        split(address)
