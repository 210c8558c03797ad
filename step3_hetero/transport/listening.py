"""A listener over sockets: whoever comes is greeted in a thread of its own, whatever it sends."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from step3_hetero.errors import Step3HeteroError, TransportTimeout
from step3_hetero.transport.base import Channel, Listener

MOST_PENDING = 16
"""Peers that may be saying who they are at a time; for one more the oldest has to go."""

MOST_WAITING = 64
"""Peers that have proved who they are and are not accepted yet; more are dropped."""

PAUSE_S = 0.05
"""How long to wait after an accept that failed, for want of descriptors as a rule."""

Greet = Callable[[socket.socket], Channel]
"""Makes a channel of a connected socket, the peer having proved the key, before a deadline."""


class SocketListener(Listener):
    """Greets in threads, so that who says nothing keeps nobody else waiting.

    Under a flood of strangers the oldest of those who have said nothing yet is dropped for the
    newest: a peer of ours needs milliseconds, so it gets through between them.
    """

    def __init__(self, sock: socket.socket, address: str, greet: Greet) -> None:
        self.address = address
        self._sock = sock
        self._greet = greet
        self._queue: SimpleQueue[Channel] = SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._pending: dict[socket.socket, None] = {}
        self._changing = threading.Lock()
        self._closing = threading.Event()
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
        with self._changing:
            if self._closing.is_set():
                return
            self._closing.set()
            for sock in self._pending:
                _cut(sock)
        _cut(self._sock)
        self._thread.join()
        self._sock.close()
        while not self._queue.empty():
            self._queue.get().close()
        os.close(self._bell)

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._sock.accept()
            except OSError:  # out of descriptors, or a peer that left before it was let in
                self._closing.wait(PAUSE_S)
                continue
            try:
                handle = sock.dup()  # TLS takes the first for itself
            except OSError:
                sock.close()
                self._closing.wait(PAUSE_S)
                continue
            self._await(handle)
            try:
                threading.Thread(target=self._meet, args=(sock, handle), daemon=True).start()
            except RuntimeError:  # out of threads
                self._forget(handle)
                sock.close()
                self._closing.wait(PAUSE_S)

    def _await(self, handle: socket.socket) -> None:
        with self._changing:
            if len(self._pending) >= MOST_PENDING:
                oldest = next(iter(self._pending))
                del self._pending[oldest]
                _cut(oldest)
            self._pending[handle] = None

    def _forget(self, handle: socket.socket) -> None:
        with self._changing:
            self._pending.pop(handle, None)
        handle.close()

    def _meet(self, sock: socket.socket, handle: socket.socket) -> None:
        try:
            channel = self._greet(sock)
        except (Step3HeteroError, OSError):
            sock.close()
            return
        finally:
            self._forget(handle)
        with self._changing:
            welcome = not self._closing.is_set() and self._queue.qsize() < MOST_WAITING
            if welcome:
                os.eventfd_write(self._bell, 1)  # before the channel: who takes it reads the bell
                self._queue.put(channel)
        if not welcome:
            channel.close()


def _cut(sock: socket.socket) -> None:
    """End a connection, waking the thread that waits on it, which closes it."""
    with suppress(OSError):  # it has ended already
        sock.shutdown(socket.SHUT_RDWR)
