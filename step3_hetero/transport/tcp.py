"""Frames over TCP: every byte under a checksum, peers that prove a key, TLS where it is asked."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import ClassVar

from crc32c import crc32c

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import (
    Bytes,
    Capabilities,
    Channel,
    CopyFailed,
    CorruptFrame,
    Frame,
    FrameLimits,
    Listener,
    TlsFiles,
    Transport,
    refusal,
)
from step3_hetero.transport.framing import (
    ALIGNMENT,
    FIXED,
    LENGTH_BYTES,
    SUM,
    chunks,
    flat,
    header_of,
    packed,
    rest_bytes,
    unpacked,
)
from step3_hetero.transport.lending import Lent, aligned_buffer, plain_memory
from step3_hetero.transport.listening import SocketListener
from step3_hetero.transport.sockets import (
    HANDSHAKE_S,
    Patience,
    Stream,
    connected,
    read_bytes,
    read_into,
    shake_hands,
    write,
)
from step3_hetero.transport.tls import TlsStream, context_of, digest_of

STALL_S = 2.0
"""How long a peer may pause within a frame that it has begun, if ``receive`` waits no longer."""

BUFFER_BYTES = 4 << 20
"""Asked of the kernel for each direction; it may give less."""

CHUNK_BYTES = 4 << 20
"""Summed and handed to the kernel at a time. Smaller ones would overlap sums and wire, but the
receiver falls asleep at every gap: waking it takes longer than the sum of a chunk."""

READY_BYTES = 256 << 10
"""The same of a frame that is still being written: what is there goes."""


class TcpChannel(Channel):
    """One connection. A received frame's parts lie in a buffer that the next one may overwrite."""

    in_pieces: ClassVar[bool] = True
    lands: ClassVar[bool] = True

    def __init__(self, stream: Stream, limits: FrameLimits) -> None:
        self.peer = "{}:{}".format(*stream.sock.getpeername()[:2])
        stream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            stream.sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        self._limits = limits
        self._stream = stream
        self._buffer = aligned_buffer(0, ALIGNMENT)
        self._lent: Lent | None = None
        self._sum = 0
        self._came = 0

    def send(self, frame: Frame, deadline_s: float) -> None:
        """See Channel.send."""
        header = header_of(frame, self._limits)
        if deadline_s <= 0 and not self._stream.is_writable():  # part of a frame must not go out
            raise TransportTimeout("the peer took nothing for 0 s")
        patience = Patience(deadline_s, header.payload_bytes)
        before, front, total = self._stream.sent_bytes, [memoryview(packed(header))], 0
        groups = _groups(frame)
        reached = -header.head_bytes
        try:
            for group in groups:
                reached += sum(map(len, group))
                if frame.ready is not None:
                    frame.ready(reached)
                for piece in group:
                    total = crc32c(piece, total)
                last = [memoryview(SUM.pack(total))] if group is groups[-1] else []
                write(self._stream, [*front, *group, *last], patience)
                front = []
        except (TransportTimeout, CopyFailed):
            if self._stream.sent_bytes != before:  # what would follow is no frame
                self.close()
            raise

    def receive(self, deadline_s: float) -> Frame:
        """See Channel.receive."""
        fixed = memoryview(bytearray(FIXED.size))
        begun = self._stream.read(fixed, deadline_s)
        if not begun:
            raise RoleLost(f"{self.peer} closed the connection")
        try:
            return self._rest(fixed, begun, max(deadline_s, STALL_S))
        except TransportTimeout as stalled:
            self.close()
            raise RoleLost(f"{self.peer} stalled within a frame: {stalled}") from stalled
        except EdgeMismatch:
            self.close()
            raise

    def fileno(self) -> int:
        """See Channel.fileno."""
        return self._stream.fileno()

    def close(self) -> None:
        """See Channel.close. Parts that were lent keep their own memory."""
        self._stream.close()
        self._buffer, self._lent = aligned_buffer(0, ALIGNMENT), None

    def _rest(self, fixed: memoryview, begun: int, pause_s: float) -> Frame:
        """Return the frame of which ``begun`` bytes have been read."""
        most = Patience(pause_s, self._limits.parts * LENGTH_BYTES)
        read_into(self._stream, fixed[begun:], most)
        rest = read_bytes(self._stream, rest_bytes(fixed, self._limits), most)
        header = unpacked(fixed, rest, self._limits)
        patience, self._sum = Patience(pause_s, header.payload_bytes), 0
        head, room = memoryview(bytearray(header.head_bytes)), self._room(header.room_bytes())
        read_into(self._stream, head, patience, self._add)
        parts = header.parts_in(room.data)  # to be written: of the same room, so that whoever
        self._lent = Lent(room, header.parts_in)  # holds one of them holds it up too
        if self.landing is not None:
            self.landing.begin(header.frame(head, parts))
        self._came = 0
        for view in parts:
            read_into(self._stream, view, patience, self._add_part)
        (said,) = SUM.unpack(read_bytes(self._stream, SUM.size, patience))
        if self._sum != said:
            raise CorruptFrame(f"a frame of {self.peer} does not match its checksum")
        return header.frame(head, self._lent.parts)

    def _add(self, piece: memoryview) -> None:
        self._sum = crc32c(piece, self._sum)

    def _add_part(self, piece: memoryview) -> None:
        self._add(piece)
        self._came += len(piece)
        if self.landing is not None:
            self.landing.came(self._came)

    def _room(self, nbytes: int) -> Bytes:
        """Return memory for a frame's parts: the same again, once nobody holds the last frame."""
        lent, buffer = self._lent, self._buffer  # another thread may close meanwhile
        is_free = lent is None or lent.is_returned()
        if not is_free or buffer.nbytes < nbytes:
            memory = plain_memory if self.landing is None else self.landing.memory
            buffer = self._buffer = aligned_buffer(nbytes, ALIGNMENT, memory)
        return buffer[:nbytes]


