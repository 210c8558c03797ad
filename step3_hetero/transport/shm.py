"""Frames through shared memory on one machine: payloads in a ring, headers over a socket.

The memory has no name: each side makes its own with memfd_create and hands the descriptor over the
unix socket, so that nothing is left behind when a process is killed. The headers ring the doorbell;
payloads carry no checksum, for no wire lies between two processes of one machine.
"""

from __future__ import annotations

import array
import mmap
import os
import secrets
import select
import socket
import struct
import time
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
)
from step3_hetero.transport.framing import (
    FIXED,
    Header,
    flat,
    header_of,
    packed,
    rest_bytes,
    unpacked,
)
from step3_hetero.transport.sockets import (
    HANDSHAKE_S,
    SocketListener,
    connected,
    read_bytes,
    wait_readable,
    write,
)

STALL_S = 10.0
"""How long a peer may pause within a header that it has begun."""

CONTROL_BYTES = 4096
"""A page before the ring: how far its reader has come, as a count of bytes."""

ALIGNMENT = 64
COUNT = struct.Struct("=Q")
PLACE = struct.Struct("!QQ")
"""Where in the ring the payload begins, and the count of bytes once it is read."""

POLL_S = 50e-6
"""How often a sender looks whether a full ring has room again."""

PEER_CREDENTIALS = struct.Struct("iII")


class Ring:
    """Memory that one side writes and the other reads. It is touched only as far as it is used:
    while everything has been read, the next payload begins at the start again."""

    def __init__(self, fd: int, capacity: int) -> None:
        self.capacity = capacity
        self.memory = mmap.mmap(fd, CONTROL_BYTES + capacity)
        self._view = memoryview(self.memory)
        self._unread: deque[tuple[int, int]] = deque()
        self._cursor = 0
        self._written = 0

    def reserve(self, nbytes: int) -> tuple[int, int] | None:
        """Return (place, count once read) for a payload, or None while there is no room."""
        (read,) = COUNT.unpack_from(self._view)
        while self._unread and self._unread[0][1] <= read:
            self._unread.popleft()
        size = max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
        place = self._gap(size)
        if place is None:
            return None
        self._written += size
        self._cursor = place + size
        self._unread.append((place, self._written))
        return place, self._written

    def _gap(self, nbytes: int) -> int | None:
        if not self._unread:
            return 0
        oldest = self._unread[0][0]
        if self._cursor > oldest:
            if self._cursor + nbytes <= self.capacity:
                return self._cursor
            return 0 if nbytes < oldest else None
        return self._cursor if self._cursor + nbytes < oldest else None

    def part(self, place: int, nbytes: int) -> memoryview:
        """Return the memory of one payload."""
        start = CONTROL_BYTES + place
        return self._view[start : start + nbytes]

    def was_read(self, count: int) -> None:
        """Tell the writer how far the reader has come."""
        COUNT.pack_into(self._view, 0, count)

    def close(self) -> None:
        """Unmap; what frames still hold is unmapped with the last of them."""
        try:
            self._view.release()
            self.memory.close()
        except BufferError:
            pass


