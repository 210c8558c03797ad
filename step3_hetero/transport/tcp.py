"""Frames over TCP: every byte under a checksum, peers that prove a key."""

from __future__ import annotations

import ipaddress
import socket
from typing import ClassVar

from crc32c import crc32c

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import (
    Capabilities,
    Channel,
    CorruptFrame,
    Frame,
    FrameLimits,
    Listener,
    Transport,
)
from step3_hetero.transport.framing import (
    FIXED,
    Header,
    flat,
    header_of,
    packed,
    rest_bytes,
    unpacked,
)
from step3_hetero.transport.sockets import (
    SocketListener,
    connected,
    read_bytes,
    read_into,
    wait_readable,
    write,
)

STALL_S = 10.0
"""How long a peer may pause within a frame that it has begun."""

BUFFER_BYTES = 4 << 20
"""Asked of the kernel for each direction; it may give less."""


class TcpChannel(Channel):
    """One connection. A received frame's parts lie in a buffer that the next one overwrites."""

    def __init__(self, sock: socket.socket, limits: FrameLimits) -> None:
        self.peer = "{}:{}".format(*sock.getpeername()[:2])
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        self._limits = limits
        self._in = sock
        self._out = sock.dup()  # a deadline belongs to a socket object: each direction has one
        self._buffer = bytearray()

    def send(self, frame: Frame, deadline_s: float) -> None:
        """See Channel.send."""
        header = header_of(frame, self._limits, summed=True)
        write(self._out, flat([packed(header), frame.head, *frame.parts]), deadline_s)

    def receive(self, deadline_s: float) -> Frame:
        """See Channel.receive."""
        wait_readable(self._in, deadline_s)
        try:
            header = self._header()
            payload = self._room(header.payload_bytes)
            read_into(self._in, payload, STALL_S)
        except TransportTimeout as stalled:
            self.close()
            raise RoleLost(f"{self.peer} stalled within a frame") from stalled
        except EdgeMismatch:
            self.close()
            raise
        if crc32c(payload) != header.checksum:
            raise CorruptFrame(f"a frame of {self.peer} does not match its checksum")
        return header.frame(payload.toreadonly())

    def fileno(self) -> int:
        """See Channel.fileno."""
        return self._in.fileno()

    def close(self) -> None:
        """See Channel.close."""
        self._in.close()
        self._out.close()

    def _header(self) -> Header:
        fixed = read_bytes(self._in, FIXED.size, STALL_S)
        rest = read_bytes(self._in, rest_bytes(fixed, self._limits), STALL_S)
        return unpacked(fixed, rest, self._limits)

    def _room(self, nbytes: int) -> memoryview:
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)  # the old one lives on in frames that still hold it
        return memoryview(self._buffer)[:nbytes]


class TcpTransport(Transport):
    """Addresses are ``host:port``; port 0 takes a free one."""

    name: ClassVar[str] = "tcp"
    capabilities: ClassVar[Capabilities] = Capabilities(True, 2, True)

    def listen(self, address: str, limits: FrameLimits, key: bytes | None = None) -> Listener:
        """See Transport.listen."""
        host, port = split(address or "127.0.0.1:0")
        if key is None and not is_loopback(host):
            raise ConfigError(
                f"address {address!r} can be reached from other machines: give a key "
                "(transport.key_file), or listen at 127.0.0.1"
            )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen()
        except OSError as cause:
            sock.close()
            raise ConfigError(f"cannot listen at {address!r}: {cause.strerror}") from cause
        name = f"[{host}]" if ":" in host else host
        where = f"{name}:{sock.getsockname()[1]}"
        return SocketListener(sock, where, limits, key, lambda s: TcpChannel(s, limits))

    def connect(
        self, address: str, limits: FrameLimits, deadline_s: float, key: bytes | None = None
    ) -> Channel:
        """See Transport.connect."""
        place = split(address)
        sock = connected(
            lambda left: socket.create_connection(place, left), address, limits, deadline_s, key
        )
        return TcpChannel(sock, limits)


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
