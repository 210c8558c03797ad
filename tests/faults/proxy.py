"""A TCP proxy between two roles that does to their link what networks do, when told to.

It reads frames as they are framed, so that a fault can be aimed at one. Every thread of it is a
daemon; ``close`` ends them.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from step3_hetero.emulate.delay import Delay
from step3_hetero.emulate.link import Link
from step3_hetero.transport import framing
from step3_hetero.transport.base import FrameLimits
from step3_hetero.transport.sockets import HELLO, PROOF_BYTES
from step3_hetero.transport.tcp import split

THERE, BACK = "there", "back"
"""Directions: from who connects to who listens, and back."""

ANY_FRAME = FrameLimits(2**32 - 1, 2**62, 2**16 - 1)

TRAILER_BYTES = framing.SUM.size if framing.VERSION > 1 else 0
"""From version 2 on a payload's checksum follows it."""

PAUSE_S = 0.02


@dataclass
class Flip:
    """An order to flip one byte of one frame: the first with a payload of so many bytes."""

    direction: str
    least_bytes: int


@dataclass(eq=False)
class Pair:
    """One connection: the socket of who connected, and ours to the target."""

    caller: socket.socket
    target: socket.socket
    spared: bool
    delays: list[Delay[bytes]] = field(default_factory=list)
    broken: bool = False

    def close(self) -> None:
        """Break the connection for both sides at once."""
        self.broken = True
        for sock in (self.caller, self.target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class FaultyProxy:
    """Passes frames between whoever connects to ``address`` and the target.

    The first ``spared`` connections are passed on unharmed, whatever happens to the others: a front
    that greets a role before an attention instance does keeps its own link.

    ``frames`` and ``nbytes`` count what was passed on in each direction, ``connections`` those that
    reached the target, ``refused`` those that came while the link was cut, ``flipped`` the bytes.
    """

    def __init__(self, target: str, *, spared: int = 0) -> None:
        self.frames: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()
        self.connections = self.refused = self.flipped = 0
        self._sent_bytes = 0  # there, on connections that are not spared
        self._target = split(target)
        self._spared = spared
        self._link = Link()
        self._stalled_until = 0.0
        self._flips: list[Flip] = []
        self._orders: list[tuple[int, Callable[[], None]]] = []
        self._pairs: list[Pair] = []
        self._is_cut = False
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        threading.Thread(target=self._accept, name="faulty proxy", daemon=True).start()

    def cut(self) -> None:
        """Break every connection that is not spared, and each new one, until ``heal``."""
        with self._lock:
            self._is_cut = True
            broken = [pair for pair in self._pairs if not pair.spared]
            self._pairs = [pair for pair in self._pairs if pair.spared]
        for pair in broken:
            pair.close()

    def heal(self) -> None:
        """Let connections through again; those that were cut are gone."""
        with self._lock:
            self._is_cut = False

    def stall(self, seconds: float) -> None:
        """Hold back everything for so long, and lose nothing: connections stay."""
        self._stalled_until = time.monotonic() + seconds

    def slow(self, link: Link) -> None:
        """Make the link late, or narrow, from now on; ``Link()`` is as fast as it goes."""
        with self._lock:
            self._link = link
            for pair in self._pairs:
                for delay in () if pair.spared else pair.delays:
                    delay.link = link

    def corrupt_next(self, direction: str = THERE, *, least_bytes: int = 1) -> None:
        """Flip one byte in the payload of the next frame that has ``least_bytes`` of it."""
        with self._lock:
            self._flips.append(Flip(direction, least_bytes))

    def when(self, nbytes: int, act: Callable[[], None]) -> None:
        """Call ``act`` when so many more bytes have gone there, in the midst of a frame's way."""
        with self._lock:
            self._orders.append((self._sent_bytes + nbytes, act))

    def close(self) -> None:
        """Break everything and listen no more."""
        self._spared = 0
        for pair in self._pairs:
            pair.spared = False
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                spared = self.connections < self._spared
                refused = self._is_cut and not spared
                self.refused += refused
            if refused:
                caller.close()
                continue
            try:
                target = socket.create_connection(self._target, 5)
            except OSError:
                caller.close()
                continue
            target.settimeout(None)
            self._begin(Pair(caller, target, spared))

    def _begin(self, pair: Pair) -> None:
        for sock in (pair.caller, pair.target):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = [(THERE, pair.caller, pair.target), (BACK, pair.target, pair.caller)]
        with self._lock:
            self.connections += 1
            self._pairs.append(pair)
        for direction, source, sink in ways:
            name = f"proxy {direction}"
            deliver = self._deliverer(pair, direction, sink)
            delay: Delay[bytes] = Delay(Link() if pair.spared else self._link, deliver, name)
            pair.delays.append(delay)
            arguments = (pair, direction, source, delay)
            threading.Thread(target=self._pump, args=arguments, name=name, daemon=True).start()

    def _deliverer(self, pair: Pair, direction: str, sink: socket.socket):
        def deliver(data: bytes) -> None:
            if direction == THERE and not pair.spared:
                self._obey(len(data))
            while time.monotonic() < self._stalled_until and not (pair.spared or pair.broken):
                time.sleep(PAUSE_S)
            with self._lock:
                self.nbytes[direction] += len(data)
            try:
                sink.sendall(data)
            except OSError:
                pair.close()

        return deliver

    def _obey(self, nbytes: int) -> None:
        with self._lock:
            self._sent_bytes += nbytes
            due = [order for order in self._orders if order[0] <= self._sent_bytes]
            self._orders = [order for order in self._orders if order not in due]
        for _, act in due:
            act()

    def _pump(self, pair: Pair, direction: str, source: socket.socket, delay: Delay[bytes]) -> None:
        """Read greeting, then frames, and send each on its way."""
        try:
            for nbytes in (HELLO.size, PROOF_BYTES):
                delay.put(_exactly(source, nbytes), nbytes, 60)
            while True:
                frame = self._frame(source, pair, direction)
                with self._lock:
                    self.frames[direction] += 1
                delay.put(frame, len(frame), 60)
        except (OSError, EOFError):
            delay.close()
            pair.close()

    def _frame(self, source: socket.socket, pair: Pair, direction: str) -> bytes:
        fixed = _exactly(source, framing.FIXED.size)
        rest = _exactly(source, framing.rest_bytes(fixed, ANY_FRAME))
        size = framing.unpacked(fixed, rest, ANY_FRAME).payload_bytes
        payload = bytearray(_exactly(source, size + TRAILER_BYTES))
        if not pair.spared:
            self._damage(direction, payload, size)
        return fixed + rest + payload

    def _damage(self, direction: str, payload: bytearray, size: int) -> None:
        with self._lock:
            for flip in self._flips:
                if flip.direction == direction and size >= flip.least_bytes:
                    payload[size // 2] ^= 0x10
                    self.flipped += 1
                    self._flips.remove(flip)
                    return


def _exactly(source: socket.socket, nbytes: int) -> bytes:
    data = source.recv(nbytes, socket.MSG_WAITALL) if nbytes else b""
    if len(data) < nbytes:
        raise EOFError
    return data
