"""A connection between two processes of one engine: frames out, frames in, signs of life."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from step3_hetero.afd.landing import Landed, Landing
from step3_hetero.afd.leaving import COPY_S, is_apart
from step3_hetero.afd.messages import Kind, Said
from step3_hetero.afd.outbox import Outbox
from step3_hetero.afd.parcel import parcel, unpacked
from step3_hetero.afd.vigil import Vigil
from step3_hetero.backend import Device
from step3_hetero.errors import EdgeMismatch, RoleLost, Step3HeteroError, TransportTimeout
from step3_hetero.specs import HostArray
from step3_hetero.transport.base import PIECE_BYTES, Channel, Frame, FrameLimits
from step3_hetero.transport.framing import nbytes

BEATS_PER_DEADLINE = 4

HEAD_BYTES = 4 << 20
"""Log-probabilities of a whole vocabulary, for a few rows, fit."""

LENT = (Kind.CALL, Kind.ANSWER)
"""Their arrays go to a device, which copies them, as soon as they are read: they are not copied
before. Until then they hold up the peer, and are right for as long as they live."""

SEND_DEADLINE_S = 1.5 * COPY_S
"""A peer that computes, or waits for a copy or for other ranks, reads nothing meanwhile: this is
more than it may take. It sends signs of life from a thread; see `Vigil` for one that sends none."""

UNREAD_S = 0.1
"""Silence shorter than this is not looked into."""

BEAT = parcel(Kind.BEAT, 0, 0, {}, {})

GONE = (RoleLost, TransportTimeout)
"""A peer that has ended, or does nothing for too long."""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A frame that has come in: what it is, which one, what it says, its arrays."""

    kind: int
    epoch: int
    seq: int
    said: Said
    arrays: dict[str, HostArray]
    landed: Mapping[str, Landed] = field(default_factory=dict)


class Link:
    """One peer. Any thread may send; one receives, and it alone posts.

    ``ahead_s`` is by how much the peer's clock shows more than ours, where that is known.
    """

    def __init__(self, channel: Channel, name: str) -> None:
        self.channel = channel
        self.name = name
        self.last_seen = time.monotonic()
        self.closed = False
        self.ahead_s = 0.0
        self._sending = threading.Lock()
        self._vigil = Vigil(channel)
        self._outbox: Outbox | None = None
        self._unsent: Step3HeteroError | None = None
        self._landing: Landing | None = None

    def land_on(self, device: Device) -> None:
        """Bring large arrays of calls and answers to a device while the rest of them comes.

        Nothing changes where the host reads the device's memory, or the channel cannot do it.
        """
        if self.channel.lands and is_apart(device):
            self._landing = self.channel.landing = Landing(device, LENT)

    def fileno(self) -> int:
        """Return what ``select`` waits for; -1: the link is closed, as ``receive`` tells."""
        return -1 if self.closed else self.channel.fileno()

    def send(
        self,
        kind: Kind,
        seq: int = 0,
        said: Mapping[str, Any] | None = None,
        arrays: Mapping[str, HostArray] | None = None,
        *,
        epoch: int = 0,
    ) -> None:
        """Send one message.

        Raises:
            RoleLost, TransportTimeout: the peer is gone, or takes nothing any more.
        """
        self._send(parcel(kind, epoch, seq, said or {}, arrays or {}))

    def post(
        self,
        kind: Kind,
        seq: int = 0,
        said: Mapping[str, Any] | None = None,
        arrays: Mapping[str, HostArray] | None = None,
        *,
        epoch: int = 0,
    ) -> None:
        """Send one message without waiting: ``arrays`` must stay as they are until it has left.

        If it cannot be sent the link is closed, and the next ``receive`` says why. On a closed
        link it goes nowhere.
        """
        frame = parcel(kind, epoch, seq, said or {}, arrays or {})
        if self._outbox is None:
            self._outbox = Outbox(self.name, self._send, self._not_sent)
        self._outbox.put(frame)

    def flush(self, deadline_s: float) -> bool:
        """Wait until all that was posted has left, or the link is closed; say if it was in time."""
        return self._outbox is None or self._outbox.flush(deadline_s)

    def _send(self, frame: Frame) -> None:
        if frame.ready is not None:  # the first piece waits for kernels: signs of life go on
            total = sum(map(nbytes, frame.parts))
            frame.ready(min(PIECE_BYTES, total) if self.channel.in_pieces else total)
        with self._sending:
            self.channel.send(frame, SEND_DEADLINE_S)

    def _not_sent(self, error: Step3HeteroError) -> None:
        self._unsent = error
        self.close()

    def beat(self, *, patient: bool = False) -> None:
        """Send a sign of life, if that can be done at once.

        If it cannot, for a frame is under way, and the peer has given none for a deadline, the link
        is closed: whoever sends that frame is told, and goes on. Not if ``patient``.

        Raises:
            RoleLost: the peer is gone.
        """
        if not self._sending.acquire(blocking=False):
            if self._vigil.silent_looks(self.last_seen) > BEATS_PER_DEADLINE and not patient:
                self.close()
            return
        self._vigil.ends()
        try:
            self.channel.send(BEAT, 0)
        except TransportTimeout:  # the peer takes nothing now: whoever sends to it will know
            pass
        finally:
            self._sending.release()

    def receive(self, deadline_s: float) -> Message:
        """Return the next message, signs of life included.

        A peer that keeps no rules loses this link, and costs nobody else anything.

        Raises:
            TransportTimeout, CorruptFrame: as ``Channel.receive``.
            RoleLost: the peer is gone, or its frame is none; the link is closed then.
            Step3HeteroError: what was posted could not be sent; told once, the link is closed.
        """
        if self._unsent is not None:
            unsent, self._unsent = self._unsent, None
            raise unsent
        try:
            frame = self.channel.receive(deadline_s)
            self.last_seen = time.monotonic()
            said, arrays = unpacked(frame, self.name, copy=frame.kind not in LENT)
        except EdgeMismatch as broken:
            self.close()
            raise RoleLost(f"{self.name} is let go: {broken}") from broken
        landed = {} if self._landing is None else self._landing.taken(arrays)
        return Message(frame.kind, frame.epoch, frame.seq, said, arrays, landed)

    def wants(self, kind: Kind, deadline_s: float) -> Message:
        """Return the next message that is no sign of life, which has to be of this kind.

        Raises:
            EdgeMismatch: the peer refuses, or says something else.
            RoleLost: it refuses for now, or as ``receive``.
            TransportTimeout, CorruptFrame: as ``receive``.
        """
        until = time.monotonic() + deadline_s
        while True:
            message = self.receive(max(0.0, until - time.monotonic()))
            if message.kind == Kind.BEAT:
                continue
            if message.kind == Kind.REFUSED:
                why = str(message.said.get("why", f"{self.name} refuses"))
                raise RoleLost(why) if message.said.get("busy") else EdgeMismatch(why)
            if message.kind != kind:
                raise EdgeMismatch(f"{self.name} said {message.kind}, expected {kind.name.lower()}")
            return message

    def compare_clocks(self, asked_s: float, theirs_s: float) -> None:
        """Take in the peer's clock, read between ``asked_s`` of ours and now.

        A difference that the way there and back explains is none: one machine has one clock.
        """
        now = time.monotonic()
        ahead, unsure = theirs_s - (asked_s + now) / 2, (now - asked_s) / 2
        self.ahead_s = 0.0 if abs(ahead) <= unsure else ahead

    def silent_s(self) -> float:
        """Return the seconds since the last sign of life; 0 while one lies unread."""
        elapsed = time.monotonic() - self.last_seen
        return 0.0 if elapsed > UNREAD_S and ready([self], 0) else elapsed

    def close(self) -> None:
        """Let go of the channel."""
        if not self.closed:
            self.closed = True
            self.channel.close()  # wakes who sends
            if self._outbox is not None:
                self._outbox.close()


