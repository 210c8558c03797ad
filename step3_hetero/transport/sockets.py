"""What the transports over sockets share: reading and writing with a deadline, and the greeting."""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import FrameLimits
from step3_hetero.transport.framing import VERSION

HANDSHAKE_S = 5.0
"""How long a peer may take, all in all, to say who it is."""

LEAST_BYTES_PER_S = 1 << 20
"""Who sends, or takes, a frame more slowly is given up: a byte now and then is no sign of life."""

RETRY_S = 0.02
"""How long a caller waits before it tries again to reach a listener."""

HELLO = struct.Struct("!4sHIQI32s")
"""magic, version, the three limits, a nonce"""

HELLO_MAGIC = b"S3HH"
PROOF_BYTES = 32

AT_ONCE, NO_SIGNAL = int(socket.MSG_DONTWAIT), int(socket.MSG_NOSIGNAL)
"""As plain numbers: the flags of an enumeration take longer to join than a bell to ring."""

TIMEVAL = struct.Struct("@ll")


class Patience:
    """How long a peer may take: ``pause_s`` between bytes, and enough in all for ``nbytes``."""

    def __init__(self, pause_s: float, nbytes: int = 0) -> None:
        self._pause_s = pause_s
        self._until = time.monotonic() + pause_s + nbytes / LEAST_BYTES_PER_S

    def left_s(self) -> float:
        """Return for how long the next byte may be waited for; not above 0: not at all."""
        return min(self._pause_s, self._until - time.monotonic())


class Stream:
    """A connected socket, read by one thread while another writes; any may close it.

    Deadlines are the kernel's own (``SO_RCVTIMEO``), set where they change: one call a read.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self.sock = sock
        self._reading = threading.Lock()
        self._writing = threading.Lock()
        self._set: dict[int, float] = {}
        self.sent_bytes = 0

    def read(self, view: memoryview, pause_s: float) -> int:
        """Read into ``view`` what has come, waiting for it; 0 at the end.

        Raises:
            TransportTimeout: nothing came.
            RoleLost: the connection broke, or was closed here.
        """
        with self._reading:
            try:
                return self.sock.recv_into(view, 0, self._wait(socket.SO_RCVTIMEO, pause_s))
            except BlockingIOError:
                raise TransportTimeout(f"nothing came within {max(0.0, pause_s):g} s") from None
            except OSError as cause:
                raise RoleLost(f"the connection broke: {cause.strerror or cause}") from cause

    def write(self, buffers: Sequence[memoryview], pause_s: float) -> int:
        """Write what the kernel takes of ``buffers``, waiting until it takes some.

        Raises:
            TransportTimeout: it took nothing.
            RoleLost: the connection broke, or was closed here.
        """
        with self._writing:
            try:
                flags = self._wait(socket.SO_SNDTIMEO, pause_s)
                sent = self.sock.sendmsg(buffers, [], flags | NO_SIGNAL)
                self.sent_bytes += sent
                return sent
            except BlockingIOError:
                raise TransportTimeout(
                    f"the peer took nothing for {max(0.0, pause_s):g} s"
                ) from None
            except OSError as cause:
                raise RoleLost(f"the connection broke: {cause.strerror or cause}") from cause

    def is_writable(self) -> bool:
        """Say whether the kernel takes something now; a third of its buffer is free then."""
        poll = select.poll()
        try:
            poll.register(self.sock, select.POLLOUT)
        except (ValueError, OSError) as cause:
            raise RoleLost("the channel is closed") from cause
        return bool(poll.poll(0))

    def bound_to(self) -> bytes:
        """Return what a proof of the key is bound to, so that nobody can pass it on."""
        return b""

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.sock.fileno()

    def close(self) -> None:
        """Close, waking whoever reads or writes: a descriptor in use must not get a new owner."""
        with suppress(OSError):  # the peer was faster, or this is the second time
            self.sock.shutdown(socket.SHUT_RDWR)
        with self._reading, self._writing:
            self.sock.close()

    def _wait(self, option: int, pause_s: float) -> int:
        """Have the kernel wait for ``pause_s`` seconds; return the flags that say not to."""
        if pause_s <= 0:
            return AT_ONCE
        if self._set.get(option) != pause_s:
            whole = max(1, round(pause_s * 1e6))  # 0 would be: for ever
            self.sock.setsockopt(socket.SOL_SOCKET, option, TIMEVAL.pack(*divmod(whole, 1_000_000)))
            self._set[option] = pause_s
        return 0


class Connected(Protocol):
    """What has a connected socket's descriptor."""

    def fileno(self) -> int:
        """Return it; -1: closed."""


