"""The rings of shm: a peer that lies about them is let go, and none can take them away."""

import os
import socket
import time
from pathlib import Path

import pytest

from step3_hetero.errors import EdgeMismatch, RoleLost
from step3_hetero.transport.base import Frame, FrameLimits
from step3_hetero.transport.registry import get_transport
from step3_hetero.transport.ring import Memory, Ring
from step3_hetero.transport.shm import capacity_of
from transport.strangers import (
    LIMITS,
    bell_bytes,
    greeted,
    header_bytes,
    raw,
    shm_ring,
    still_serves,
)

CAPACITY = capacity_of(LIMITS)


@pytest.fixture
def listener():
    listening = get_transport("shm").listen("", LIMITS)
    yield listening
    listening.close()


@pytest.fixture
def agreed(listener):
    """Return a bare socket that has shaken hands, and the channel at its other end."""
    sock = greeted(raw("shm", listener.address))
    shm_ring(sock)
    channel = listener.accept(5)
    yield sock, channel
    sock.close()
    channel.close()


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    ("bell", "why"),
    [
        (b"x", "is no frame"),
        (b"GET / HTTP/1.1\r\n" * 4, "is no frame"),
        (bell_bytes(place=1 << 40, parts=[4]), "outside the ring"),
        (bell_bytes(place=(1 << 64) - 64, parts=[64]), "outside the ring"),
        (bell_bytes(place=capacity_of(LIMITS), parts=[1]), "outside the ring"),
        (bell_bytes(place=1, parts=[4]), "outside the ring"),
        (bell_bytes(parts=[1 << 60]), "agreed"),
        (bell_bytes(parts=[1] * 5), "agreed"),
        (bell_bytes()[:-1], "announced"),
        (bell_bytes() + b"x", "announced"),
        (header_bytes(4, []), "announced"),
        (bell_bytes() + bytes(1 << 15), "announced"),
    ],
    ids=["short", "HTTP", "far", "wraps", "behind", "crooked", "large", "many", "head cut",
         "head long", "no place", "longer than any"],
)  # fmt: skip
def test_a_bell_that_lies_ends_the_connection(listener, agreed, bell, why):
    sock, channel = agreed
    sock.send(bell)
    with pytest.raises(EdgeMismatch, match=why):
        channel.receive(5)
    with pytest.raises(RoleLost):
        channel.receive(5)
    still_serves("shm", listener)


def plain_memfd(nbytes):
    fd = os.memfd_create("bare", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    return fd


RIGHT_SIZE = 4096 + capacity_of(LIMITS)


@pytest.mark.parametrize(
    ("ring", "why"),
    [
        (lambda: plain_memfd(RIGHT_SIZE), "has seals 0x0, needed"),
        (lambda: os.open("/dev/zero", os.O_RDWR), "no memory that can be sealed"),
        (lambda: Memory.made(capacity_of(LIMITS) // 2)[1], "bytes, agreed"),
    ],
    ids=["can be cut short", "no memory", "small"],
)
def test_memory_that_its_maker_could_take_away_is_refused(ring, why):
    fd = ring()
    with pytest.raises(EdgeMismatch, match=why):
        Memory.given(fd, capacity_of(LIMITS))
    os.close(fd)


def test_a_ring_can_be_neither_cut_short_nor_written_by_who_reads_it():
    mine, fd = Memory.made(1 << 16)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 8192)
    theirs = Memory.given(fd, 1 << 16)
    os.close(fd)
    mine.ring[:3].data[:] = b"abc"
    assert bytes(theirs.ring[:3]) == b"abc"
    with pytest.raises(ValueError, match="read-only"):
        theirs.ring[0] = 1


@pytest.mark.parametrize("count", [1, 1 << 62], ids=["more than written", "far more"])
def test_a_peer_that_claims_to_have_read_what_was_not_written_is_let_go(listener, count):
    sock = greeted(raw("shm", listener.address))
    memory = shm_ring(sock)
    channel = listener.accept(5)
    memory.count = count
    with pytest.raises(EdgeMismatch, match="says it has read"):
        channel.send(Frame(1, 0, 0, b"", [b"x"]), 5)
    sock.close()
    still_serves("shm", listener)


@pytest.mark.parametrize("given", ["nothing", "no descriptor", "two rings"])
def test_a_caller_without_a_proper_ring_costs_nobody_anything(listener, given):
    before = descriptors()
    for _ in range(8):
        sock = greeted(raw("shm", listener.address))
        if given == "no descriptor":
            sock.send(b"R")
        elif given == "two rings":
            fds = [plain_memfd(RIGHT_SIZE) for _ in range(2)]
            socket.send_fds(sock, [b"R"], fds)
            for fd in fds:
                os.close(fd)
        while given != "nothing" and sock.recv(1):  # its ring comes, then the end
            pass
        sock.close()
    still_serves("shm", listener)
    until = time.monotonic() + 5
    while descriptors() > before + 4 and time.monotonic() < until:
        time.sleep(0.02)
    assert descriptors() <= before + 4  # others' threads come and go; a leak would be of eight


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0.3, 1, 1), (0.7, 0.7, 1), (1, 0.3, 1), (0.9, 1, 1)])
def test_a_ring_has_room_for_the_largest_frame_beside_any_that_is_lent(sizes):
    whole = CAPACITY // 3 // 64 * 64
    before, lent, wanted = (round(size * whole) for size in sizes)
    ring = Ring(CAPACITY)
    assert ring.reserve(before) is not None
    read = ring.written
    assert ring.reserve(lent) is not None
    ring.has_read(read)
    assert ring.reserve(wanted) is not None


