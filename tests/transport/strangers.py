"""What peers that keep no rules are made of: bare sockets, greetings, frames as bytes."""

import os
import socket
import struct

from crc32c import crc32c

from step3_hetero.transport.base import Frame, FrameLimits
from step3_hetero.transport.framing import FIXED, MAGIC, SUM, VERSION, header_of, packed
from step3_hetero.transport.registry import get_transport
from step3_hetero.transport.ring import Memory
from step3_hetero.transport.shm import PLACE, capacity_of
from step3_hetero.transport.sockets import HANDSHAKE_S, Patience, Stream, shake_hands
from step3_hetero.transport.tcp import split

LIMITS = FrameLimits(1 << 10, 1 << 16, 4)


def raw(name, address):
    """Return a bare socket connected to a listener of tcp or shm."""
    if name == "tcp":
        return socket.create_connection(split(address), 5)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(5)
    sock.connect("\0" + address[1:])
    return sock


def greeted(sock, key=None, limits=LIMITS):
    """Shake hands over a bare socket; return it."""
    shake_hands(Stream(sock), limits, key, Patience(HANDSHAKE_S), listens=False)
    return sock


def shm_ring(sock):
    """Play the part of a caller after the greeting on shm: hand over a ring, take the other."""
    memory, fd = Memory.made(capacity_of(LIMITS))
    socket.send_fds(sock, [b"R"], [fd])
    os.close(fd)
    _, theirs, _, _ = socket.recv_fds(sock, 1, 1)
    for one in theirs:
        os.close(one)
    return memory


def frame_bytes(parts=(b"abcd", b"")):
    """Return a good frame as tcp carries it."""
    head = packed(header_of(Frame(8, 1, 2, b"head", parts), FrameLimits(1 << 20, 1 << 20, 1 << 8)))
    payload = b"head" + b"".join(parts)
    return head + payload + SUM.pack(crc32c(payload))


def header_bytes(head, parts, version=VERSION):
    """Return a header with a good checksum that announces what it likes."""
    fixed = FIXED.pack(MAGIC, version, 8, 0, 0, head, len(parts))
    raw_header = fixed + struct.pack(f"!{len(parts)}Q", *parts)
    return raw_header + SUM.pack(crc32c(raw_header))


def bell_bytes(head=b"head", parts=(), place=0, count=0):
    """Return a frame's header as shm rings it."""
    return header_bytes(len(head), parts) + PLACE.pack(place, count) + head


def still_serves(name, listener, key=None):
    """Have a peer that keeps the rules come, and answer it."""
    friend = get_transport(name).connect(listener.address, LIMITS, 30, key)
    there = listener.accept(30)
    friend.send(Frame(1, 0, 0, b"hello", [b"x" * 100]), 5)
    assert bytes(there.receive(30).parts[0]) == b"x" * 100
    friend.close()
    there.close()