class Heart:
    """Sends signs of life on links from a thread of its own, also while kernels run.

    It never waits for a peer: one that takes nothing must not silence the beats to all others.
    """

    def __init__(self, deadline_s: float) -> None:
        self._period_s = deadline_s / BEATS_PER_DEADLINE
        self._links: dict[Link, bool] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self._thread.start()

    def watch(self, link: Link, *, patient: bool = False) -> None:
        """Begin to send on a link; ``patient``: its peer may be stopped for a while."""
        self._links[link] = patient

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stopped.wait(self._period_s):
            for link, patient in list(self._links.items()):
                try:
                    link.beat(patient=patient)
                except Step3HeteroError:  # whoever reads the link is told
                    del self._links[link]


def ready(links: Iterable[Any], deadline_s: float) -> list[Any]:
    """Return those of ``links`` (descriptors, or what has one) that have something to read.

    One that is closed has: reading it tells so. They come in the order in which they were given.
    A descriptor may have any number: ``select`` itself ends at 1023.
    """
    waiting = list(links)
    if not waiting:
        time.sleep(deadline_s)
        return []
    numbers = [_descriptor(link) for link in waiting]
    if min(numbers) < 0:  # a sign of life found the peer gone, and closed the channel
        return [link for link, number in zip(waiting, numbers, strict=True) if number < 0]
    poll = select.poll()
    for number in numbers:
        poll.register(number, select.POLLIN)
    found = dict(poll.poll(max(0.0, deadline_s) * 1e3))
    closed = {number for number, event in found.items() if event & select.POLLNVAL}
    return [
        link
        for link, number in zip(waiting, numbers, strict=True)
        if number in found and (number not in closed or _descriptor(link) < 0)
    ]


def _descriptor(link: Any) -> int:
    return link if isinstance(link, int) else int(link.fileno())


def limits(part_bytes: int) -> FrameLimits:
    """Return the limits of a link whose arrays take at most ``part_bytes``."""
    return FrameLimits(HEAD_BYTES, part_bytes, 256)
