"""Frames by one-sided writes over NIXL (UCX): experimental, host memory.

Greeting, headers and heads go over a TCP connection, which is the doorbell too and tells of the
peer's end. Parts are written into the peer's ring, and the header is sent when NIXL says that they
have arrived. Whoever receives writes back how much it has read.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from contextlib import suppress
from itertools import accumulate
from typing import ClassVar

import numpy as np
from crc32c import crc32c

from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import (
    Capabilities,
    Channel,
    CopyFailed,
    CorruptFrame,
    Frame,
    FrameLimits,
    Listener,
    TlsFiles,
    Transport,
    refusal,
)
from step3_hetero.transport.framing import (
    ALIGNMENT,
    COPY_BYTES,
    LENGTH_BYTES,
    SUM,
    Header,
    aligned,
    filled,
    header_of,
    packed,
    rest_bytes,
    unpacked,
)
from step3_hetero.transport.lending import Lent, aligned_buffer
from step3_hetero.transport.nixl_agent import LOOPBACK, Agent, bindings
from step3_hetero.transport.ring import Ring, room_in
from step3_hetero.transport.sockets import Patience, Stream, is_gone, read_bytes, read_into, write
from step3_hetero.transport.tcp import STALL_S, TcpChannel, TcpTransport, is_loopback

TICKET = struct.Struct("!IQQ")
"""Bytes of NIXL's metadata behind it; where the inbox lies in its owner's memory, and its size."""

MOST_METADATA = 64 << 10
"""One UCX backend with one piece of memory takes some 500 bytes; each network card adds some."""

MEETING_S = 20.0
"""How long a peer that has proved the key may take to make its agent: half a second, if idle."""

PLACE = struct.Struct("!QQ")
"""Where in the ring the parts begin, and the count of bytes once they are read."""

CONTROL_BYTES = 4096
"""Before each ring: how much of the *other* ring its owner has read. Before the room of a frame to
send: the words that such counts are written from."""

WORDS = 16
"""Counts that may be on their way at a time."""

WRITE_BYTES = 512 << 10
"""Written at a time: the next bytes are copied and summed meanwhile."""

FIRST_POLL_S, LAST_POLL_S = 20e-6, 200e-6
"""How often a write is looked at: more and more seldom."""


class NixlChannel(TcpChannel):
    """One connection, with an agent, a ring and room for one frame to send."""

    lands: ClassVar[bool] = False

    def __init__(self, stream: Stream, limits: FrameLimits) -> None:
        super().__init__(stream, limits)
        frame = aligned(limits.part_bytes + ALIGNMENT * limits.parts)
        self._capacity = 3 * (frame + ALIGNMENT)  # as shm's: one lent, and room on either side
        self._ring = Ring(self._capacity)
        self._inbox = aligned_buffer(CONTROL_BYTES + self._capacity, CONTROL_BYTES)
        self._outbox = aligned_buffer(CONTROL_BYTES + frame, CONTROL_BYTES)
        self._inbox[:8] = 0
        self._read_of_ours = 0
        self._given: deque[tuple[int, Lent]] = deque()
        self._told: dict[int, int] = {}
        near = is_loopback(stream.sock.getsockname()[0])
        self._agent = Agent(self._inbox, self._outbox, LOOPBACK if near else None)
        try:
            self._meet(Patience(MEETING_S))
        except BaseException:
            self._agent.close()
            raise

    def send(self, frame: Frame, deadline_s: float) -> None:
        """See Channel.send."""
        header = header_of(frame, self._limits)
        if deadline_s <= 0 and not self._stream.is_writable():
            raise TransportTimeout("the peer took nothing for 0 s")
        place, total, size = 0, crc32c(frame.head), header.room_bytes()
        if size:
            place = self._reserved(size, deadline_s)
            total = self._written(header, frame, place, max(deadline_s, STALL_S), total)
        before = self._stream.sent_bytes
        said = PLACE.pack(place, self._ring.written)
        bell = [packed(header), said, frame.head, SUM.pack(crc32c(said, total))]
        try:
            flat = [memoryview(x).cast("B") for x in bell if len(x)]
            write(self._stream, flat, Patience(deadline_s, header.head_bytes))
        except TransportTimeout:
            if self._stream.sent_bytes != before:  # what would follow is no frame
                self.close()
            raise

    def receive(self, deadline_s: float) -> Frame:
        """See Channel.receive."""
        self._give_back()
        return super().receive(deadline_s)

    def close(self) -> None:
        """See Channel.close. Parts that were lent keep the ring's memory."""
        super().close()
        self._agent.close()
        self._inbox, self._outbox = self._inbox[:0].copy(), self._outbox[:0].copy()

    def _meet(self, patience: Patience) -> None:
        """Tell each other where to write.

        Raises:
            EdgeMismatch: the peer's ring is none.
            RoleLost, TransportTimeout: it is gone, or too slow.
        """
        mine = self._agent.metadata()
        ticket = TICKET.pack(len(mine), self._inbox.ctypes.data, self._inbox.nbytes)
        write(self._stream, [memoryview(ticket), memoryview(mine)], patience)
        length, address, size = TICKET.unpack(read_bytes(self._stream, TICKET.size, patience))
        if not 0 < length <= MOST_METADATA:
            raise EdgeMismatch(
                f"NIXL metadata of {length:,} bytes refused; allowed: 1 to {MOST_METADATA:,}"
            )
        own = self._inbox.nbytes
        if size != own or address + size >= 1 << 64:
            raise EdgeMismatch(
                f"the peer's ring has {size:,} bytes at {address:#x}, agreed: {own:,}"
            )
        self._agent.meet(read_bytes(self._stream, length, patience), address, size)
        write(self._stream, [memoryview(b"M")], patience)  # nobody writes to who has not met
        read_bytes(self._stream, 1, patience)

    def _reserved(self, size: int, deadline_s: float) -> int:
        try:
            return room_in(self._ring, size, self._count, self._stream, deadline_s)
        except EdgeMismatch:
            self.close()
            raise

    def _count(self) -> int:
        """Return how much the peer says it has read; words may overtake each other."""
        word = self._inbox[:8].view(np.uint64)
        if not word.size:
            raise RoleLost("the channel is closed")
        self._read_of_ours = max(self._read_of_ours, int(word[0]))
        return self._read_of_ours

    def _written(self, header: Header, frame: Frame, place: int, pause_s: float, total: int) -> int:
        """Have the parts in the peer's ring; return the checksum that goes on from ``total``."""
        room = self._outbox[CONTROL_BYTES : CONTROL_BYTES + header.room_bytes()]
        if room.nbytes < header.room_bytes():
            raise RoleLost("the channel is closed")
        patience, started, begun = Patience(pause_s, room.nbytes), list[int](), 0
        try:
            parts = header.parts_in(room.data)
            starts = [0, *accumulate(map(aligned, header.part_bytes))]
            for number, piece in filled(parts, frame, COPY_BYTES):
                total = crc32c(parts[number][piece], total)
                end = starts[number] + aligned(piece.stop)
                if end - begun >= WRITE_BYTES or end == room.nbytes or frame.ready is not None:
                    target = CONTROL_BYTES + place + begun
                    started.append(self._agent.write(CONTROL_BYTES + begun, target, end - begun))
                    begun = end
            for handle in started:
                self._await(handle, patience)
        except (TransportTimeout, CopyFailed):
            if started:  # it may come at any time, into room that is another frame's by then
                self.close()
            raise
        return total

    def _await(self, handle: int, patience: Patience) -> None:
        pause_s = FIRST_POLL_S
        while not self._agent.is_done(handle):
            if patience.left_s() <= 0:
                raise TransportTimeout("a write into the peer's memory did not arrive in time")
            if is_gone(self._stream):
                raise RoleLost("the peer closed the connection")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_POLL_S)

    def _rest(self, fixed: memoryview, begun: int, pause_s: float) -> Frame:
        """Return the frame of which ``begun`` bytes have been read."""
        most = Patience(pause_s, self._limits.parts * LENGTH_BYTES)
        read_into(self._stream, fixed[begun:], most)
        rest = read_bytes(self._stream, rest_bytes(fixed, self._limits), most)
        header = unpacked(fixed, rest, self._limits)
        patience = Patience(pause_s, header.head_bytes)
        where = read_bytes(self._stream, PLACE.size, patience)
        head = memoryview(read_bytes(self._stream, header.head_bytes, patience))
        (said,) = SUM.unpack(read_bytes(self._stream, SUM.size, patience))
        (place, count), size = PLACE.unpack(where), header.room_bytes()
        if place + size > self._capacity or place % ALIGNMENT:
            raise EdgeMismatch(
                f"parts of {size:,} bytes at {place:,} lie outside the ring of {self._capacity:,}"
            )
        lent = Lent(self._inbox[CONTROL_BYTES + place :][:size], header.parts_in)
        self._given.append((count, lent))
        total = crc32c(head)
        for part in lent.parts:
            total = crc32c(part, total)
        if crc32c(where, total) != said:
            raise CorruptFrame(f"a frame of {self.peer} does not match its checksum")
        return header.frame(head, lent.parts)

    def _give_back(self) -> None:
        """Tell the peer what nobody looks at any more. That it is gone is seen by who reads."""
        count = None
        while self._given and self._given[0][1].is_returned():
            count = self._given.popleft()[0]
        if count is None:
            return
        with suppress(RoleLost):
            for word, handle in list(self._told.items()):
                if self._agent.is_done(handle):
                    del self._told[word]
            free = next((word for word in range(WORDS) if word not in self._told), None)
            if free is not None:
                self._outbox[8 * free : 8 * free + 8].view(np.uint64)[:] = count
                self._told[free] = self._agent.write(8 * free, 0, 8)


class NixlTransport(TcpTransport):
    """Addresses are ``host:port``, of the connection that greets and rings."""

    name: ClassVar[str] = "nixl"
    capabilities: ClassVar[Capabilities] = Capabilities(True, 1, True)

    def __init__(self) -> None:
        super().__init__()

    def why_unavailable(self) -> str | None:
        """See Transport.why_unavailable."""
        return refusal(bindings)

    def secured(self, tls: TlsFiles) -> Transport:
        """Refuse: what NIXL writes is not encrypted."""
        return Transport.secured(self, tls)

    def listen(self, address: str, limits: FrameLimits, key: bytes | None = None) -> Listener:
        """See Transport.listen."""
        bindings()
        return super().listen(address, limits, key)

    def connect(
        self, address: str, limits: FrameLimits, deadline_s: float, key: bytes | None = None
    ) -> Channel:
        """See Transport.connect."""
        bindings()
        return super().connect(address, limits, deadline_s, key)

    def _channel(self, stream: Stream, limits: FrameLimits) -> Channel:
        return NixlChannel(stream, limits)
