"""TLS under the frames of tcp, by the standard library. The proof of the key stays on top."""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import TlsFiles
from step3_hetero.transport.sockets import Patience, Stream

WAITS = {ssl.SSLWantReadError: select.POLLIN, ssl.SSLWantWriteError: select.POLLOUT}
"""What the library waits for, whatever it was asked to do."""


def context_of(files: TlsFiles, *, listens: bool) -> ssl.SSLContext:
    """Return what connections of one side are made with.

    Raises:
        ConfigError: a file cannot be read, or certificate and key do not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if listens else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE if files.ca is None else ssl.CERT_REQUIRED
    if listens:
        context.num_tickets = 0  # nobody resumes, and ``select`` would take them for a frame
    try:
        context.load_cert_chain(files.cert, files.key)
        if files.ca is not None:
            context.load_verify_locations(files.ca)
    except OSError as cause:
        raise ConfigError(
            f"TLS refused: certificate {str(files.cert)!r}, key {str(files.key)!r}, CA "
            f"{str(files.ca or 'none')!r}: {cause}"
        ) from cause
    return context


def digest_of(cert: Path) -> bytes:
    """Return the SHA-256 of the first certificate in a PEM file."""
    text = cert.read_text(encoding="ascii", errors="replace")
    body = text.partition(ssl.PEM_HEADER)[2].partition(ssl.PEM_FOOTER)[0]
    return sha256(ssl.PEM_cert_to_DER_cert(ssl.PEM_HEADER + body + ssl.PEM_FOOTER)).digest()


class TlsStream(Stream):
    """A stream under TLS. The library's object is one: a lock keeps reader and writer apart.

    Neither waits while it holds the lock. What a write has begun is offered again, unchanged, until
    it is taken: the library insists.
    """

    def __init__(self, sock: socket.socket, bound: bytes) -> None:
        super().__init__(sock)
        sock.setblocking(False)
        self._bound = bound

    @classmethod
    def met(
        cls, sock: socket.socket, context: ssl.SSLContext, patience: Patience, own: bytes | None
    ) -> TlsStream:
        """Return a stream over a connected socket, the TLS handshake done.

        ``own`` is the digest of this side's certificate if it listens, else None.

        Raises:
            EdgeMismatch: the peer speaks no TLS, or shows no certificate that the CA signed.
            RoleLost, TransportTimeout: it is gone, or too slow.
        """
        sock.setblocking(False)
        listens = own is not None
        secure = context.wrap_socket(sock, server_side=listens, do_handshake_on_connect=False)
        try:
            _shake(secure, patience)
            theirs = secure.getpeercert(binary_form=True)
        except (ssl.SSLEOFError, ConnectionError) as cause:  # who refuses says so first
            secure.close()
            raise RoleLost(f"the peer left during the TLS handshake: {cause}") from cause
        except OSError as cause:
            secure.close()
            raise EdgeMismatch(f"the peer does not agree on TLS: {cause}") from cause
        except BaseException:
            secure.close()
            raise
        return cls(secure, sha256(theirs or b"").digest() if own is None else own)

    def read(self, view: memoryview, pause_s: float) -> int:
        """See Stream.read."""
        until = time.monotonic() + pause_s
        while True:
            with self._reading, self._writing:
                try:
                    return self.sock.recv_into(view)
                except tuple(WAITS) as wants:
                    event = WAITS[type(wants)]
                except ssl.SSLEOFError:
                    return 0
                except (OSError, ValueError) as cause:
                    raise RoleLost(f"the connection broke: {cause}") from cause
            if not _waited(self.sock, event, until):
                raise TransportTimeout(f"nothing came within {max(0.0, pause_s):g} s")

    def write(self, buffers: Sequence[memoryview], pause_s: float) -> int:
        """See Stream.write. One buffer at a time: TLS has no gathering."""
        until, event = time.monotonic() + pause_s, select.POLLOUT
        while _waited(self.sock, event, until):
            with self._reading, self._writing:
                try:
                    sent = self.sock.send(buffers[0])
                    self.sent_bytes += sent
                    return sent
                except tuple(WAITS) as wants:
                    event = WAITS[type(wants)]
                    self.sent_bytes += 1  # a record may have been cut: the frame has begun
                except (OSError, ValueError) as cause:
                    raise RoleLost(f"the connection broke: {cause}") from cause
        raise TransportTimeout(f"the peer took nothing for {max(0.0, pause_s):g} s")

    def bound_to(self) -> bytes:
        """Return the digest of the listener's certificate."""
        return self._bound


def _shake(secure: ssl.SSLSocket, patience: Patience) -> None:
    """Do the handshake, waiting where it has to."""
    while True:
        try:
            return secure.do_handshake()
        except tuple(WAITS) as wants:
            left = time.monotonic() + patience.left_s()
            if not _waited(secure, WAITS[type(wants)], left):
                raise TransportTimeout("the peer was too slow with TLS") from None


def _waited(sock: socket.socket, event: int, until: float) -> bool:
    poll = select.poll()
    try:
        poll.register(sock, event)
    except (ValueError, OSError) as cause:
        raise RoleLost("the channel is closed") from cause
    return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))
