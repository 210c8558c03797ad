"""Frames through shared memory on one machine: payloads in a ring, headers over a socket.

The memory has no name: each side makes its own with memfd_create and hands the descriptor over the
unix socket, so that nothing is left behind when a process is killed. It is sealed: its maker cannot
cut it short, and its reader cannot write it. A header is one message of the socket, and so the
doorbell; payloads carry no checksum, for no wire lies between two processes of one machine.
"""

from __future__ import annotations

import array
import os
import secrets
import socket
import struct
from collections import deque
from typing import ClassVar

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import (
    Capabilities,
    Channel,
    Frame,
    FrameLimits,
    Listener,
    Transport,
    refusal,
)
from step3_hetero.transport.framing import (
    ALIGNMENT,
    COPY_BYTES,
    FIXED,
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
from step3_hetero.transport.lending import Lent
from step3_hetero.transport.listening import SocketListener
from step3_hetero.transport.ring import Memory, Ring, room_in
from step3_hetero.transport.sockets import (
    HANDSHAKE_S,
    NO_SIGNAL,
    Patience,
    Stream,
    connected,
    shake_hands,
)

PLACE = struct.Struct("!QQ")
"""Where in the ring the payload begins, and the count of bytes once it is read."""

INLINE_BYTES = 8192
"""A head up to this size travels in the bell; a larger one lies in the ring before the parts."""

MOST_PARTS = 4096
"""So that a bell stays under what a unix socket takes as one message."""

PEER_CREDENTIALS = struct.Struct("iII")


class ShmChannel(Channel):
    """One connection. A received frame's parts are the ring itself, given back by a later receive
    once nobody looks at them."""

    in_pieces: ClassVar[bool] = True

    def __init__(self, stream: Stream, limits: FrameLimits, patience: Patience) -> None:
        self.peer = "a process of this machine"
        self._limits = limits
        self._stream = stream
        self._capacity = capacity_of(limits)
        self._ring = Ring(self._capacity)
        self._lent: deque[tuple[int, Lent]] = deque()
        most = FIXED.size + limits.parts * LENGTH_BYTES + SUM.size + PLACE.size + INLINE_BYTES
        self._bell = memoryview(bytearray(most + 1))  # one more shows what is too long
        self._mine, fd = Memory.made(self._capacity)
        try:
            theirs = _swapped(stream.sock, fd, patience)
        finally:
            os.close(fd)
        try:
            self._theirs = Memory.given(theirs, self._capacity)
        finally:
            os.close(theirs)

    def send(self, frame: Frame, deadline_s: float) -> None:
        """See Channel.send."""
        header = header_of(frame, self._limits)
        inline = header.head_bytes <= INLINE_BYTES
        head_room = 0 if inline else aligned(header.head_bytes)
        place, size = 0, head_room + header.room_bytes()
        if size:
            place = self._reserved(size, deadline_s)
            room = self._mine.ring[place : place + size].data
            if len(room) < size:
                raise RoleLost("the channel is closed")
            targets = header.parts_in(room[head_room:])
            if not inline:
                room[: header.head_bytes] = memoryview(frame.head).cast("B")
            for _ in filled(targets, frame, COPY_BYTES if frame.ready else self._capacity):
                pass
        bell = [memoryview(packed(header) + PLACE.pack(place, self._ring.written))]
        if inline:
            bell.append(memoryview(frame.head).cast("B"))
        self._stream.write(bell, deadline_s)

    def receive(self, deadline_s: float) -> Frame:
        """See Channel.receive."""
        while self._lent and self._lent[0][1].is_returned():
            self._mine.count = self._lent.popleft()[0]
        count = self._stream.read(self._bell, deadline_s)
        if not count:
            raise RoleLost("the peer closed the connection")
        try:
            return self._rung(self._bell[:count])
        except EdgeMismatch:
            self.close()
            raise

    def fileno(self) -> int:
        """See Channel.fileno."""
        return self._stream.fileno()

    def close(self) -> None:
        """See Channel.close."""
        self._stream.close()
        self._mine.close()
        self._theirs.close()

    def _rung(self, bell: memoryview) -> Frame:
        """Return the frame that a bell describes."""
        header, place, count, head = self._read_bell(bell)
        inline = header.head_bytes <= INLINE_BYTES
        head_room = 0 if inline else aligned(header.head_bytes)
        size = head_room + header.room_bytes()
        if place + size > self._capacity or place % ALIGNMENT:
            raise EdgeMismatch(
                f"a payload of {size:,} bytes at {place:,} lies outside the ring of "
                f"{self._capacity:,}"
            )
        room = self._theirs.ring[place : place + size]
        if len(room) < size:
            raise RoleLost("the channel is closed")
        whole = bytes(head) if inline else room[: header.head_bytes].tobytes()
        lent = Lent(room[head_room:], header.parts_in)
        self._lent.append((count, lent))
        return header.frame(whole, lent.parts)

    def _read_bell(self, bell: memoryview) -> tuple[Header, int, int, memoryview]:
        """Return header, place, count and head of a bell.

        Raises:
            EdgeMismatch: it is none.
        """
        if len(bell) < FIXED.size:
            raise EdgeMismatch(f"a bell of {len(bell)} bytes is no frame")
        table = FIXED.size + rest_bytes(bell[: FIXED.size], self._limits)
        end = table + PLACE.size
        if len(bell) < end:
            raise EdgeMismatch(f"a bell of {len(bell)} bytes, {end} announced")
        header = unpacked(bell[: FIXED.size], bell[FIXED.size : table], self._limits)
        wanted = end + (header.head_bytes if header.head_bytes <= INLINE_BYTES else 0)
        if len(bell) != wanted:
            raise EdgeMismatch(f"a bell of {len(bell)} bytes, {wanted} announced")
        place, count = PLACE.unpack(bell[table:end])
        return header, place, count, bell[end:]

    def _reserved(self, size: int, deadline_s: float) -> int:
        try:
            return room_in(self._ring, size, lambda: self._theirs.count, self._stream, deadline_s)
        except EdgeMismatch:
            self.close()
            raise


class ShmTransport(Transport):
    """Addresses are names of abstract unix sockets (``@name``): they leave no file behind."""

    name: ClassVar[str] = "shm"
    capabilities: ClassVar[Capabilities] = Capabilities(False, 1, True)

    def why_no_address(self, address: str) -> str | None:
        """See Transport.why_no_address."""
        return refusal(_abstract, address)

    def listen(self, address: str, limits: FrameLimits, key: bytes | None = None) -> Listener:
        """See Transport.listen. Only processes of the same user are let in."""
        address = address or f"@step3-hetero-{secrets.token_hex(8)}"
        _check_parts(limits)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.bind(_abstract(address))
            sock.listen()
        except OSError as cause:
            sock.close()
            raise ConfigError(f"cannot listen at {address!r}: {cause.strerror}") from cause
        return SocketListener(sock, address, lambda s: _met(s, limits, key, listens=True))

    def connect(
        self, address: str, limits: FrameLimits, deadline_s: float, key: bytes | None = None
    ) -> Channel:
        """See Transport.connect."""
        _check_parts(limits)

        def connect(left: float) -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(left)
            try:
                sock.connect(_abstract(address))
            except OSError:
                sock.close()
                raise
            return sock

        return _met(connected(connect, address, deadline_s), limits, key, listens=False)


def _met(
    sock: socket.socket, limits: FrameLimits, key: bytes | None, *, listens: bool
) -> ShmChannel:
    """Make a channel of a connected socket, or close it."""
    stream, patience = Stream(sock), Patience(HANDSHAKE_S)
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        if (user := PEER_CREDENTIALS.unpack(raw)[1]) != os.getuid():
            raise EdgeMismatch(
                f"a process of user {user}, not of {os.getuid()}, is at the other end"
            )
        shake_hands(stream, limits, key, patience, listens=listens)
        return ShmChannel(stream, limits, patience)
    except BaseException:
        stream.close()
        raise


def _check_parts(limits: FrameLimits) -> None:
    if limits.parts > MOST_PARTS:
        raise ConfigError(f"frames in {limits.parts:,} parts refused; shm takes {MOST_PARTS:,}")


def _abstract(address: str) -> str:
    name = address.removeprefix("shm://")
    if not name.startswith("@") or not 1 < len(name) < 100:
        raise ConfigError(f"address {address!r} refused; expected @name, as @step3-hetero-f0")
    return "\0" + name[1:]


def capacity_of(limits: FrameLimits) -> int:
    """Return the bytes of a ring: three frames of the largest kind.

    A frame stays lent until the next one is received, so that there has to be room for that one,
    in one piece, wherever the first lies: beside it in the middle, on either side.
    """
    parts = limits.part_bytes + ALIGNMENT * limits.parts
    return 3 * (aligned(limits.head_bytes) + aligned(parts) + ALIGNMENT)


def _swapped(sock: socket.socket, fd: int, patience: Patience) -> int:
    """Hand a descriptor to the peer and return the one it gives.

    Raises:
        EdgeMismatch: it gives none.
        RoleLost, TransportTimeout: it is gone, or too slow.
    """
    space = socket.CMSG_LEN(array.array("i").itemsize)  # one descriptor: the kernel closes more
    sock.settimeout(max(1e-3, patience.left_s()))
    try:
        socket.send_fds(sock, [b"R"], [fd], NO_SIGNAL)
        said, extra, _, _ = sock.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as cause:
        raise TransportTimeout(f"the peer gave no ring: {cause}") from None
    except OSError as cause:
        raise RoleLost(f"the peer left before it gave a ring: {cause}") from None
    finally:
        sock.settimeout(None)
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return int(array.array("i", data[:4])[0])
    if not said:
        raise RoleLost("the peer left before it gave a ring")
    raise EdgeMismatch(f"the peer gave no ring, but {said!r}")
