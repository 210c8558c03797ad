"""A channel over an emulated link: frames as the one below carries them, later.

A network card works beside the processor, so ``send`` returns at once and threads of the channel's
own let time pass: who computes while a frame is on its way loses nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Mapping

from step3_hetero.afd.link import SEND_DEADLINE_S
from step3_hetero.emulate.delay import MOST_WAITING, Delay
from step3_hetero.emulate.link import Link
from step3_hetero.errors import EdgeMismatch, RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.transport.base import Channel, CorruptFrame, Frame
from step3_hetero.transport.framing import nbytes

TICK_S = 0.2
"""How often the thread that receives looks whether the channel has been closed."""

SEND_S = SEND_DEADLINE_S
"""How long the peer may take nothing while a frame that is due leaves."""

FLUSH_S = 1.0
"""How long what was sent before a channel is closed may take to leave."""

Came = Frame | Step3HeteroError


class EmulatedChannel(Channel):
    """Both directions of one connection. Frames are copied: they outlive the caller's buffers."""

    def __init__(self, inner: Channel, link: Link) -> None:
        self.peer = inner.peer
        self._inner = inner
        self._link = link
        self._counted = 0
        self._closed = False
        self._failed: Step3HeteroError | None = None
        self._came: deque[Came] = deque()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._arrived = threading.Condition()
        self._out: Delay[Frame] = Delay(link, self._leave, f"to {self.peer}")
        self._in: Delay[Came] = Delay(link, self._arrive, f"from {self.peer}")
        self._thread = threading.Thread(target=self._listen, name=f"at {self.peer}", daemon=True)
        self._thread.start()

    def send(self, frame: Frame, deadline_s: float) -> None:
        """See Channel.send; that the peer is gone is seen by a later call."""
        if self._failed is not None:
            raise self._failed
        if self._closed:
            raise RoleLost("the channel is closed")
        whole = _copied(frame)
        if not self._out.put(whole, _size(whole), deadline_s):
            raise TransportTimeout(f"the emulated link took nothing for {deadline_s:g} s")

    def receive(self, deadline_s: float) -> Frame:
        """See Channel.receive."""
        with self._arrived:
            if self._closed:
                raise RoleLost("the channel is closed")
            if not self._arrived.wait_for(lambda: self._came or self._closed, max(0.0, deadline_s)):
                raise TransportTimeout(f"nothing came within {deadline_s:g} s")
            if self._closed:
                raise RoleLost("the channel is closed")
            came = self._came[0]
            if not isinstance(came, RoleLost | EdgeMismatch):  # an end stays the end
                self._came.popleft()
                os.eventfd_read(self._bell)
                self._arrived.notify_all()
        if isinstance(came, Step3HeteroError):
            raise came
        return came

    def fileno(self) -> int:
        """See Channel.fileno."""
        return self._bell

    def close(self) -> None:
        """See Channel.close; what was sent leaves first, without its delay."""
        with self._arrived:
            if self._closed:
                return
            self._closed = True
            self._arrived.notify_all()
        self._out.close(FLUSH_S)
        self._thread.join()
        self._in.close()
        self._inner.close()
        self._out.close()  # what had begun to leave before is let go with the channel below
        os.close(self._bell)

    def _leave(self, frame: Frame) -> None:
        if self._failed is not None:
            return
        try:
            self._inner.send(frame, FLUSH_S if self._closed else SEND_S)
        except Step3HeteroError as gone:
            self._failed = gone

    def _listen(self) -> None:
        """Take frames in as they come, and send them on the rest of their way."""
        while not self._closed:
            try:
                came: Came = self._harmed(_copied(self._inner.receive(TICK_S)))
            except TransportTimeout:
                continue
            except Step3HeteroError as error:
                came = error
            size = _size(came) if isinstance(came, Frame) else 0
            while not self._closed and not self._in.put(came, size, TICK_S):
                pass
            if not isinstance(came, Frame | CorruptFrame):
                self._failed = self._failed or came
                return

    def _harmed(self, frame: Frame) -> Frame:
        """Count a frame with tensors; see that what the link does to it is told and done.

        Raises:
            CorruptFrame: it is one that arrives damaged.
            RoleLost: it was the last before the connection is cut.
        """
        self._counted += bool(frame.parts)
        for every, error, what in (
            (self._link.cut_every, RoleLost, "cut"),
            (self._link.corrupt_every, CorruptFrame, "damaged"),
        ):
            if frame.parts and every and self._counted % every == 0:
                said = f"emulated link to {self.peer}: {what} at frame {self._counted}"
                print(said, file=sys.stderr, flush=True)
                raise error(said)
        return frame

    def _arrive(self, came: Came) -> None:
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._came) < MOST_WAITING or self._closed)
            self._came.append(came)
            os.eventfd_write(self._bell, 1)
            self._arrived.notify_all()


def over(links: Mapping[str, Link], name: str, channel: Channel) -> Channel:
    """Return the channel to an instance, as ``f:0``, over the link to its role if one is there."""
    link = links.get(name.partition(":")[0])
    return channel if link is None else EmulatedChannel(channel, link)


def _copied(frame: Frame) -> Frame:
    parts = [bytes(part) for part in frame.parts]
    return Frame(frame.kind, frame.epoch, frame.seq, bytes(frame.head), parts)


def _size(frame: Frame) -> int:
    return nbytes(frame.head) + sum(map(nbytes, frame.parts))