def _groups(frame: Frame) -> list[list[memoryview]]:
    """Return head and parts in groups to be sent one after the other.

    Of a frame that is still being written each part is cut for itself: the last bytes of one piece
    must not wait for the first of the next.
    """
    buffers = flat([frame.head, *frame.parts])
    if frame.ready is None:
        return chunks(buffers, CHUNK_BYTES) or [[]]
    return [group for buffer in buffers for group in chunks([buffer], READY_BYTES)] or [[]]


class TcpTransport(Transport):
    """Addresses are ``host:port``; port 0 takes a free one."""

    name: ClassVar[str] = "tcp"
    capabilities: ClassVar[Capabilities] = Capabilities(True, 2, True, encrypts=True)

    def __init__(self, tls: TlsFiles | None = None) -> None:
        self._tls = tls

    def secured(self, tls: TlsFiles) -> Transport:
        """See Transport.secured."""
        return TcpTransport(tls)

    def why_no_address(self, address: str) -> str | None:
        """See Transport.why_no_address."""
        return refusal(split, address)

    def listen(self, address: str, limits: FrameLimits, key: bytes | None = None) -> Listener:
        """See Transport.listen."""
        host, port = split(address or "127.0.0.1:0")
        if key is None and not is_loopback(host):
            raise ConfigError(
                f"address {address!r} can be reached from other machines: give a key "
                "(transport.key_file), or listen at 127.0.0.1"
            )
        meet = self._meeting(limits, key, listens=True)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen()
        except OSError as cause:
            sock.close()
            raise ConfigError(
                f"cannot listen at {address!r}: {cause.strerror}; take another port"
            ) from cause
        name = f"[{host}]" if ":" in host else host
        where = f"{name}:{sock.getsockname()[1]}"
        return SocketListener(sock, where, meet)

    def connect(
        self, address: str, limits: FrameLimits, deadline_s: float, key: bytes | None = None
    ) -> Channel:
        """See Transport.connect."""
        place, meet = split(address), self._meeting(limits, key, listens=False)
        return meet(
            connected(lambda left: socket.create_connection(place, left), address, deadline_s)
        )

    def _channel(self, stream: Stream, limits: FrameLimits) -> Channel:
        """Make a channel of a connection whose peer has proved the key."""
        return TcpChannel(stream, limits)

    def _meeting(
        self, limits: FrameLimits, key: bytes | None, *, listens: bool
    ) -> Callable[[socket.socket], Channel]:
        """Return what makes a channel of a connected socket, or closes it."""
        tls = self._tls
        if tls is not None and tls.ca is None and key is None:
            raise ConfigError(
                "TLS without a CA and without a key proves nobody: give transport.tls_ca or "
                "transport.key_file"
            )
        context = None if tls is None else context_of(tls, listens=listens)
        own = digest_of(tls.cert) if tls is not None and listens else None

        def meet(sock: socket.socket) -> Channel:
            patience = Patience(HANDSHAKE_S)
            stream = (
                Stream(sock) if context is None else TlsStream.met(sock, context, patience, own)
            )
            try:
                shake_hands(stream, limits, key, patience, listens=listens)
                return self._channel(stream, limits)
            except BaseException:
                stream.close()
                raise

        return meet


def split(address: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        ConfigError: it is no address.

    >>> split("[::1]:7001")
    ('::1', 7001)
    """
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"address {address!r} refused; expected host:port, as 127.0.0.1:7001")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Say whether an address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