class ShmChannel(Channel):
    """One connection. A received frame's parts are the ring itself, freed by the next receive."""

    def __init__(self, sock: socket.socket, limits: FrameLimits) -> None:
        self.peer = "a process of this machine"
        self._limits = limits
        self._in = sock
        self._out = sock.dup()
        self._reading: int | None = None
        size = 2 * (limits.head_bytes + limits.part_bytes + ALIGNMENT)
        fd = os.memfd_create("step3-hetero", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, CONTROL_BYTES + size)
            socket.send_fds(self._out, [b"R"], [fd])
            self._sending = Ring(fd, size)
        finally:
            os.close(fd)
        theirs = _received_fd(self._in)
        try:
            if os.fstat(theirs).st_size != CONTROL_BYTES + size:
                raise EdgeMismatch("the peer's ring has another size than agreed")
            self._receiving = Ring(theirs, size)
        finally:
            os.close(theirs)

    def send(self, frame: Frame, deadline_s: float) -> None:
        """See Channel.send."""
        header = header_of(frame, self._limits, summed=False)
        place, count = self._reserve(header.payload_bytes, deadline_s)
        memory, at = self._sending.part(place, header.payload_bytes), 0
        for buffer in flat([frame.head, *frame.parts]):
            memory[at : at + len(buffer)] = buffer
            at += len(buffer)
        bell = packed(header) + PLACE.pack(place, count)
        write(self._out, [memoryview(bell)], deadline_s)

    def receive(self, deadline_s: float) -> Frame:
        """See Channel.receive."""
        if self._reading is not None:
            self._receiving.was_read(self._reading)
            self._reading = None
        wait_readable(self._in, deadline_s)
        try:
            header, place, self._reading = self._bell()
        except TransportTimeout as stalled:
            self.close()
            raise RoleLost(f"{self.peer} stalled within a frame") from stalled
        except EdgeMismatch:
            self.close()
            raise
        return header.frame(self._receiving.part(place, header.payload_bytes).toreadonly())

    def fileno(self) -> int:
        """See Channel.fileno."""
        return self._in.fileno()

    def close(self) -> None:
        """See Channel.close."""
        for sock in (self._in, self._out):
            sock.close()
        for ring in (self._sending, self._receiving):
            ring.close()

    def _bell(self) -> tuple[Header, int, int]:
        fixed = read_bytes(self._in, FIXED.size, STALL_S)
        rest = read_bytes(self._in, rest_bytes(fixed, self._limits), STALL_S)
        header = unpacked(fixed, rest, self._limits)
        place, count = PLACE.unpack(read_bytes(self._in, PLACE.size, STALL_S))
        if place + header.payload_bytes > self._receiving.capacity:
            raise EdgeMismatch(f"a payload at {place:,} lies outside the ring")
        return header, place, count

    def _reserve(self, nbytes: int, deadline_s: float) -> tuple[int, int]:
        until = time.monotonic() + deadline_s
        while (found := self._sending.reserve(nbytes)) is None:
            if time.monotonic() > until:
                raise TransportTimeout(f"the peer read nothing for {deadline_s:g} s")
            if _is_gone(self._out):
                raise RoleLost("the peer closed the connection")
            time.sleep(POLL_S)
        return found


class ShmTransport(Transport):
    """Addresses are names of abstract unix sockets (``@name``): they leave no file behind."""

    name: ClassVar[str] = "shm"
    capabilities: ClassVar[Capabilities] = Capabilities(False, 1, True)

    def listen(self, address: str, limits: FrameLimits, key: bytes | None = None) -> Listener:
        """See Transport.listen. Only processes of the same user are let in."""
        address = address or f"@step3-hetero-{secrets.token_hex(8)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(_abstract(address))
            sock.listen()
        except OSError as cause:
            sock.close()
            raise ConfigError(f"cannot listen at {address!r}: {cause.strerror}") from cause

        def made(peer: socket.socket) -> Channel:
            raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
            if PEER_CREDENTIALS.unpack(raw)[1] != os.getuid():
                raise EdgeMismatch("a process of another user")
            return ShmChannel(peer, limits)

        return SocketListener(sock, address, limits, key, made)

    def connect(
        self, address: str, limits: FrameLimits, deadline_s: float, key: bytes | None = None
    ) -> Channel:
        """See Transport.connect."""

        def connect(left: float) -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(left)
            try:
                sock.connect(_abstract(address))
            except OSError:
                sock.close()
                raise
            return sock

        return ShmChannel(connected(connect, address, limits, deadline_s, key), limits)


def _abstract(address: str) -> str:
    name = address.removeprefix("shm://")
    if not name.startswith("@") or not 1 < len(name) < 100:
        raise ConfigError(f"address {address!r} refused; expected @name, as @step3-hetero-f0")
    return "\0" + name[1:]


def _received_fd(sock: socket.socket) -> int:
    sock.settimeout(HANDSHAKE_S)
    space = socket.CMSG_SPACE(array.array("i").itemsize)
    try:
        said, extra, _, _ = sock.recvmsg(1, space)
    except TimeoutError:
        raise EdgeMismatch("the peer gave no ring") from None
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return int(array.array("i", data[:4])[0])
    raise EdgeMismatch(f"the peer gave no ring, but {said!r}")


def _is_gone(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP | select.POLLHUP)
    return bool(poll.poll(0))
