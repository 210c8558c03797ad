"""Frames over NIXL: refused without its package; with it, peers that keep no rules."""

import os
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport import nixl
from step3_hetero.transport.base import CopyFailed, CorruptFrame, Frame, TlsFiles
from step3_hetero.transport.framing import SUM, aligned, header_of, packed
from step3_hetero.transport.nixl import CONTROL_BYTES, MOST_METADATA, PLACE, TICKET
from step3_hetero.transport.nixl_agent import Agent
from step3_hetero.transport.registry import get_transport
from transport.strangers import LIMITS, greeted, raw, still_serves

needs_nixl = pytest.mark.skipif(
    find_spec("nixl") is None, reason="the package nixl is not installed: make test-nixl"
)


@pytest.fixture
def listener():
    listening = get_transport("nixl").listen("", LIMITS)
    yield listening
    listening.close()


@pytest.fixture
def ends(listener):
    one = get_transport("nixl").connect(listener.address, LIMITS, 10)
    other = listener.accept(10)
    yield one, other
    for end in (one, other):
        end.close()


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    for start in (
        lambda: get_transport("nixl").listen("", LIMITS),
        lambda: get_transport("nixl").connect("127.0.0.1:9", LIMITS, 1),
    ):
        with pytest.raises(ConfigError, match=r"needs the package nixl .*step3-hetero\[nixl\]"):
            start()


def test_tls_is_refused_for_what_is_written_is_not_encrypted(tmp_path):
    with pytest.raises(ConfigError, match="transport 'nixl' has no TLS"):
        get_transport("nixl").secured(TlsFiles(tmp_path / "c", tmp_path / "k"))


def refused(listener, said):
    """Have a greeted stranger say so much; wait until it is let go."""
    sock = greeted(raw("tcp", listener.address))
    sock.sendall(said)
    sock.settimeout(8)
    while sock.recv(4096):  # the ticket of the other side, and then the end
        pass
    sock.close()


@pytest.fixture
def agent():
    """Return a stranger's agent, which stays while it is met."""
    if find_spec("nixl") is None:
        pytest.skip("the package nixl is not installed: make test-nixl")
    mine = Agent(np.zeros(4096, np.uint8), np.zeros(4096, np.uint8), "lo")
    yield mine
    mine.close()


def lied(agent, size, address=1 << 32):
    """Return good metadata of a small inbox, under a ticket that lies about it."""
    metadata = agent.metadata()
    return TICKET.pack(len(metadata), address, size) + metadata + b"M"


@needs_nixl
@pytest.mark.parametrize(
    "said",
    [
        lambda _, size: TICKET.pack(0, 4096, size),
        lambda _, size: TICKET.pack(MOST_METADATA + 1, 4096, size),
        lambda _, size: TICKET.pack(300, 4096, size) + os.urandom(300),
        lambda agent, size: lied(agent, size - 64),
        lambda agent, size: lied(agent, size, (1 << 64) - 64),
    ],
    ids=["none", "too much", "no metadata", "another ring", "past 64 bits"],
)
def test_tickets_that_lie_are_refused_and_cost_nobody_else(ends, listener, agent, said):
    refused(listener, said(agent, ends[0]._inbox.nbytes))
    with pytest.raises(TransportTimeout):
        listener.accept(0.2)
    still_serves("nixl", listener)


@needs_nixl
@pytest.mark.parametrize("said", [b"", TICKET.pack(300, 4096, 8192)[:7]], ids=["nothing", "half"])
def test_strangers_that_leave_before_they_have_met_cost_nobody_else(listener, said):
    sock = greeted(raw("tcp", listener.address))
    sock.sendall(said)
    sock.close()
    still_serves("nixl", listener)


def bell(place, count, parts=(b"abcd",), wrong=0):
    """Return the bell of a frame whose parts lie in the ring already."""
    frame = Frame(8, 1, 2, b"head", parts)
    where = PLACE.pack(place, count)
    total = crc32c(where, crc32c(b"".join([frame.head, *parts])))
    return packed(header_of(frame, LIMITS)) + where + frame.head + SUM.pack(total ^ wrong)


@needs_nixl
@pytest.mark.parametrize("place", [1, 1 << 40, (1 << 64) - 64])
def test_a_place_outside_the_ring_is_refused_and_the_channel_closed(ends, place):
    one, other = ends
    one._stream.sock.sendall(bell(place, 64))
    with pytest.raises(EdgeMismatch, match="lie outside the ring"):
        other.receive(5)
    with pytest.raises(RoleLost):
        other.receive(5)


