"""What the transports over sockets share: reading and writing with a deadline, listening, keys."""

from __future__ import annotations

import hmac
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from step3_hetero.errors import EdgeMismatch, RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.transport.base import Channel, FrameLimits, Listener
from step3_hetero.transport.framing import VERSION

HANDSHAKE_S = 3.0
"""How long a peer may take to say who it is."""

MOST_PENDING = 16
"""Peers that may be saying who they are at a time; more are dropped."""

HELLO = struct.Struct("!4sHIQI32s")
"""magic, version, the three limits, a nonce"""

HELLO_MAGIC = b"S3HH"
PROOF_BYTES = 32

Made = Callable[[socket.socket], Channel]
"""Makes a channel of a connected socket, the peer having proved the key."""


def read_into(sock: socket.socket, view: memoryview, deadline_s: float) -> None:
    """Fill ``view``; the peer may pause for ``deadline_s`` seconds at a time.

    Raises:
        TransportTimeout, RoleLost: it paused longer, or is gone.
    """
    sock.settimeout(max(deadline_s, 1e-3))
    place = 0
    try:
        while place < len(view):
            count = sock.recv_into(view[place:])
            if count == 0:
                raise RoleLost("the peer closed the connection")
            place += count
    except TimeoutError:
        raise TransportTimeout(f"nothing came within {deadline_s:g} s") from None
    except OSError as cause:
        raise RoleLost(f"the connection broke: {cause.strerror or cause}") from cause


def read_bytes(sock: socket.socket, count: int, deadline_s: float) -> bytes:
    """Return exactly ``count`` bytes. Raises as ``read_into``."""
    found = bytearray(count)
    read_into(sock, memoryview(found), deadline_s)
    return bytes(found)


def write(sock: socket.socket, buffers: Sequence[memoryview], deadline_s: float) -> None:
    """Write buffers one after another without joining them. Raises as ``read_into``."""
    sock.settimeout(max(deadline_s, 1e-3))
    left = list(buffers)
    try:
        while left:
            sent = sock.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]
    except TimeoutError:
        raise TransportTimeout(f"the peer took nothing for {deadline_s:g} s") from None
    except OSError as cause:
        raise RoleLost(f"the connection broke: {cause.strerror or cause}") from cause


def wait_readable(sock: socket.socket, deadline_s: float) -> None:
    """Wait for something to read, or for the end.

    Raises:
        TransportTimeout: nothing came.
    """
    poll = select.poll()
    try:
        poll.register(sock, select.POLLIN)
    except (ValueError, OSError) as cause:
        raise RoleLost("the channel is closed") from cause
    if not poll.poll(max(0.0, deadline_s) * 1000):
        raise TransportTimeout(f"nothing came within {deadline_s:g} s")


def shake_hands(
    sock: socket.socket, limits: FrameLimits, key: bytes | None, *, listens: bool
) -> None:
    """Agree with the peer on version and limits, and prove to each other that both know the key.

    Each side answers the other's nonce with an HMAC-SHA256 that names its own side, so that an
    answer cannot be sent back to where it came from.

    Raises:
        EdgeMismatch: the peer differs, or does not know the key.
    """
    mine = secrets.token_bytes(32)
    sizes = (limits.head_bytes, limits.part_bytes, limits.parts)
    hello = HELLO.pack(HELLO_MAGIC, VERSION, *sizes, mine)
    write(sock, [memoryview(hello)], HANDSHAKE_S)
    magic, version, *theirs, nonce = HELLO.unpack(read_bytes(sock, HELLO.size, HANDSHAKE_S))
    if magic != HELLO_MAGIC or version != VERSION:
        raise EdgeMismatch(f"the peer is none of ours: {magic!r} version {version}")
    if tuple(theirs) != sizes:
        raise EdgeMismatch(f"the peer allows frames of {tuple(theirs)}, this side {sizes}")
    sides = (b"listener", b"caller") if listens else (b"caller", b"listener")
    write(sock, [memoryview(_proof(key, sides[0], nonce, mine))], HANDSHAKE_S)
    try:
        answer = read_bytes(sock, PROOF_BYTES, HANDSHAKE_S)
    except RoleLost:
        raise EdgeMismatch("the peer refuses the key") from None
    if not hmac.compare_digest(answer, _proof(key, sides[1], mine, nonce)):
        raise EdgeMismatch("the peer does not know the key")


def _proof(key: bytes | None, side: bytes, nonce: bytes, own: bytes) -> bytes:
    return hmac.digest(key or b"no key", side + nonce + own, "sha256")


def connected(
    connect: Callable[[float], socket.socket],
    address: str,
    limits: FrameLimits,
    deadline_s: float,
    key: bytes | None,
) -> socket.socket:
    """Connect, trying again while nobody listens, and shake hands.

    Raises:
        TransportTimeout: nobody listened until the deadline.
        EdgeMismatch: the peer differs or refuses the key.
    """
    until = time.monotonic() + deadline_s
    while True:
        try:
            sock = connect(max(0.01, until - time.monotonic()))
            break
        except OSError as cause:
            if time.monotonic() >= until:
                raise TransportTimeout(f"nobody listens at {address}: {cause}") from cause
            time.sleep(0.02)
    try:
        shake_hands(sock, limits, key, listens=False)
    except BaseException:
        sock.close()
        raise
    return sock


class SocketListener(Listener):
    """Shakes hands in threads of its own, so that who says nothing keeps nobody else waiting."""

    def __init__(
        self, sock: socket.socket, address: str, limits: FrameLimits, key: bytes | None, made: Made
    ) -> None:
        self.address = address
        self._sock = sock
        self._limits = limits
        self._key = key
        self._made = made
        self._queue: SimpleQueue[Channel] = SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._pending = threading.BoundedSemaphore(MOST_PENDING)
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name=f"at {address}", daemon=True)
        self._thread.start()

    def accept(self, deadline_s: float) -> Channel:
        """See Listener.accept."""
        try:
            channel = self._queue.get(timeout=max(0.0, deadline_s))
        except Empty:
            raise TransportTimeout(
                f"nobody came to {self.address} within {deadline_s:g} s"
            ) from None
        os.eventfd_read(self._bell)
        return channel

    def fileno(self) -> int:
        """See Listener.fileno."""
        return self._bell

    def close(self) -> None:
        """See Listener.close."""
        if self._closed:
            return
        self._closed = True
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get().close()
        os.close(self._bell)

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            if self._pending.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(sock,), daemon=True).start()
            else:
                sock.close()

    def _greet(self, sock: socket.socket) -> None:
        try:
            shake_hands(sock, self._limits, self._key, listens=True)
            channel = self._made(sock)
        except (Step3HeteroError, OSError):
            sock.close()
            return
        finally:
            self._pending.release()
        if self._closed:
            channel.close()
            return
        os.eventfd_write(self._bell, 1)  # before the channel: who takes it reads the bell
        self._queue.put(channel)
