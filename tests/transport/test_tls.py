"""TLS under tcp: certificates made here, and what is refused without the right ones."""

import socket
import ssl
import subprocess
import threading
from select import select

import pytest

from step3_hetero.errors import ConfigError, EdgeMismatch, RoleLost, TransportTimeout
from step3_hetero.transport.base import Frame, TlsFiles
from step3_hetero.transport.framing import MAGIC, VERSION
from step3_hetero.transport.registry import get_transport
from step3_hetero.transport.sockets import HELLO_MAGIC
from step3_hetero.transport.tcp import TcpTransport, split
from transport.strangers import LIMITS, still_serves

KEY = b"a key that both sides know"
GREETING = HELLO_MAGIC + VERSION.to_bytes(2) + LIMITS.head_bytes.to_bytes(4)
FRAME = MAGIC + VERSION.to_bytes(2) + (1).to_bytes(2) + (0).to_bytes(4)
"""How the greeting and every frame of kind 1 begin."""


def openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def certificate(folder, name, ca=None):
    """Make a key and a certificate: of its own authority, or signed by ``ca``."""
    extra = [] if ca is None else ["-CA", f"{ca}.pem", "-CAkey", f"{ca}.key"]
    openssl(
        folder, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
        "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem",
        *extra,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("certificates")
    certificate(made, "ca")
    certificate(made, "a", "ca")
    certificate(made, "f", "ca")
    certificate(made, "stranger")
    return made


def files(folder, name, ca="ca"):
    return TlsFiles(folder / f"{name}.pem", folder / f"{name}.key", ca and folder / f"{ca}.pem")


@pytest.fixture
def listener(folder):
    listening = TcpTransport(files(folder, "f")).listen("", LIMITS, KEY)
    yield listening
    listening.close()


def test_frames_travel_both_ways_at_once_and_no_byte_is_plain(folder):
    listener = TcpTransport(files(folder, "f")).listen("", LIMITS, KEY)
    seen = bytearray()
    relay = Relay(listener.address, seen)
    one = TcpTransport(files(folder, "a")).connect(relay.address, LIMITS, 10, KEY)
    other, secret = listener.accept(10), b"nobody reads this" * 3000

    def ask(channel, got):
        for number in range(30):
            channel.send(Frame(1, 0, number, b"head", [secret, b"", b"x"]), 10)
            back = channel.receive(30)
            got.append((back.seq, bytes(back.parts[0]) == secret))

    got = [], []
    threads = [threading.Thread(target=ask, args=p) for p in zip((one, other), got, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert got == ([(n, True) for n in range(30)],) * 2
    with pytest.raises(TransportTimeout):
        one.receive(0.05)
    assert len(seen) > 60 * len(secret)
    # Long enough that three megabytes of ciphertext do not hold them by chance.
    for plain in (secret[:17], GREETING, FRAME):
        assert plain not in seen, f"{plain!r} is there to read"
    other.close()
    with pytest.raises(RoleLost):
        one.receive(10)
    for end in (one, listener, relay):
        end.close()


class Relay:
    """Passes bytes between a caller and a listener, and keeps them."""

    def __init__(self, target, seen):
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._ends = []
        self._threads = [threading.Thread(target=self._run, args=(target, seen), daemon=True)]
        self._threads[0].start()

    def _run(self, target, seen):
        here, _ = self._server.accept()
        there = socket.create_connection(split(target))
        self._ends += [here, there]
        back = threading.Thread(target=self._pass, args=(there, here, seen), daemon=True)
        back.start()
        self._threads.append(back)
        self._pass(here, there, seen)

    def _pass(self, source, target, seen):
        try:
            while data := source.recv(1 << 16):
                seen += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self):
        for end in self._ends:
            end.close()
        self._server.close()
        for thread in self._threads:
            thread.join(20)


@pytest.mark.parametrize(
    ("caller", "key"),
    [
        (lambda folder: files(folder, "stranger"), KEY),
        (lambda folder: files(folder, "a", "stranger"), KEY),
        (lambda folder: files(folder, "a"), b"another key"),
        (lambda folder: None, KEY),
    ],
    ids=["certificate of nobody's", "listener's not trusted", "wrong key", "no TLS"],
)
def test_who_lacks_the_certificate_or_the_key_is_refused_and_costs_nobody_else(
    folder, listener, caller, key
):
    with pytest.raises((EdgeMismatch, RoleLost)):
        channel = TcpTransport(caller(folder)).connect(listener.address, LIMITS, 10, key)
        channel.receive(10)  # TLS 1.3: a caller learns of it with the first bytes back
    friend = TcpTransport(files(folder, "a")).connect(listener.address, LIMITS, 10, KEY)
    there = listener.accept(10)
    friend.send(Frame(1, 0, 7), 5)
    assert there.receive(10).seq == 7
    friend.close()
    there.close()


def test_a_caller_with_tls_is_told_that_the_listener_has_none(folder):
    listener = get_transport("tcp").listen("", LIMITS)
    with pytest.raises(EdgeMismatch, match="does not agree on TLS"):
        TcpTransport(files(folder, "a")).connect(listener.address, LIMITS, 10)
    still_serves("tcp", listener)
    listener.close()


class Between(threading.Thread):
    """Ends TLS on both sides with a certificate of its own, passing on what it reads."""

    def __init__(self, folder, target):
        super().__init__()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        self.folder, self.target = folder, target

    def run(self):
        inward = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        inward.load_cert_chain(self.folder / "stranger.pem", self.folder / "stranger.key")
        outward = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        outward.check_hostname, outward.verify_mode = False, ssl.CERT_NONE
        plain, _ = self.server.accept()
        with (
            inward.wrap_socket(plain, server_side=True) as here,
            outward.wrap_socket(socket.create_connection(split(self.target))) as there,
        ):
            other = {here: there, there: here}
            while readable := select([here, there], [], [], 20)[0]:
                for end in readable:
                    if not self.carry(end, other[end]):
                        return

    @staticmethod
    def carry(source, target):
        """Pass on one record, whole; say whether both sides still stand."""
        try:
            data = source.recv(1 << 15)
            target.sendall(data)
        except (OSError, ValueError):
            return False
        return bool(data)


def test_without_a_ca_the_key_is_bound_to_the_certificate_and_cannot_be_passed_on(folder):
    listener = TcpTransport(files(folder, "f", None)).listen("", LIMITS, KEY)
    between = Between(folder, listener.address)
    between.start()
    caller = TcpTransport(files(folder, "a", None))
    with pytest.raises((EdgeMismatch, RoleLost)):
        caller.connect(between.address, LIMITS, 10, KEY)
    between.join(60)
    between.server.close()
    with pytest.raises(TransportTimeout):
        listener.accept(0.1)
    straight = caller.connect(listener.address, LIMITS, 10, KEY)
    listener.accept(10).close()
    straight.close()
    listener.close()


def test_tls_that_would_prove_nobody_is_refused(folder):
    with pytest.raises(ConfigError, match=r"proves nobody: give transport\.tls_ca or"):
        TcpTransport(files(folder, "f", None)).listen("", LIMITS)


@pytest.mark.parametrize(("cert", "key"), [("a", "f"), ("none", "a")], ids=["unlike", "missing"])
def test_files_that_do_not_fit_are_named(folder, cert, key):
    wrong = TlsFiles(folder / f"{cert}.pem", folder / f"{key}.key", folder / "ca.pem")
    with pytest.raises(
        ConfigError, match=rf"TLS refused: certificate .*{cert}\.pem', key .*{key}\.key"
    ):
        TcpTransport(wrong).listen("", LIMITS, KEY)


def test_a_transport_without_tls_says_so(folder):
    with pytest.raises(ConfigError, match="transport 'shm' has no TLS"):
        get_transport("shm").secured(files(folder, "f"))


def test_who_speaks_no_tls_or_says_nothing_keeps_nobody_waiting(folder, listener):
    silent = [socket.create_connection(split(listener.address), 5) for _ in range(40)]
    silent[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    friend = TcpTransport(files(folder, "a")).connect(listener.address, LIMITS, 10, KEY)
    listener.accept(10).close()
    friend.close()
    for sock in silent:
        sock.close()
