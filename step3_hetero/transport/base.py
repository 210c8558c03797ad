"""What carries frames between two roles: the contract of a transport, and how one is found.

A transport is registered under the entry-point group ``step3_hetero.transports``; its name is what
``transport.kind`` says. A frame's meaning is the business of those who send it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from step3_hetero.errors import ConfigError, Step3HeteroError

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes; a NumPy array gives them with ``memoryview(x).cast("B")``."""

GROUP = "step3_hetero.transports"


Bytes = npt.NDArray[np.uint8]

PIECE_BYTES = 512 << 10
"""Of a copy between device and host: some 20 us of a PCIe link of 25 GB/s (not measured), several
times what starting it takes; the activations of 128 tokens of Step-3 in bfloat16 are four. A
multiple of what tcp and shm look for at a time. Whoever prices an edge counts in it too."""

Ready = Callable[[int], None]
"""Returns once the first so many bytes of a frame's parts, one part after the other, are there.

Any number of threads may ask, again and again. It has a deadline of its own, and raises CopyFailed.
"""


class CopyFailed(Step3HeteroError):
    """What a frame holds did not come from its device: no fault of the peer."""


class CorruptFrame(Step3HeteroError):
    """A frame's bytes are not those that were sent. The channel still stands: ask for it again."""


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What one frame may hold, agreed before the first; nothing larger is given memory.

    ``head_bytes`` bounds the head, ``part_bytes`` all parts together, ``parts`` their number.
    """

    head_bytes: int
    part_bytes: int
    parts: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: what kind it is, which one, a short head, and bulk bytes beside it.

    ``kind`` fits 16 bits, ``epoch`` 32, ``seq`` 64: whoever waits for an answer knows by them which
    one it is, and drops what came twice.

    ``parts`` of a received frame are lent, for they may lie in a buffer that is used again: they
    are valid until the next ``receive`` on its channel, which releases them. Memory from which an
    array has been made (``np.frombuffer``) stays as it is for as long as that array lives, and
    holds up the channel's buffer meanwhile: copy what is kept for long.

    With ``ready`` the parts of a frame to send are still being written, from front to back. Only a
    channel with ``in_pieces`` sends such a frame; others are given it when all is there.
    """

    kind: int
    epoch: int
    seq: int
    head: Buffer = b""
    parts: Sequence[Buffer] = ()
    ready: Ready | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a transport can do. ``copies`` counts the bytes' copies from buffer to buffer."""

    between_hosts: bool
    copies: int
    authenticates: bool
    encrypts: bool = False


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """This side's certificate chain and private key, and who may have signed the peer's; PEM.

    With ``ca`` both sides have to show a certificate that it signed. Names in it are not compared:
    roles move from address to address. Without it the key's proof, bound to the listener's
    certificate, tells who the peer is, so that there has to be a key.
    """

    cert: Path
    key: Path
    ca: Path | None = None


class Landing(Protocol):
    """Who wants a frame's parts while they come. Its calls do not raise, and do not wait."""

    def memory(self, nbytes: int) -> Bytes:
        """Return memory for the parts, of any content."""

    def begin(self, frame: Frame) -> None:
        """Take in a frame whose parts come next. No checksum of head and parts has been seen yet.

        The parts are lent as those of a received frame are.
        """

    def came(self, nbytes: int) -> None:
        """Take in that the first so many bytes of the parts, one after the other, are there."""


class Channel(ABC):
    """A connection to one peer. Frames arrive whole, once, in the order in which they were sent.

    One thread may send while another receives; two may not do the same.
    """

    peer: str
    """The peer's address, for messages."""

    in_pieces: ClassVar[bool] = False
    """Whether ``send`` asks ``Frame.ready`` for each piece before it reads it."""

    lands: ClassVar[bool] = False
    """Whether ``receive`` tells ``landing`` of parts while the rest of them is under way."""

    landing: Landing | None = None
    """Told of parts while ``receive`` waits for the rest, by a channel that can; set before it."""

    @abstractmethod
    def send(self, frame: Frame, deadline_s: float) -> None:
        """Send a frame; its buffers may be used again afterwards.

        Raises:
            TransportTimeout: the peer took nothing for ``deadline_s`` seconds, 0 included; if a
                part of the frame was gone by then the channel is closed.
            RoleLost: the peer is gone.
            EdgeMismatch: the frame is larger than was agreed.
            CopyFailed: the frame never became ready; closed as above.
        """

    @abstractmethod
    def receive(self, deadline_s: float) -> Frame:
        """Return the next frame.

        Raises:
            TransportTimeout: none came within ``deadline_s`` seconds.
            RoleLost: the peer is gone, and all it had sent has been received; or it stalled within
                a frame, and the channel is closed.
            CorruptFrame: the frame's checksum does not fit; the channel can go on.
            EdgeMismatch: the bytes are no frame, or one larger than agreed; the channel is closed.
        """

    @abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that ``select`` finds readable while ``receive`` would not wait."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the connection and of all memory that belongs to it. May be called twice."""


class Listener(ABC):
    """Waits for peers at an address."""

    address: str
    """Where peers connect to, with the port that was chosen."""

    @abstractmethod
    def accept(self, deadline_s: float) -> Channel:
        """Return the next connection that proved to know the key; others are dropped.

        Raises:
            TransportTimeout: nobody came within ``deadline_s`` seconds.
        """

    @abstractmethod
    def fileno(self) -> int:
        """Return a descriptor that ``select`` finds readable when somebody may be there."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening; connections stay. May be called twice."""


class Transport(ABC):
    """One way of carrying frames."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def secured(self, tls: TlsFiles) -> Transport:
        """Return this transport under TLS.

        Raises:
            ConfigError: it has none.
        """
        raise ConfigError(
            f"transport {self.name!r} has no TLS: leave out transport.tls_*, or use tcp"
        )

    def why_unavailable(self) -> str | None:
        """Say what it needs and this machine lacks; None: nothing."""
        return None

    def why_no_address(self, address: str) -> str | None:
        """Say why nobody can listen at such an address; None: somebody may."""
        return None

    @abstractmethod
    def listen(self, address: str, limits: FrameLimits, key: bytes | None = None) -> Listener:
        """Listen at an address of this transport; empty: one that is free on this machine.

        Raises:
            ConfigError: the address is malformed, taken, or reachable from other machines while
                there is no ``key``.
        """

    @abstractmethod
    def connect(
        self, address: str, limits: FrameLimits, deadline_s: float, key: bytes | None = None
    ) -> Channel:
        """Connect to a listener, trying until ``deadline_s`` seconds have passed.

        Raises:
            TransportTimeout: nobody listens there.
            RoleLost: who listened there is gone.
            EdgeMismatch: the peer speaks another version, has other limits, or refuses the key.
        """


def refusal(call: Callable[..., object], *arguments: object) -> str | None:
    """Return what the ConfigError of a call says; None if it raises none."""
    try:
        call(*arguments)
    except ConfigError as refused:
        return str(refused)
    return None