@needs_nixl
def test_a_byte_that_changed_on_its_way_is_told_and_the_channel_goes_on(ends):
    one, other = ends
    for seq in range(5):
        one.send(Frame(1, 0, seq, b"head", [b"x" * 1000, b"y" * 70]), 5)
        if seq == 2:
            place = other._inbox[CONTROL_BYTES:].tobytes().rfind(b"y" * 70)
            other._inbox[CONTROL_BYTES + place + 3] ^= 1
            with pytest.raises(CorruptFrame):
                other.receive(5)
        else:
            parts = other.receive(5).parts
            assert [bytes(p) for p in parts] == [b"x" * 1000, b"y" * 70]


@needs_nixl
def test_a_head_that_changed_is_told(ends):
    one, other = ends
    one._stream.sock.sendall(bell(0, 64, wrong=1))
    with pytest.raises(CorruptFrame):
        other.receive(5)


@needs_nixl
def test_a_count_that_was_never_written_closes_the_channel_and_an_older_one_does_not(ends):
    one, other = ends
    for seq in range(8):
        one.send(Frame(1, 0, seq, b"", [b"x" * 1000]), 5)
        other.receive(5)
    word = one._inbox[:8].view(np.uint64)
    until = time.monotonic() + 5
    while int(word[0]) < 7 * aligned(1000) and time.monotonic() < until:
        time.sleep(0.001)  # it is written, not asked for
    assert int(word[0]) == 7 * aligned(1000)
    one.send(Frame(1, 0, 8, b"", [b"x" * 1000]), 5)
    word[0] = 64
    one.send(Frame(1, 0, 9, b"", [b"x" * 1000]), 5)
    word[0] = 1 << 40
    with pytest.raises(EdgeMismatch, match="says it has read"):
        one.send(Frame(1, 0, 10, b"", [b"x" * 1000]), 5)
    with pytest.raises(RoleLost):
        one.send(Frame(1, 0, 11), 5)


@needs_nixl
def test_nothing_is_rung_before_it_is_ready_and_pieces_leave_before_the_last_one_is(ends):
    one, other = ends
    data, asked = bytearray(LIMITS.part_bytes), []

    def ready(nbytes):
        asked.append(nbytes)
        data[:nbytes] = b"z" * nbytes

    one.send(Frame(1, 0, 0, b"", [memoryview(data)], ready), 5)
    assert asked == [LIMITS.part_bytes]
    assert bytes(other.receive(5).parts[0]) == b"z" * LIMITS.part_bytes


@needs_nixl
def test_a_frame_that_never_becomes_ready_leaves_the_channel_open_if_nothing_was_written(ends):
    one, other = ends

    def ready(nbytes):
        raise CopyFailed("never")

    with pytest.raises(CopyFailed):
        one.send(Frame(1, 0, 0, b"", [b"x"], ready), 5)
    for seq in range(20):
        one.send(Frame(1, 0, seq, b"", [b"x" * LIMITS.part_bytes]), 5)
        assert other.receive(5).seq == seq


@needs_nixl
def test_a_peer_that_is_gone_is_seen_while_a_write_is_waited_for(ends, monkeypatch):
    one, other = ends
    monkeypatch.setattr(one._agent, "is_done", lambda handle: False)
    threading.Timer(0.3, other.close).start()
    start = time.monotonic()
    with pytest.raises(RoleLost):
        one.send(Frame(1, 0, 0, b"", [b"x"]), 30)
    assert time.monotonic() - start < 10


@needs_nixl
def test_a_write_that_does_not_arrive_closes_the_channel(ends, monkeypatch):
    one, _ = ends
    monkeypatch.setattr(one._agent, "is_done", lambda handle: False)
    monkeypatch.setattr(nixl, "STALL_S", 0.2)
    with pytest.raises(TransportTimeout, match="did not arrive in time"):
        one.send(Frame(1, 0, 0, b"", [b"x"]), 0.2)
    with pytest.raises(RoleLost):
        one.send(Frame(1, 0, 1), 5)


def ports():
    """Return the addresses at which this process listens, over IPv4, as hexadecimal digits."""
    links = [str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [x[1] for x in lines if x[3] == "0A" and f"socket:[{x[9]}]" in links]


@needs_nixl
def test_a_channel_on_loopback_has_ucx_listen_nowhere_else(ends, monkeypatch):
    assert len(ports()) >= 3  # the listener, and an agent at each end
    assert {port.partition(":")[0] for port in ports()} == {"0100007F"}
    assert "UCX_NET_DEVICES" not in os.environ
    monkeypatch.setenv("UCX_NET_DEVICES", "eth7")
    with pytest.raises(ConfigError, match="no memory of ours to offer"):
        Agent(np.zeros(64, np.uint8), np.zeros(64, np.uint8), "lo")


@needs_nixl
def test_two_idle_channels_take_no_processor(ends):
    before = time.process_time()
    time.sleep(2)
    assert time.process_time() - before < 0.05
