"""Large arrays between a device and a wire: each piece goes on while the next one is copied.

No clock decides: an event of a copy ends when the piece before it has got further, or never.
"""

import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest
from crc32c import crc32c
from emulate.cards import card

from step3_hetero.afd import leaving
from step3_hetero.afd.driver import Driver
from step3_hetero.afd.landing import Landing
from step3_hetero.afd.leaving import PIECE_BYTES, Leaving
from step3_hetero.afd.link import Link
from step3_hetero.afd.messages import Kind
from step3_hetero.afd.parcel import parcel
from step3_hetero.afd.wire import Wire
from step3_hetero.backend import Event
from step3_hetero.emulate.device import EmulatedDevice
from step3_hetero.errors import RoleLost, TransportTimeout
from step3_hetero.registry import get_backend
from step3_hetero.specs import TensorSpec
from step3_hetero.transport.base import CopyFailed, CorruptFrame, Frame, FrameLimits
from step3_hetero.transport.framing import SUM, header_of, packed
from step3_hetero.transport.registry import get_transport

LIMITS = FrameLimits(1 << 16, 1 << 24, 8)
ROWS, HIDDEN, PIECES = 130, 7168, 8
"""Of float32: seven whole pieces and the last, smaller one."""

SPECS = {
    "ids": TensorSpec("ids", ("tokens",), "int32"),
    "u": TensorSpec("u", ("tokens", "hidden"), "float32"),
}
GIVE_UP_S = 20.0
NIXL = pytest.param(
    "nixl",
    marks=pytest.mark.skipif(find_spec("nixl") is None, reason="nixl is missing: make test-nixl"),
)


