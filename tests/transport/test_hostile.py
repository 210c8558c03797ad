"""What strangers may send: it costs them their connection, and nobody else anything."""

import socket
import struct

import numpy as np
import pytest

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import CorruptFrame, Frame, FrameLimits
from step3_hetero.transport.framing import FIXED, header_of, packed
from step3_hetero.transport.registry import get_transport
from step3_hetero.transport.sockets import HELLO, shake_hands
from step3_hetero.transport.tcp import is_loopback, split

LIMITS = FrameLimits(1 << 10, 1 << 16, 4)
ROUNDS = 1000


@pytest.fixture
def listener():
    listening = get_transport("tcp").listen("", LIMITS)
    yield listening
    listening.close()


def raw(listener):
    return socket.create_connection(split(listener.address), 5)


def agreed(listener):
    """Return a bare socket that has shaken hands, and the channel at its other end."""
    sock = raw(listener)
    shake_hands(sock, LIMITS, None, listens=False)
    return sock, listener.accept(5)


def frame_bytes(parts=(b"abcd", b"")):
    frame = Frame(8, 1, 2, b"head", parts)
    return packed(header_of(frame, LIMITS, summed=True)) + b"head" + b"".join(parts)


def still_serves(listener):
    friend = get_transport("tcp").connect(listener.address, LIMITS, 5)
    there = listener.accept(5)
    friend.send(Frame(1, 0, 0), 5)
    assert there.receive(5).kind == 1
    friend.close()
    there.close()


def test_a_damaged_payload_is_told_and_the_channel_goes_on(listener):
    sock, channel = agreed(listener)
    good = frame_bytes()
    sock.sendall(good[:-1] + bytes([good[-1] ^ 1]) + good)
    with pytest.raises(CorruptFrame):
        channel.receive(5)
    assert bytes(channel.receive(5).parts[0]) == b"abcd"
    sock.close()
    channel.close()


def huge(head, parts):
    fixed = FIXED.pack(b"S3HF", 1, 8, 0, 0, head, len(parts), 0)
    table = b"".join(struct.pack("!Q", n) for n in parts)
    from crc32c import crc32c

    return fixed + table + struct.pack("!I", crc32c(fixed + table))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(64),
        huge(0, [1 << 60]),
        huge(1 << 31, []),
        huge(0, [1] * 60_000),
        frame_bytes().replace(b"S3HF\x00\x01", b"S3HF\x00\x02"),
        frame_bytes()[:10] + b"\xff" + frame_bytes()[11:],
    ],
    ids=["HTTP", "large part", "large head", "many parts", "another version", "damaged header"],
)
def test_no_frame_or_one_larger_than_agreed_ends_the_connection_before_memory(listener, data):
    sock, channel = agreed(listener)
    sock.sendall(data)
    with pytest.raises(EdgeMismatch):
        channel.receive(5)
    assert len(channel._buffer) == 0
    with pytest.raises(RoleLost):
        channel.receive(5)
    sock.close()
    still_serves(listener)


def test_who_says_nothing_keeps_nobody_waiting(listener):
    silent = [raw(listener) for _ in range(8)]
    still_serves(listener)
    for sock in silent:
        sock.close()


def test_a_proof_sent_back_to_its_maker_is_none(listener):
    """Answers that do not name their side could be reflected."""
    sock = raw(listener)
    theirs = sock.recv(HELLO.size, socket.MSG_WAITALL)
    sock.sendall(theirs)
    proof = sock.recv(32, socket.MSG_WAITALL)
    sock.sendall(proof)
    assert sock.recv(1) == b""
    sock.close()
    with pytest.raises(TransportTimeout):
        listener.accept(0.1)


def test_random_and_mutated_greetings_and_frames_cost_at_most_their_connection(listener):
    rng = np.random.default_rng(0)
    good = frame_bytes()
    for number in range(ROUNDS):
        kind = number % 4
        if kind == 0:
            sock = raw(listener)
            sock.sendall(rng.bytes(int(rng.integers(0, 200))))
        else:
            sock, channel = agreed(listener)
            broken = bytearray(good if kind < 3 else rng.bytes(len(good)))
            if kind == 1:
                broken[int(rng.integers(len(broken)))] ^= 1 << int(rng.integers(8))
            elif kind == 2:
                del broken[int(rng.integers(len(broken))) :]
            sock.sendall(broken)
            sock.shutdown(socket.SHUT_WR)
            with pytest.raises((CorruptFrame, EdgeMismatch, RoleLost)):
                channel.receive(5)
            assert len(channel._buffer) <= len(good)
            channel.close()
        sock.close()
    still_serves(listener)


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


def test_a_payload_outside_the_ring_is_refused():
    from step3_hetero.transport.shm import PLACE

    transport = get_transport("shm")
    listening = transport.listen("", LIMITS)
    one = transport.connect(listening.address, LIMITS, 5)
    other = listening.accept(5)
    frame = Frame(8, 0, 0, b"head")
    bell = packed(header_of(frame, LIMITS, summed=False)) + PLACE.pack(1 << 40, 4)
    one._out.sendall(bell)
    with pytest.raises(EdgeMismatch, match="outside the ring"):
        other.receive(5)
    for end in (one, listening):
        end.close()
