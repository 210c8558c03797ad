"""Frames between threads of one process: for tests, and for roles that share a process."""

from __future__ import annotations

import os
import secrets
import threading
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
from step3_hetero.transport.framing import header_of


class _Pipe:
    """One direction: frames waiting, and a descriptor that says that there are some."""

    def __init__(self) -> None:
        self.frames: deque[Frame] = deque()
        self.changed = threading.Condition()
        self.is_closed = False
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)

    def put(self, frame: Frame) -> None:
        with self.changed:
            if self.is_closed:
                raise RoleLost("the peer closed the connection")
            self.frames.append(frame)
            os.eventfd_write(self.bell, 1)
            self.changed.notify()

    def get(self, deadline_s: float) -> Frame:
        with self.changed:
            came = self.changed.wait_for(lambda: self.frames or self.is_closed, deadline_s)
            if self.frames:
                os.eventfd_read(self.bell)
                return self.frames.popleft()
            if came:
                raise RoleLost("the peer closed the connection")
            raise TransportTimeout(f"nothing came within {deadline_s:g} s")

    def close(self) -> None:
        with self.changed:
            if not self.is_closed:
                self.is_closed = True
                os.eventfd_write(self.bell, 1)  # the end is something to read, too
                self.changed.notify_all()

    def __del__(self) -> None:
        os.close(self.bell)


class InprocChannel(Channel):
    """One end of two pipes."""

    def __init__(self, peer: str, limits: FrameLimits, incoming: _Pipe, outgoing: _Pipe) -> None:
        self.peer = peer
        self._limits = limits
        self._in = incoming
        self._out = outgoing

    def send(self, frame: Frame, deadline_s: float) -> None:
        """See Channel.send."""
        header_of(frame, self._limits)
        parts = [bytes(part) for part in frame.parts]
        self._out.put(Frame(frame.kind, frame.epoch, frame.seq, bytes(frame.head), parts))

    def receive(self, deadline_s: float) -> Frame:
        """See Channel.receive."""
        return self._in.get(max(0.0, deadline_s))

    def fileno(self) -> int:
        """See Channel.fileno."""
        return self._in.bell

    def close(self) -> None:
        """See Channel.close."""
        self._in.close()
        self._out.close()


class InprocListener(Listener):
    """Hands out the other ends of what callers made."""

    def __init__(self, address: str, limits: FrameLimits, key: bytes | None) -> None:
        self.address = address
        self.limits = limits
        self.key = key
        self.waiting: deque[InprocChannel] = deque()
        self.changed = threading.Condition()
        self.is_closed = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)

    def come(self, channel: InprocChannel) -> None:
        """Take in a caller.

        Raises:
            TransportTimeout: the listener was closed meanwhile.
        """
        with self.changed:
            if self.is_closed:
                raise TransportTimeout(f"nobody listens at {self.address} in this process")
            self.waiting.append(channel)
            os.eventfd_write(self._bell, 1)
            self.changed.notify()

    def accept(self, deadline_s: float) -> Channel:
        """See Listener.accept."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.is_closed, max(0.0, deadline_s))
            if self.is_closed or not self.waiting:
                raise TransportTimeout(f"nobody came to {self.address} within {deadline_s:g} s")
            os.eventfd_read(self._bell)
            return self.waiting.popleft()

    def fileno(self) -> int:
        """See Listener.fileno."""
        return self._bell

    def close(self) -> None:
        """See Listener.close."""
        with self.changed:
            if self.is_closed:
                return
            self.is_closed = True
            LISTENERS.pop(self.address, None)
            os.close(self._bell)
            for channel in self.waiting:  # nobody will accept it
                channel.close()
            self.changed.notify_all()


LISTENERS: dict[str, InprocListener] = {}
"""Who listens in this process, by address."""


class InprocTransport(Transport):
    """Addresses are any names."""

    name: ClassVar[str] = "inproc"
    capabilities: ClassVar[Capabilities] = Capabilities(False, 1, False)

    def listen(self, address: str, limits: FrameLimits, key: bytes | None = None) -> Listener:
        """See Transport.listen."""
        address = address or f"inproc-{secrets.token_hex(8)}"
        if address in LISTENERS:
            raise ConfigError(f"cannot listen at {address!r}: somebody does")
        LISTENERS[address] = InprocListener(address, limits, key)
        return LISTENERS[address]

    def connect(
        self, address: str, limits: FrameLimits, deadline_s: float, key: bytes | None = None
    ) -> Channel:
        """See Transport.connect."""
        listener = LISTENERS.get(address)
        if listener is None:
            raise TransportTimeout(f"nobody listens at {address} in this process")
        if limits != listener.limits:
            raise EdgeMismatch(f"the peer allows frames of {listener.limits}, this side {limits}")
        if key != listener.key:
            raise EdgeMismatch("the peer refuses the key")
        there, back = _Pipe(), _Pipe()
        listener.come(InprocChannel("the caller", limits, there, back))
        return InprocChannel(address, limits, back, there)