def is_gone(stream: Connected) -> bool:
    """Say whether the peer has closed the connection, or this side has."""
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLRDHUP | select.POLLHUP)
    except (ValueError, OSError):  # it was closed here, meanwhile
        return True
    return bool(poll.poll(0))


def read_into(
    stream: Stream,
    view: memoryview,
    patience: Patience,
    each: Callable[[memoryview], None] | None = None,
) -> None:
    """Fill ``view``; ``each`` is called with every piece as it comes.

    Raises:
        TransportTimeout, RoleLost: the peer is too slow, or gone.
    """
    place = 0
    while place < len(view):
        count = stream.read(view[place:], patience.left_s())
        if count == 0:
            raise RoleLost("the peer closed the connection")
        if each is not None:
            each(view[place : place + count])
        place += count


def read_bytes(stream: Stream, count: int, patience: Patience) -> bytes:
    """Return exactly ``count`` bytes. Raises as ``read_into``."""
    found = bytearray(count)
    read_into(stream, memoryview(found), patience)
    return bytes(found)


def write(stream: Stream, buffers: Sequence[memoryview], patience: Patience) -> None:
    """Write buffers one after another without joining them. Raises as ``read_into``."""
    left = list(buffers)
    while left:
        sent = stream.write(left, patience.left_s())
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = left[0][sent:]


def shake_hands(
    stream: Stream, limits: FrameLimits, key: bytes | None, patience: Patience, *, listens: bool
) -> None:
    """Agree with the peer on version and limits, and prove to each other that both know the key.

    Each side answers the other's nonce with an HMAC-SHA256 that names its own side, so that an
    answer cannot be sent back to where it came from, and the listener's certificate, if it has
    one, so that nobody in between can pass it on. Both give their proof before they judge the
    other's, so each is told of a wrong key: who ends without a proof has not refused, but gone.

    Raises:
        EdgeMismatch: the peer differs, or does not know the key.
        RoleLost, TransportTimeout: it is gone, or too slow.
    """
    mine = secrets.token_bytes(32)
    sizes = (limits.head_bytes, limits.part_bytes, limits.parts)
    hello = HELLO.pack(HELLO_MAGIC, VERSION, *sizes, mine)
    write(stream, [memoryview(hello)], patience)
    magic, version, *theirs, nonce = HELLO.unpack(read_bytes(stream, HELLO.size, patience))
    if magic != HELLO_MAGIC or version != VERSION:
        raise EdgeMismatch(
            f"the peer says {magic!r} version {version}, this side {HELLO_MAGIC!r} version "
            f"{VERSION}; install one release on both sides"
        )
    if tuple(theirs) != sizes:
        raise EdgeMismatch(f"the peer allows frames of {tuple(theirs)}, this side {sizes}")
    bound = stream.bound_to()
    sides = (b"listener", b"caller") if listens else (b"caller", b"listener")
    write(stream, [memoryview(_proof(key, sides[0], nonce, mine, bound))], patience)
    try:
        answer = read_bytes(stream, PROOF_BYTES, patience)
    except RoleLost as gone:
        raise RoleLost(f"the peer left while it was greeted: {gone}") from gone
    if not hmac.compare_digest(answer, _proof(key, sides[1], mine, nonce, bound)):
        raise EdgeMismatch("the peer does not know the key")


def _proof(key: bytes | None, side: bytes, nonce: bytes, own: bytes, bound: bytes) -> bytes:
    return hmac.digest(key or b"no key", side + nonce + own + bound, "sha256")


def connected(
    connect: Callable[[float], socket.socket], address: str, deadline_s: float
) -> socket.socket:
    """Connect, trying again while nobody listens.

    Raises:
        TransportTimeout: nobody listened until the deadline.
    """
    until = time.monotonic() + deadline_s
    while True:
        try:
            return connect(max(0.01, until - time.monotonic()))
        except OSError as cause:
            if time.monotonic() >= until:
                raise TransportTimeout(f"nobody listens at {address}: {cause}") from cause
            time.sleep(RETRY_S)