def arrays():
    u = np.random.default_rng(0).standard_normal((ROWS, HIDDEN), np.float32)
    assert -(-u.nbytes // PIECE_BYTES) == PIECES
    return {"ids": np.arange(ROWS, dtype=np.int32), "u": u}


class Gate(Event):
    """A copy that is made once ``allowed`` says so."""

    def __init__(self, allowed, copy):
        self.allowed, self.copy, self.done = allowed, copy, False

    def wait(self, deadline_s=None):
        if self.done:
            return
        if not self.allowed():
            raise TransportTimeout("the copy did not end")
        self.copy()
        self.done = True


class Card(EmulatedDevice):
    """Memory that the host cannot read. ``leaves(n)`` waits until copy n out may end."""

    def __init__(self, leaves=lambda n: True, backend="reference"):
        super().__init__(get_backend(backend).open(0), card("h800"))
        self.leaves = leaves
        self.out, self.inward, self.whole = 0, [], []
        self.came = threading.Condition()

    def copy_out(self, x, host):
        number, self.out = self.out, self.out + 1
        host[...] = 99  # until the event nobody may read it
        return Gate(lambda: self.leaves(number), lambda: super(Card, self).copy_out(x, host))

    def copy_in(self, host, out):
        with self.came:
            self.inward.append(host.nbytes)
            self.came.notify_all()
        held = host.copy()  # what is there now is what the copy reads
        return Gate(lambda: True, lambda: super(Card, self).copy_in(held, out))

    def from_host(self, x, dtype=None):
        self.whole.append(x.nbytes)
        return super().from_host(x, dtype)

    def has_come(self, count):
        """Wait until so many copies in have been started."""
        with self.came:
            return self.came.wait_for(lambda: len(self.inward) >= count, GIVE_UP_S)


def ends_of(kind):
    transport = get_transport(kind)
    listener = transport.listen("", LIMITS)
    ends = transport.connect(listener.address, LIMITS, 5), listener.accept(5)
    listener.close()
    return ends


@pytest.fixture
def linked():
    """Return a function: the links at both ends of a channel."""
    opened = []

    def make(kind):
        opened.extend(Link(end, "the peer") for end in ends_of(kind))
        return opened[-2:]

    yield make
    for link in opened:
        link.close()


def leave(device, named=None):
    named = named or arrays()
    return Wire().to_host(device, {n: device.from_host(x) for n, x in named.items()}, SPECS)


def test_a_piece_is_on_the_other_device_before_the_copy_of_the_next_one_ends(linked):
    here, there = linked("tcp")
    target = Card()
    there.land_on(target)
    source = Card(leaves=lambda n: target.has_come(n))
    here.post(Kind.CALL, 1, {}, leave(source))
    assert source.out == PIECES  # all have been started; none has ended
    message = there.receive(GIVE_UP_S)
    assert target.inward == [PIECE_BYTES] * (PIECES - 1) + [arrays()["u"].nbytes % PIECE_BYTES]
    found = Wire().to_device(target, message.arrays, SPECS, message.landed)
    assert target.whole == [arrays()["ids"].nbytes]
    for name, x in arrays().items():
        np.testing.assert_array_equal(target.to_host(found[name]), x)


@pytest.mark.parametrize("kind", [NIXL, "shm"])
def test_a_ring_has_a_piece_before_the_copy_of_the_next_one_ends(linked, kind):
    here, there = linked(kind)
    ring = there.channel._theirs.ring if kind == "shm" else there.channel._inbox

    def written(count):
        until = time.monotonic() + GIVE_UP_S
        while np.count_nonzero(ring) < count * PIECE_BYTES and time.monotonic() < until:
            time.sleep(0.001)
        return time.monotonic() < until

    source = Card(leaves=written)
    ones = {"u": np.full((ROWS, HIDDEN), np.nan, np.float32).view(np.uint32)}
    ones["u"][...] = 0x3F3F3F3F  # no byte of it is zero
    here.post(Kind.CALL, 1, {}, leave(source, {"u": ones["u"].view(np.float32)}))
    assert (there.receive(GIVE_UP_S).arrays["u"].view(np.uint32) == 0x3F3F3F3F).all()
    assert source.out == PIECES


@pytest.mark.parametrize("kind", ["inproc", NIXL, "shm", "tcp"])
def test_every_transport_sends_what_was_copied_and_not_what_lay_there(linked, kind):
    here, there = linked(kind)
    target = Card()
    there.land_on(target)
    sent = leave(Card())
    assert sent.is_pending
    for seq in range(3):  # again: another set, or a frame that came damaged
        here.post(Kind.CALL, seq, {}, sent)
        message = there.receive(GIVE_UP_S)
        found = Wire().to_device(target, message.arrays, SPECS, message.landed)
        for name, x in arrays().items():
            np.testing.assert_array_equal(message.arrays[name], x)
            np.testing.assert_array_equal(target.to_host(found[name]), x)
    assert not sent.is_pending
    assert len(target.inward) == (3 * PIECES if kind == "tcp" else 0)


@pytest.mark.parametrize("kind", [NIXL, "shm", "tcp"])
def test_a_copy_that_never_ends_is_told_to_who_sends_and_is_no_loss_of_the_peer(linked, kind):
    here, there = linked(kind)
    here.post(Kind.CALL, 1, {}, leave(Card(leaves=lambda n: n < 3)))
    with pytest.raises(CopyFailed, match="h800 emulated on reference:0 did not copy"):
        while True:  # the channel is closed first, the sentence told once
            try:
                here.receive(GIVE_UP_S)
            except RoleLost:
                continue
    with pytest.raises(RoleLost):
        there.receive(GIVE_UP_S)


def test_tcp_sends_nothing_behind_half_a_frame_and_shm_goes_on():
    for kind in ("tcp", "shm"):
        one, other = ends_of(kind)
        with pytest.raises(CopyFailed):
            one.send(parcel(Kind.CALL, 0, 1, {}, leave(Card(leaves=lambda n: n < 3))), 5)
        if kind == "tcp":
            with pytest.raises(RoleLost):
                one.send(Frame(1, 0, 2), 5)
        else:
            for seq in range(9):  # the room of the first is not lost
                one.send(Frame(1, 0, seq, b"", [bytes(LIMITS.part_bytes)]), 5)
                assert other.receive(5).seq == seq
        one.close()
        other.close()


def test_a_damaged_frame_lands_nowhere_and_the_next_one_does():
    one, other = ends_of("tcp")
    target = Card()
    other.landing = landing = Landing(target, (Kind.CALL,))
    whole = parcel(Kind.CALL, 0, 1, {}, arrays())
    payload = bytes(whole.head) + b"".join(whole.parts)
    damaged = packed(header_of(whole, LIMITS)) + payload + SUM.pack(crc32c(payload) ^ 1)
    sender = threading.Thread(target=one._stream.sock.sendall, args=(damaged,))
    sender.start()
    with pytest.raises(CorruptFrame):
        other.receive(GIVE_UP_S)
    sender.join()
    assert len(target.inward) == PIECES
    sender = threading.Thread(target=one.send, args=(whole, GIVE_UP_S))
    sender.start()
    got = other.receive(GIVE_UP_S)
    sender.join()
    (landed,) = landing.taken({"u": np.frombuffer(got.parts[1], np.float32)}).values()
    np.testing.assert_array_equal(target.to_host(landed.there()), arrays()["u"])
    one.close()
    other.close()


def test_lent_memory_is_not_used_again_while_a_copy_reads_it(linked):
    here, there = linked("tcp")

    class Late(Card):
        def copy_in(self, host, out):  # reads when it is waited for, and not before
            self.inward.append(host.nbytes)
            return Gate(lambda: True, lambda: EmulatedDevice.copy_in(self, host, out))

    target = Late()
    there.land_on(target)
    here.post(Kind.CALL, 1, {}, leave(Card()))
    first = there.receive(GIVE_UP_S)
    landed = first.landed
    del first
    here.post(Kind.CALL, 2, {}, leave(Card(), {**arrays(), "u": arrays()["u"] + 1}))
    there.receive(GIVE_UP_S)
    np.testing.assert_array_equal(target.to_host(landed["u"].there()), arrays()["u"])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_where_the_host_reads_the_memory_nothing_is_cut(linked, backend, monkeypatch):
    pytest.importorskip("torch")
    device = get_backend(backend).open(0)

    def refused(*_):
        raise AssertionError("staged")

    for name in ("copy_out", "copy_in", "host_buffer"):
        monkeypatch.setattr(type(device), name, refused)
    _, there = linked("tcp")
    there.land_on(device)
    u = device.from_host(arrays()["u"])
    sent = Wire().to_host(device, {"u": u}, SPECS)
    assert not sent.is_pending
    assert parcel(Kind.CALL, 0, 0, {}, sent).ready is None
    assert there.channel.landing is None


def test_other_kinds_of_messages_do_not_land(linked):
    here, there = linked("tcp")
    target = Card()
    there.land_on(target)
    here.post(Kind.ECHO, 1, {}, arrays())
    assert there.receive(GIVE_UP_S).landed == {}
    assert target.inward == []


def test_an_array_put_in_the_place_of_one_that_landed_is_the_one_that_counts():
    device = Card()
    landing = Landing(device, (Kind.CALL,))
    u = arrays()["u"]
    landing.begin(parcel(Kind.CALL, 0, 1, {}, {"u": u}))
    landing.came(u.nbytes)
    landed = landing.taken({"u": u})
    found = Wire().to_device(device, {"u": u + 1}, SPECS, landed)
    np.testing.assert_array_equal(device.to_host(found["u"]), u + 1)


def test_a_driver_lets_no_stage_write_over_what_is_still_being_copied_out():
    order = []
    sent = Leaving(Card(leaves=lambda n: order.append("copied") or True))
    sent.add("u", arrays()["u"], "float32")
    driver = Driver.__new__(Driver)
    driver._leaving = sent

    def passing():
        order.append("stage")
        return "result"
        yield

    driver._finish = lambda *_: None
    driver._advance(None, 1, passing(), None)
    assert order == ["copied"] * PIECES + ["stage"]
    assert driver._leaving is None


def test_pieces_cover_an_array_once():
    for nbytes, itemsize in ((PIECE_BYTES + 4, 4), (3 * PIECE_BYTES, 2), (5, 1)):
        cut = list(leaving.pieces(nbytes, itemsize))
        covered = np.concatenate([np.arange(nbytes // itemsize)[piece] for piece in cut])
        np.testing.assert_array_equal(covered, np.arange(nbytes // itemsize))
        assert all((p.stop - p.start) * itemsize <= PIECE_BYTES for p in cut)


@pytest.mark.parametrize("kind", ["tcp", "shm"])
def test_signs_of_life_go_on_while_kernels_come_before_the_first_piece(kind):
    begun, go = threading.Event(), threading.Event()

    class Slow(Leaving):
        is_pending = True

        def ready(self, nbytes):
            begun.set()
            if nbytes > 0 and not go.wait(GIVE_UP_S):
                raise CopyFailed("never")

    transport = get_transport(kind)
    listener, met = transport.listen("", LIMITS), []
    accepting = threading.Thread(target=lambda: met.append(listener.accept(GIVE_UP_S)))
    accepting.start()
    here = Link(transport.connect(listener.address, LIMITS, GIVE_UP_S), "f:0")
    accepting.join()
    there = Link(met[0], "a:0")
    sent = Slow(get_backend("reference").open(0))
    sent["u"] = np.ones((ROWS, HIDDEN), np.float32)
    here.post(Kind.CALL, 1, {}, sent)
    try:
        assert begun.wait(GIVE_UP_S), "the outbox does not begin"
        for _ in range(3):
            here.beat()
            assert there.receive(GIVE_UP_S).kind == Kind.BEAT
        go.set()
        assert there.receive(GIVE_UP_S).kind == Kind.CALL
    finally:
        go.set()
        here.close()
        there.close()
        listener.close()
