"""Shared memory without a name, sealed, and a ring's bookkeeping in it."""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from step3_hetero.errors import EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.framing import aligned
from step3_hetero.transport.sockets import Stream, is_gone

FIRST_POLL_S, LAST_POLL_S = 50e-6, 2e-3
"""How often a sender looks whether a full ring has room again: more and more seldom."""

CONTROL_BYTES = 4096
"""A page before the ring: how much of the *other* ring its owner has read, as a count of bytes."""

SEAL_FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE (Linux 5.1): who gets the descriptor can map it for reading alone. Python
names it from 3.15."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""What a peer's memory has to have: were it cut short, reading it would kill this process."""


class Memory:
    """A page of control and ``capacity`` bytes, that one side writes and the other reads."""

    def __init__(self, fd: int, capacity: int, *, is_mine: bool) -> None:
        access = mmap.PROT_READ | (mmap.PROT_WRITE if is_mine else 0)
        mapped = mmap.mmap(fd, CONTROL_BYTES + capacity, prot=access)
        whole = np.frombuffer(mapped, np.uint8)
        self._count = whole[:8].view(np.uint64)  # one aligned word: never seen half written
        self.ring = whole[CONTROL_BYTES:]

    @classmethod
    def made(cls, capacity: int) -> tuple[Memory, int]:
        """Return memory of this side's own, and its descriptor, to hand to the peer and close."""
        fd = os.memfd_create("step3-hetero", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, CONTROL_BYTES + capacity)
            memory = cls(fd, capacity, is_mine=True)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | SEAL_FUTURE_WRITE)
        except BaseException:
            os.close(fd)
            raise
        return memory, fd

    @classmethod
    def given(cls, fd: int, capacity: int) -> Memory:
        """Return the peer's memory, once nobody can take it away.

        Raises:
            EdgeMismatch: it is no sealed memory, or of another size than agreed.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as cause:
            raise EdgeMismatch(
                f"the peer's ring is no memory that can be sealed: {cause}"
            ) from cause
        if seals & SEALS != SEALS:
            raise EdgeMismatch(f"the peer's ring has seals {seals:#x}, needed: {SEALS:#x}")
        size = os.fstat(fd).st_size
        if size != CONTROL_BYTES + capacity:
            raise EdgeMismatch(
                f"the peer's ring has {size:,} bytes, agreed: {CONTROL_BYTES + capacity:,}"
            )
        return cls(fd, capacity, is_mine=False)

    @property
    def count(self) -> int:
        """Return how many bytes its owner says it has read.

        Raises:
            RoleLost: this side has let go of it.
        """
        count = self._count  # another thread may close meanwhile
        if not count.size:
            raise RoleLost("the channel is closed")
        return int(count[0])

    @count.setter
    def count(self, value: int) -> None:
        self._count[:1] = value

    def close(self) -> None:
        """Let go of it; it is unmapped with the last array over it, here or made of a frame."""
        self._count, self.ring = self._count[:0].copy(), self.ring[:0].copy()


class Ring:
    """Where the next payload goes. Memory is touched only as far as it is used: while everything
    has been read, the next payload begins at the start again."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._unread: deque[tuple[int, int]] = deque()
        self._cursor = 0
        self._read = 0
        self.written = 0

    def has_read(self, count: int) -> bool:
        """Take in how far the peer has read; say whether that is further than before.

        Raises:
            EdgeMismatch: it claims to have read what was never written, or to have unread.
        """
        if not self._read <= count <= self.written:
            raise EdgeMismatch(
                f"the peer says it has read {count:,} bytes, after {self._read:,}, of "
                f"{self.written:,} written"
            )
        moved, self._read = count > self._read, count
        while self._unread and self._unread[0][1] <= count:
            self._unread.popleft()
        return moved

    def reserve(self, nbytes: int) -> int | None:
        """Return the place of a payload, or None while there is no room."""
        size = aligned(max(1, nbytes))
        place = self._gap(size)
        if place is not None:
            self.written += size
            self._cursor = place + size
            self._unread.append((place, self.written))
        return place

    def _gap(self, size: int) -> int | None:
        if not self._unread:
            return 0 if size <= self._capacity else None
        oldest = self._unread[0][0]
        if self._cursor > oldest:
            if self._cursor + size <= self._capacity:
                return self._cursor
            return 0 if size < oldest else None
        return self._cursor if self._cursor + size < oldest else None


def room_in(
    ring: Ring, size: int, count: Callable[[], int], stream: Stream, deadline_s: float
) -> int:
    """Return a place in a ring, waiting until the peer, who says ``count``, has read enough.

    Raises:
        EdgeMismatch: as ``Ring.has_read``.
        TransportTimeout, RoleLost: it reads nothing, or is gone.
    """
    until = pause_s = 0.0
    while True:
        moved = ring.has_read(count())
        place = ring.reserve(size)
        if place is not None:
            return place
        if moved or not until:
            until, pause_s = time.monotonic() + deadline_s, FIRST_POLL_S
        if time.monotonic() >= until:
            raise TransportTimeout(f"the peer read nothing for {deadline_s:g} s")
        if is_gone(stream):
            raise RoleLost("the peer closed the connection")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_POLL_S)