def test_a_ring_gives_out_no_byte_twice_and_all_of_them_in_turn():
    ring, held = Ring(1 << 12), []
    for step in range(2000):
        size = 64 * (1 + step * 7 % 20)
        place = ring.reserve(size)
        if place is None:
            assert held, "an empty ring has room"
            ring.has_read(held.pop(0)[2])
            continue
        for start, length, _ in held:
            assert place + size <= start or start + length <= place
        assert 0 <= place <= (1 << 12) - size
        held.append((place, size, ring.written))
    assert ring.written > 20 * (1 << 12)


def closing_after(function, channel):
    """Return a function that closes the channel as another thread would, once it has its result."""

    def closes(*arguments):
        found = function(*arguments)
        channel.close()
        return found

    return closes


@pytest.fixture
def ends():
    """Return both ends of a channel, whose frames may have heads that lie in the ring."""
    wide = FrameLimits(1 << 14, 1 << 16, 4)
    listener = get_transport("shm").listen("", wide)
    here = get_transport("shm").connect(listener.address, wide, 5)
    there = listener.accept(5)
    yield here, there
    for end in (here, there, listener):
        end.close()


@pytest.mark.parametrize(
    ("head", "parts"),
    [(b"h", [b"x" * 900]), (bytes(9000), []), (bytes(9000), [b"x"])],
    ids=["part", "head in the ring", "both"],
)
def test_a_channel_closed_once_a_place_is_found_is_lost_to_who_sends(ends, head, parts):
    here, _ = ends
    here._reserved = closing_after(here._reserved, here)
    with pytest.raises(RoleLost):
        here.send(Frame(9, 0, 0, head, parts), 1)


class Closing:
    """The word that says how much was read; its channel is closed between two looks at it."""

    def __init__(self, memory):
        self.memory, self.word = memory, memory._count

    @property
    def size(self):
        self.memory._count = self.word[:0].copy()
        return self.word.size

    def __getitem__(self, place):
        return self.word[place]


def test_a_channel_closed_while_room_is_looked_for_is_lost_to_who_sends(ends):
    here, _ = ends
    here._theirs._count = Closing(here._theirs)
    here.send(Frame(9, 0, 0, b"", [b"x"]), 1)  # this one still sees what there was
    with pytest.raises(RoleLost, match="the channel is closed"):
        here.send(Frame(9, 0, 0, b"", [b"x"]), 1)


def test_a_channel_closed_once_a_bell_has_come_is_lost_to_who_receives(ends):
    here, there = ends
    here.send(Frame(9, 0, 0, b"h", [b"x" * 900]), 1)
    there._read_bell = closing_after(there._read_bell, there)
    with pytest.raises(RoleLost, match="the channel is closed"):
        there.receive(1)
